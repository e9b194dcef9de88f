"""Top-k of a stream of score tiles, exact, without ever holding queries × items scores.

B queries, N items of a tile, M kept or waiting, G groups of items, S survivors.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from pipeline.data.lists import NO_ITEM
from pipeline.retrieval.index import Shortlist
from pipeline.retrieval.topk import select_topk

GROUP = 16  # items that share one comparison with the threshold
MAX_WAITING = 2  # merge the waiting survivors when a query has on average more than 2 · num_kept of them


class Best:
    """The `num_kept` best items of each query in the tiles added so far; of equal scores the first item is kept.

    Once a query has `num_kept` items, its worst one is a threshold. A group of items is looked into only if its largest
    score is above the threshold. Items above it, the survivors, wait until there are enough to raise the threshold.
    """

    def __init__(self, num_queries: int, num_kept: int, device: torch.device | str = "cpu") -> None:
        self._num_queries, self._num_kept = num_queries, num_kept
        self._kept = Shortlist(
            torch.empty(num_queries, 0, device=device), torch.empty(num_queries, 0, dtype=torch.int64, device=device)
        )
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []  # query, item and score of each survivor
        self._num_waiting = 0

    def add(self, scores_BN: Tensor, low: int) -> None:
        """Add the scores of items `low`, `low` + 1, …; tiles come in ascending order, and -inf marks no candidate."""
        if self._kept.scores_BM.shape[1] < self._num_kept:
            at_BN = torch.arange(low, low + scores_BN.shape[1], device=scores_BN.device).expand(scores_BN.shape)
            self._kept = keep_first_best(_joined(self._kept, Shortlist(scores_BN, at_BN)), self._num_kept)
            return
        threshold_B = self._kept.scores_BM.amin(dim=1)
        full_BN = pad(scores_BN, (0, -scores_BN.shape[1] % GROUP), value=-torch.inf)
        # Every G-th item is in one group: a maximum over rows of G numbers is many times faster than over short runs.
        groups_BNG = full_BN.view(len(full_BN), GROUP, -1)
        queries_S, groups_S = (groups_BNG.amax(dim=1) > threshold_B[:, None]).nonzero(as_tuple=True)
        survivors_SN = groups_BNG[queries_S, :, groups_S]
        group_S, member_S = (survivors_SN > threshold_B[queries_S, None]).nonzero(as_tuple=True)
        scores_S = survivors_SN[group_S, member_S]
        at_S = low + member_S * groups_BNG.shape[2] + groups_S[group_S]
        self._waiting.append((queries_S[group_S], at_S, scores_S))
        self._num_waiting += len(scores_S)
        if self._num_waiting > MAX_WAITING * self._num_kept * self._num_queries:
            self._settle()

    def result(self) -> Shortlist:
        """The best items, in any order."""
        self._settle()
        return self._kept

    def _settle(self) -> None:
        if self._num_waiting:
            waiting = _by_query(self._waiting, self._num_queries)
            self._kept = keep_first_best(_joined(self._kept, waiting), self._num_kept)
        self._waiting, self._num_waiting = [], 0


def keep_first_best(candidates: Shortlist, num_kept: int) -> Shortlist:
    """Keep the `num_kept` best candidates, in any order; of equal scores the first items."""
    scores_BM, at_BM = candidates.scores_BM, candidates.at_BM
    best_BM, columns_BM = scores_BM.topk(min(num_kept, scores_BM.shape[1]), dim=1, sorted=False)
    kept_BM = at_BM.gather(1, columns_BM)
    if best_BM.shape[1]:
        worst_B = best_BM.amin(dim=1)
        is_tied_B = ((scores_BM == worst_B[:, None]).sum(dim=1) > (best_BM == worst_B[:, None]).sum(dim=1)).logical_and(
            worst_B > -torch.inf
        )
        if is_tied_B.any():  # torch's topk keeps any of the tied items
            ordered = select_topk(scores_BM[is_tied_B], at_BM[is_tied_B], num_kept)
            best_BM[is_tied_B], kept_BM[is_tied_B] = ordered.scores_BK, ordered.rows_BK
    return Shortlist(best_BM, kept_BM.masked_fill(best_BM == -torch.inf, NO_ITEM))


def _joined(left: Shortlist, right: Shortlist) -> Shortlist:
    scores_BM = torch.cat([left.scores_BM, right.scores_BM], dim=1)
    return Shortlist(scores_BM, torch.cat([left.at_BM, right.at_BM], dim=1))


def _by_query(waiting: list[tuple[Tensor, Tensor, Tensor]], num_queries: int) -> Shortlist:
    """Collect the survivors in a row for each query, padded at the end."""
    queries_S, at_S, scores_S = (torch.cat(parts) for parts in zip(*waiting, strict=True))
    queries_S, order_S = queries_S.sort(stable=True)
    counts_B = queries_S.bincount(minlength=num_queries)
    starts_B = counts_B.cumsum(0) - counts_B
    columns_S = torch.arange(len(queries_S), device=queries_S.device) - starts_B[queries_S]
    width = int(counts_B.max())
    scores_BM = torch.full((num_queries, width), -torch.inf, device=scores_S.device)
    at_BM = torch.full((num_queries, width), NO_ITEM, dtype=torch.int64, device=scores_S.device)
    scores_BM[queries_S, columns_S] = scores_S[order_S]
    at_BM[queries_S, columns_S] = at_S[order_S]
    return Shortlist(scores_BM, at_BM)
