"""Memory: item-to-item counts as a part of the score, and how good each weight of it is.

score = MoL + weight · log(1 + count score / scale), for the items that follow the last events of a history. Shapes: B
queries, N items, M candidates, K kept.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.data.batches import ValidationUsers
from pipeline.data.lists import NO_ITEM, Float32, Lists
from pipeline.data.neighbours import QUERIES_AT_ONCE, ScoredLists, best_by_row, score_by_counts
from pipeline.evaluation.metrics import Floats, MeanSum, find_hits, ndcg_at_k
from pipeline.model.model import RetrievalModel
from pipeline.model.mol import QuerySide
from pipeline.retrieval.bonuses import Bonuses
from pipeline.retrieval.filters import ShardMask
from pipeline.retrieval.topk import TopK, empty_topk, merge_topk, select_topk

ITEM_TILE = 128  # items that are scored at once: the numbers of a tile of pairs stay in the cache
STANDARD_ERRORS = 2.0  # of the mean gain, by which a weight must be better than 0


@dataclass(frozen=True)
class Memory:
    """The part of counts in a score; with weight 0 they have none."""

    weight: float
    scale: float

    def amounts(self, count_scores: Float32) -> Float32:
        """What is added to the MoL scores of items with these count scores."""
        return np.asarray(self.weight * np.log1p(count_scores.astype(np.float64) / self.scale), dtype=np.float32)


def best_counts(neighbours: ScoredLists, histories: Lists, max_items: int) -> ScoredLists:
    """(B,) lists in ascending order of row: the `max_items` items with the highest scores by `score_by_counts`, items
    of the history left out."""
    parts = range(0, max(1, len(histories)), QUERIES_AT_ONCE)  # bounds the memory of scores that are not kept
    return ScoredLists.concat(
        _best_counts(neighbours, histories.narrow(start, min(start + QUERIES_AT_ONCE, len(histories))), max_items)
        for start in parts
    )


def _best_counts(neighbours: ScoredLists, histories: Lists, max_items: int) -> ScoredLists:
    scored = score_by_counts(neighbours, histories)
    return best_by_row(scored.where(~scored.items.is_in(histories)), max_items)


@dataclass(frozen=True)
class MemoryBonuses:
    """Gives each query the bonuses of the items that follow its history."""

    memory: Memory
    neighbours: ScoredLists
    max_items: int  # with a bonus, per query

    def __call__(self, histories: Lists) -> Bonuses:
        counts = best_counts(self.neighbours, histories, self.max_items)
        return Bonuses(counts.items, self.memory.amounts(counts.scores), len(self.neighbours))


@torch.inference_mode()
def ndcg_with_each(
    memories: Sequence[Memory],
    model: RetrievalModel,
    queries: QuerySide,
    users: ValidationUsers,
    counts: ScoredLists,
    cutoff: int,
    needs_count_N: Tensor | None = None,
) -> list[Floats]:
    """(B,) for each memory: NDCG@cutoff of the users' held-out items among all that are not in their histories.

    `counts` has no item of the history. Items with a count, and held-out items, are scored one by one; of the others
    the `cutoff` best by MoL are enough, because no memory changes their order. So all items are scored once. An item of
    `needs_count_N`, bool on the CPU, is found only by a memory of a weight above 0 that has a count for it.
    """
    span = model.num_items
    special = counts.items.union(users.held_out)
    count_scores = np.zeros(len(special.values), np.float32)
    codes, of_counts = (lists.owners * span + lists.values for lists in (special, counts.items))
    count_scores[np.searchsorted(codes, of_counts)] = counts.scores
    device = queries.gate_BP.device
    rows_BM, _ = Bonuses(special, count_scores, span).as_tensors(device)
    items = model.item_side(rows_BM.clamp_min(0))
    scores_BM = _sound(model.mol(queries.alone(), items).squeeze(1)).masked_fill(rows_BM == NO_ITEM, -torch.inf)
    needs_count_N = torch.zeros(span, dtype=torch.bool) if needs_count_N is None else needs_count_N
    needs_count_BM = needs_count_N.to(device)[rows_BM.clamp_min(0)]
    mask = ShardMask(span, users.histories.union(special)).without_for_all(needs_count_N).to(device)
    others = _best_others(model, queries, mask, cutoff)
    ndcgs = []
    for memory in memories:
        _, amounts_BM = Bonuses(special, memory.amounts(count_scores), span).as_tensors(device)
        sums_BM = (scores_BM + amounts_BM).masked_fill(needs_count_BM & (amounts_BM == 0), -torch.inf)
        best = merge_topk(others, select_topk(sums_BM, rows_BM, cutoff), cutoff)
        is_hit_BK = find_hits(best.rows_BK.cpu().numpy(), users.held_out)
        ndcgs.append(ndcg_at_k(is_hit_BK, users.held_out.lengths, cutoff))
    return ndcgs


def _best_others(model: RetrievalModel, queries: QuerySide, mask: ShardMask, k: int) -> TopK:
    """The k best items by MoL that the mask does not hide."""
    device = queries.gate_BP.device
    best = empty_topk(len(mask), k, device)
    for first in range(0, model.num_items, ITEM_TILE):
        rows_N = torch.arange(first, min(first + ITEM_TILE, model.num_items), device=device)
        scores_BN = mask.hide(_sound(model.mol(queries, model.item_side(rows_N))), first)
        # Stable, so that of equal scores the lower row comes first.
        ordered_BN, order_BN = scores_BN.sort(dim=1, descending=True, stable=True)
        tile = select_topk(ordered_BN[:, :k], rows_N[order_BN[:, :k]], k)
        best = merge_topk(best, tile, k)
    return best


def _sound(scores: Tensor) -> Tensor:
    """The scores, with -inf for one that is not a number."""
    return scores.masked_fill(scores.isnan(), -torch.inf)


def grid(weights: Sequence[float], scales: Sequence[float]) -> Iterator[Memory]:
    """The memories to try beside weight 0, the smallest weight first, without repeats."""
    for weight in sorted({weight for weight in weights if weight > 0}):
        for scale in sorted(set(scales)):
            yield Memory(weight, scale)


def choose(memories: Sequence[Memory], gains: Sequence[MeanSum]) -> int | None:
    """The index of the memory with the largest mean gain over weight 0, the first of equal ones.

    `gains` are the differences by user. None when the best is not better than 0 by two standard errors.
    """
    best = max(range(len(memories)), key=lambda number: gains[number].mean, default=None)
    if best is None or gains[best].count < 2:
        return None
    gain = gains[best]
    variance = max(0.0, (gain.squares - gain.total * gain.mean) / (gain.count - 1))
    return best if gain.mean > STANDARD_ERRORS * float(np.sqrt(variance / gain.count)) else None
