"""What may not be shown: a mask over a shard's items and a sparse list of excluded rows per query.

Every rule ends in one of the two. Both act before top-k, so a filtered item never takes a place.
"""

from dataclasses import dataclass

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
        lengths = np.diff(self.offsets)[queries]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        at = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths) + np.repeat(self.offsets[:-1][queries], lengths)
        return Exclusions(offsets, self.rows[at])


def no_exclusions(num_queries: int) -> Exclusions:
    """Nothing is excluded for any query."""
    return Exclusions(np.zeros(num_queries + 1, dtype=np.int64), np.empty(0, dtype=np.int32))


class ShardMask:
    """Both kinds of rules, laid out for one shard and one group of queries."""

    def __init__(self, is_eligible_N: Tensor, first_row: int, excluded: Exclusions) -> None:
        self.num_items = len(is_eligible_N)
        self._is_eligible_N, self._first_row, self._excluded = is_eligible_N, first_row, excluded
        queries = np.repeat(np.arange(len(excluded)), np.diff(excluded.offsets))
        at = excluded.rows.astype(np.int64) - first_row
        inside = (at >= 0) & (at < self.num_items)
        order = np.argsort(at[inside], kind="stable")
        self._at = at[inside][order]
        device = is_eligible_N.device
        self._at_tensor = torch.from_numpy(self._at).to(device)
        self._queries = torch.from_numpy(queries[inside][order]).to(device)
        self._is_ineligible_N = ~is_eligible_N
        self._any_ineligible = bool(self._is_ineligible_N.any())

    def take(self, queries: Tensor) -> "ShardMask":
        """The same for some of the queries."""
        return ShardMask(self._is_eligible_N, self._first_row, self._excluded.take(queries.cpu().numpy()))

    def hide(self, scores_BN: Tensor, low: int) -> Tensor:
        """Set what may not be shown to -inf, in place; the tile's first column is the shard's item `low`."""
        high = low + scores_BN.shape[1]
        if self._any_ineligible:
            scores_BN.masked_fill_(self._is_ineligible_N[low:high], -torch.inf)
        start, stop = np.searchsorted(self._at, [low, high])
        if stop > start:
            scores_BN[self._queries[start:stop], self._at_tensor[start:stop] - low] = -torch.inf
        return scores_BN
