"""The total order of results, and merging under it. B queries, K kept, M candidates."""

from dataclasses import dataclass

import torch
from torch import Tensor

NO_ITEM = -1


@dataclass(frozen=True)
class TopK:
    """Each query's best items so far: score descending, ties by item row ascending.

    A query with fewer than K items is padded at the end with score -inf and row `NO_ITEM`.
    """

    scores_BK: Tensor  # float32
    rows_BK: Tensor  # int64, rows of the whole item index

    def __len__(self) -> int:
        return int(self.scores_BK.shape[0])

    def take(self, queries: Tensor | slice) -> "TopK":
        """The same for some of the queries."""
        return TopK(self.scores_BK[queries], self.rows_BK[queries])


def empty_topk(num_queries: int, k: int, device: torch.device | str = "cpu") -> TopK:
    """No item yet for any query."""
    scores_BK = torch.full((num_queries, k), -torch.inf, device=device)
    return TopK(scores_BK, torch.full((num_queries, k), NO_ITEM, dtype=torch.int64, device=device))


def select_topk(scores_BM: Tensor, rows_BM: Tensor, k: int) -> TopK:
    """The k best of M candidates, each of a different item; -inf marks what is no candidate.

    Ordering by row first and then, stably, by score makes the order total, so that the result depends neither on
    where a candidate stood nor on which shard it came from.
    """
    rows_BM, by_row_BM = rows_BM.sort(dim=1)
    scores_BM, by_score_BM = scores_BM.gather(1, by_row_BM).sort(dim=1, descending=True, stable=True)
    scores_BK, rows_BK = scores_BM[:, :k], rows_BM.gather(1, by_score_BM[:, :k])
    return _padded(scores_BK, rows_BK.masked_fill(scores_BK == -torch.inf, NO_ITEM), k)


def merge_topk(left: TopK, right: TopK, k: int) -> TopK:
    """The k best of both; the two must cover disjoint items."""
    scores_BM = torch.cat([left.scores_BK, right.scores_BK], dim=1)
    rows_BM = torch.cat([left.rows_BK, right.rows_BK], dim=1)
    return select_topk(scores_BM, rows_BM, k)


def concat_queries(parts: list[TopK]) -> TopK:
    """The results of consecutive groups of queries as one."""
    return TopK(torch.cat([p.scores_BK for p in parts]), torch.cat([p.rows_BK for p in parts]))


def _padded(scores_BK: Tensor, rows_BK: Tensor, k: int) -> TopK:
    missing = k - scores_BK.shape[1]
    if missing <= 0:
        return TopK(scores_BK, rows_BK)
    pad = empty_topk(scores_BK.shape[0], missing, scores_BK.device)
    scores = torch.cat([scores_BK, pad.scores_BK.to(scores_BK.dtype)], dim=1)
    return TopK(scores, torch.cat([rows_BK, pad.rows_BK], dim=1))
