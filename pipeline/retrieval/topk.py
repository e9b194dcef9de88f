"""The total order of results, and merging under it. B queries, K kept, M candidates."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.data.lists import NO_ITEM


@dataclass(frozen=True)
class TopK:
    """Each query's best items so far: score descending, ties by item row ascending.

    A query with fewer than K items is padded at the end with score -inf and row `NO_ITEM`. A missed item,
    one that belongs in the list but is not there, scores at most `bounds_B`: the list is proven exact where its K-th
    score is above the bound.
    """

    scores_BK: Tensor  # float32
    rows_BK: Tensor  # int64, rows of the whole item index
    bounds_B: Tensor  # float32: -inf where nothing better can have been missed, +inf where nothing is known

    def __len__(self) -> int:
        return int(self.scores_BK.shape[0])

    def take(self, queries: Tensor | slice) -> "TopK":
        """Take the results of the given queries."""
        return TopK(self.scores_BK[queries], self.rows_BK[queries], self.bounds_B[queries])

    def put(self, queries: Tensor, results: "TopK") -> "TopK":
        """The same results but for the given queries, which get `results`."""
        at = queries.to(self.scores_BK.device)
        pairs = ((getattr(self, name), getattr(results, name)) for name in ("scores_BK", "rows_BK", "bounds_B"))
        return TopK(*(old.index_copy(0, at, new) for old, new in pairs))

    def to(self, device: torch.device | str) -> "TopK":
        """The same results on a device."""
        return TopK(self.scores_BK.to(device), self.rows_BK.to(device), self.bounds_B.to(device))

    @property
    def is_proven_B(self) -> Tensor:
        """Whether each list is proven to be the list of exact search."""
        return (self.bounds_B < self.scores_BK[:, -1]) | (self.bounds_B == -torch.inf)

    @property
    def gaps_B(self) -> Tensor:
        """The largest possible excess, for any i, of the i-th true score over the i-th score of the list: 0 where the
        list is proven, +inf where nothing is known."""
        exact_B = self.bounds_B.double() - self.scores_BK[:, -1].double()
        rounded_B = exact_B.float()
        is_short_B = rounded_B.double() < exact_B  # rounded down
        up_B = torch.where(is_short_B, rounded_B.nextafter(torch.full_like(rounded_B, torch.inf)), rounded_B)
        return up_B.clamp_min(0).masked_fill(self.is_proven_B, 0)


def empty_topk(num_queries: int, k: int, device: torch.device | str = "cpu") -> TopK:
    """Empty results: no query has an item yet, and none has been missed."""
    scores_BK = torch.full((num_queries, k), -torch.inf, device=device)
    rows_BK = torch.full((num_queries, k), NO_ITEM, dtype=torch.int64, device=device)
    return TopK(scores_BK, rows_BK, torch.full((num_queries,), -torch.inf, device=device))


def select_topk(scores_BM: Tensor, rows_BM: Tensor, k: int, bounds_B: Tensor | None = None) -> TopK:
    """Select the k best of M candidates, which are different items; a score of -inf marks no candidate.

    Sorting by row first and then, stably, by score makes the order total, so that the result depends neither on
    where a candidate stood nor on which shard it came from.
    """
    rows_BM, by_row_BM = rows_BM.sort(dim=1)
    scores_BM, by_score_BM = scores_BM.gather(1, by_row_BM).sort(dim=1, descending=True, stable=True)
    scores_BK, rows_BK = scores_BM[:, :k], rows_BM.gather(1, by_score_BM[:, :k])
    if bounds_B is None:
        bounds_B = torch.full((len(scores_BM),), -torch.inf, device=scores_BM.device)
    return _padded(TopK(scores_BK, rows_BK.masked_fill(scores_BK == -torch.inf, NO_ITEM), bounds_B), k)


def merge_topk(left: TopK, right: TopK, k: int) -> TopK:
    """Keep the k best of both; the two must cover disjoint items."""
    scores_BM = torch.cat([left.scores_BK, right.scores_BK], dim=1)
    rows_BM = torch.cat([left.rows_BK, right.rows_BK], dim=1)
    return select_topk(scores_BM, rows_BM, k, torch.maximum(left.bounds_B, right.bounds_B))


def concat_queries(parts: list[TopK]) -> TopK:
    """Join the results of consecutive groups of queries."""
    fields = ([getattr(part, name) for part in parts] for name in ("scores_BK", "rows_BK", "bounds_B"))
    return TopK(*(torch.cat(field) for field in fields))


def _padded(topk: TopK, k: int) -> TopK:
    missing = k - topk.scores_BK.shape[1]
    if missing <= 0:
        return topk
    pad = empty_topk(len(topk), missing, topk.scores_BK.device)
    scores_BK = torch.cat([topk.scores_BK, pad.scores_BK.to(topk.scores_BK.dtype)], dim=1)
    return TopK(scores_BK, torch.cat([topk.rows_BK, pad.rows_BK], dim=1), topk.bounds_B)
