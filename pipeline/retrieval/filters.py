"""What may not be shown: a mask over a shard's items and a sparse list of excluded rows per query.

Every rule ends in one of the two. Both act before top-k, so a filtered item never takes a place.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from pipeline.data.lists import Int64, Lists


@dataclass(frozen=True)
class ShardMask:
    """Both kinds of rules for one shard and B queries; items are numbered within the shard.

    Nobody may be shown what is not eligible, and query b not its own list of `excluded`, which ascends without repeats.
    """

    is_eligible_N: Tensor
    excluded: Lists

    @property
    def num_items(self) -> int:
        return len(self.is_eligible_N)

    def __len__(self) -> int:
        return len(self.excluded)

    def narrow(self, start: int, stop: int) -> "ShardMask":
        """The rules of queries `start` to `stop`."""
        return ShardMask(self.is_eligible_N, self.excluded.narrow(start, stop))

    def take(self, queries: Int64) -> "ShardMask":
        """The rules of the given queries, in the given order; one may be given more than once."""
        return ShardMask(self.is_eligible_N, self.excluded.take(queries))

    def hide(self, scores_BN: Tensor, low: int) -> Tensor:
        """Set what may not be shown to -inf, in place; the tile's first column is the shard's item `low`."""
        high = low + scores_BN.shape[1]
        if self._any_ineligible:
            scores_BN.masked_fill_(~self.is_eligible_N[low:high], -torch.inf)
        items, queries = self._by_item
        start, stop = np.searchsorted(items, [low, high])
        if stop > start:
            cells = (torch.from_numpy(part[start:stop]).to(scores_BN.device) for part in (queries, items - low))
            scores_BN[tuple(cells)] = -torch.inf
        return scores_BN

    @cached_property
    def _any_ineligible(self) -> bool:
        return not bool(self.is_eligible_N.all())

    @cached_property
    def _by_item(self) -> tuple[Int64, Int64]:
        """Excluded items, ascending, and the query of each."""
        order = np.argsort(self.excluded.values, kind="stable")
        return self.excluded.values[order].astype(np.int64), self.excluded.owners[order]


def mask_shard(is_eligible_N: Tensor, first_row: int, excluded: Lists) -> ShardMask:
    """The rules for one shard, whose items have the rows from `first_row` on."""
    return ShardMask(is_eligible_N, excluded.within(first_row, first_row + len(is_eligible_N)).distinct())
