"""Stage 1 of the algorithms of Ding & Zhai (2025), section 4, and of TopKLowRank: items worth an exact score.

B queries, M candidates, Q/X query/item components, D width, P = Q·X pairs of components, R rank.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pipeline.data.lists import NO_ITEM
from pipeline.model.mol import QuerySide
from pipeline.retrieval.filters import ShardMask
from pipeline.retrieval.index import ShardIndex, Shortlist

# (B, Q, D) and (B, P) -> (B, R): query vectors, whose products with the low-rank table predict scores.
QueryMap = Callable[[QuerySide], Tensor]
Candidates = tuple[Tensor, Tensor]  # (B, M) items, each once, NO_ITEM pads; (B,) bound on the scores of all others


def topk_avg(index: ShardIndex, queries: QuerySide, num_kept: int, mask: ShardMask) -> Candidates:
    """TopKAvg(K'): the items with the largest mean logit, from one inner product of mean components."""
    return _no_bound(index.preselect("mean", queries.mean_BD, num_kept, mask), len(index))


def topk_low_rank(
    index: ShardIndex, queries: QuerySide, num_kept: int, mask: ShardMask, query_map: QueryMap
) -> Candidates:
    """TopKLowRank(K', R): the items with the largest predicted MoL score (`low_rank.py`)."""
    return _no_bound(index.preselect("low_rank", query_map(queries), num_kept, mask), len(index))


def topk_per_embd(
    index: ShardIndex, queries: QuerySide, num_kept: int, mask: ShardMask, at_least: int = 0
) -> Candidates:
    """TopKPerEmbd(K'): the union of the best K' items by each pair of components alone.

    The lists overlap. While the union of some query has fewer than `at_least` items, K' is doubled for all.

    With t_p the worst logit in the list of pair p, every item outside all lists has logits of at most t_p, and a
    score of at most max_p t_p, because gates sum to one.
    """
    num_components = queries.components_BQD.shape[1]
    of_component = mask.take(np.repeat(np.arange(len(mask)), num_components))
    items, worst = [], []
    for component in range(index.num_item_components):
        shortlist = index.preselect(component, queries.components_BQD.flatten(0, 1), num_kept, of_component)
        items.append(shortlist.at_BM.view(len(mask), -1))
        is_full = (shortlist.at_BM != NO_ITEM).all(dim=1) & (shortlist.at_BM.shape[1] < len(index))
        worst.append(shortlist.scores_BM.amin(dim=1).where(is_full, -torch.inf).view(len(mask), -1))
    bound_B = (torch.cat(worst, dim=1).amax(dim=1) + index.product_error) / index.temperature
    at_BM = distinct(torch.cat(items, dim=1))
    has_too_few = ((at_BM != NO_ITEM).sum(dim=1) < at_least) & (bound_B > -torch.inf)  # -inf: there are no others
    if has_too_few.any() and num_kept < at_least:  # a list of `at_least` items is enough by itself
        return topk_per_embd(index, queries, min(2 * num_kept, at_least), mask, at_least)
    return at_BM, bound_B


def comb_topk(index: ShardIndex, queries: QuerySide, num_per_embd: int, num_kept: int, mask: ShardMask) -> Candidates:
    """CombTopK(K', K_avg): the union of TopKPerEmbd(K') and TopKAvg(K_avg), with the bound of the former."""
    by_mean_BM, _ = topk_avg(index, queries, num_kept, mask)
    by_component_BM, bound_B = topk_per_embd(index, queries, num_per_embd, mask)
    return distinct(torch.cat([by_mean_BM, by_component_BM], dim=1)), bound_B


def distinct(at_BM: Tensor) -> Tensor:
    """Keep each item of a query once, and pad with NO_ITEM."""
    at_BM = at_BM.sort(dim=1).values
    is_repeated_BM = at_BM == at_BM.roll(1, dims=1)
    is_repeated_BM[:, :1] = False
    at_BM = at_BM.masked_fill(is_repeated_BM, NO_ITEM).sort(dim=1, descending=True).values
    return at_BM[:, : int((at_BM != NO_ITEM).sum(dim=1).max())]


def _no_bound(shortlist: Shortlist, num_items: int) -> Candidates:
    """Candidates with no bound (+inf) on the scores of the other items, or -inf where there are no others."""
    has_all_B = (shortlist.at_BM == NO_ITEM).any(dim=1) | (shortlist.at_BM.shape[1] >= num_items)
    bound_B = torch.full((len(shortlist.at_BM),), torch.inf, device=shortlist.at_BM.device)
    return shortlist.at_BM, bound_B.masked_fill(has_all_B, -torch.inf)
