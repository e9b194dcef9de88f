"""What may not be shown: a mask over a shard's items and a sparse list of excluded rows per query.

Every rule ends in one of the two. Both act before top-k, so a filtered item never takes a place.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

IntArray = npt.NDArray[np.int64]
RowArray = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Exclusions:
    """Excluded item rows of B queries: query b's are `rows[offsets[b]:offsets[b + 1]]`, in any order."""

    offsets: IntArray  # (B + 1,)
    rows: RowArray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def narrow(self, start: int, stop: int) -> "Exclusions":
        """The same for queries `start` to `stop`."""
        offsets = self.offsets[start : stop + 1]
        return Exclusions(offsets - offsets[0], self.rows[offsets[0] : offsets[-1]])

    def take(self, queries: IntArray) -> "Exclusions":
        """The same for the given queries, in their order."""
        offsets, at = _taken(self.offsets, queries)
        return Exclusions(offsets, self.rows[at])


def no_exclusions(num_queries: int) -> Exclusions:
    """Nothing is excluded for any query."""
    return Exclusions(np.zeros(num_queries + 1, dtype=np.int64), np.empty(0, dtype=np.int32))


@dataclass(frozen=True)
class ShardMask:
    """Both kinds of rules for one shard and B queries; items are numbered within the shard.

    Query b may not be shown `at[offsets[b]:offsets[b + 1]]`, ascending and without repeats; nobody may be shown what
    is not eligible.
    """

    is_eligible_N: Tensor
    offsets: IntArray  # (B + 1,)
    at: RowArray

    @property
    def num_items(self) -> int:
        return len(self.is_eligible_N)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def narrow(self, start: int, stop: int) -> "ShardMask":
        """The same for queries `start` to `stop`."""
        offsets = self.offsets[start : stop + 1]
        return ShardMask(self.is_eligible_N, offsets - offsets[0], self.at[offsets[0] : offsets[-1]])

    def take(self, queries: IntArray) -> "ShardMask":
        """The same for the given queries, in their order; one may be given more than once."""
        offsets, at = _taken(self.offsets, queries)
        return ShardMask(self.is_eligible_N, offsets, self.at[at])

    def hide(self, scores_BN: Tensor, low: int) -> Tensor:
        """Set what may not be shown to -inf, in place; the tile's first column is the shard's item `low`."""
        high = low + scores_BN.shape[1]
        if self._any_ineligible:
            scores_BN.masked_fill_(~self.is_eligible_N[low:high], -torch.inf)
        at, queries = self._by_item
        start, stop = np.searchsorted(at, [low, high])
        if stop > start:
            places = (torch.from_numpy(part[start:stop]).to(scores_BN.device) for part in (queries, at - low))
            scores_BN[tuple(places)] = -torch.inf
        return scores_BN

    @cached_property
    def _any_ineligible(self) -> bool:
        return not bool(self.is_eligible_N.all())

    @cached_property
    def _by_item(self) -> tuple[IntArray, IntArray]:
        """Excluded items, ascending, and the query of each."""
        queries = np.repeat(np.arange(len(self)), np.diff(self.offsets))
        order = np.argsort(self.at, kind="stable")
        return self.at[order].astype(np.int64), queries[order]


def mask_shard(is_eligible_N: Tensor, first_row: int, excluded: Exclusions) -> ShardMask:
    """The rules for one shard, whose items have the rows from `first_row` on."""
    queries = np.repeat(np.arange(len(excluded)), np.diff(excluded.offsets))
    num_items = len(is_eligible_N)
    at = excluded.rows.astype(np.int64) - first_row
    inside = (at >= 0) & (at < num_items)
    pairs = np.unique(queries[inside] * max(1, num_items) + at[inside])
    counts = np.bincount(pairs // max(1, num_items), minlength=len(excluded))
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return ShardMask(is_eligible_N, offsets, (pairs % max(1, num_items)).astype(np.int32))


def _taken(offsets: IntArray, queries: IntArray) -> tuple[IntArray, IntArray]:
    """Offsets of the given lists put one after the other, and where their entries are."""
    lengths = np.diff(offsets)[queries]
    taken = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    at = np.arange(taken[-1]) - np.repeat(taken[:-1], lengths) + np.repeat(offsets[:-1][queries], lengths)
    return taken, at
