"""Rules about what may be shown: a mask over all items per group of queries, and lists of items per query.

Every rule becomes a mask, a list of excluded items or a list of bonuses. Rules belong to tonight: they come with each
call, and a shard knows none. They act before top-k, so a filtered item never takes a place in a list.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.data.lists import Int64, Lists
from pipeline.retrieval.bonuses import Bonuses


class Masks(Protocol):
    """A mask for each group; a (G, N) tensor is one form of it, masks that are made when they are asked for another."""

    def __getitem__(self, group: int, /) -> Tensor: ...


@dataclass(frozen=True)
class Eligibility:
    """The items that each of G groups of queries may be shown at all; a group may be a market."""

    is_eligible_GN: Masks  # bool, on the CPU, over all items of the index
    group_of_B: Int64


@dataclass(frozen=True)
class Rules:
    """The rules for B queries; items have the rows of the whole index. Without `eligibility` every item is eligible."""

    excluded: Lists  # the items that each query may not be shown, in any order
    eligibility: Eligibility | None = None
    bonuses: Bonuses | None = None
    # (N,) bool, on the CPU: the items that are shown only to queries with a bonus for them. None: no item needs one.
    needs_bonus_N: Tensor | None = None

    def __post_init__(self) -> None:
        if self.bonuses is not None and len(self.bonuses) != len(self.excluded):
            raise ValueError(f"there are bonuses for {len(self.bonuses)} queries, but {len(self.excluded)} queries")

    def __len__(self) -> int:
        return len(self.excluded)

    def parts(self, max_queries: int) -> Iterator[Int64]:
        """Split the query numbers into parts of at most `max_queries`, each of one group."""
        groups = [np.arange(len(self))]
        if self.eligibility is not None:
            group_of_B = self.eligibility.group_of_B
            groups = [np.flatnonzero(group_of_B == group) for group in np.unique(group_of_B)]
        for queries in groups:
            for low in range(0, len(queries), max_queries):
                yield queries[low : low + max_queries]

    def take(self, queries: Int64) -> "Rules":
        """The rules of the given queries, in the given order."""
        eligibility = self.eligibility
        if eligibility is not None:
            eligibility = Eligibility(eligibility.is_eligible_GN, eligibility.group_of_B[queries])
        bonuses = None if self.bonuses is None else self.bonuses.take(queries)
        return Rules(self.excluded.take(queries), eligibility, bonuses, self.needs_bonus_N)

    def for_shard(self, first_row: int, num_items: int) -> "ShardMask":
        """The rules for the shard of items `first_row` to `first_row + num_items`; the queries are of one group.

        Raises ValueError when the eligibility masks end before the shard does.
        """
        end = first_row + num_items
        excluded = self.excluded.within(first_row, end).distinct()
        if self.eligibility is None:
            return ShardMask(num_items, excluded)
        (group,) = np.unique(self.eligibility.group_of_B)
        is_eligible_N = self.eligibility.is_eligible_GN[int(group)]
        if len(is_eligible_N) < end:
            raise ValueError(f"eligibility covers {len(is_eligible_N)} items, but the shard ends at item {end}")
        return ShardMask(num_items, excluded, is_eligible_N[first_row:end])

    def bonuses_for_shard(self, first_row: int, num_items: int) -> Bonuses | None:
        """The bonuses of the shard's items, numbered within the shard; None when there are none.

        Raises ValueError when the bonuses are for fewer items than the shard's last one.
        """
        if self.bonuses is None:
            return None
        bonuses = self.bonuses.within(first_row, first_row + num_items)
        return bonuses if len(bonuses.amounts) else None


@dataclass(frozen=True)
class ShardMask:
    """The rules for one shard and B queries of one group; items are numbered within the shard.

    An ineligible item is hidden from all queries, an excluded item from the query whose list holds it.
    """

    num_items: int
    excluded: Lists  # ascending, without repeats
    is_eligible_N: Tensor | None = None  # bool, on the shard's device; None: every item is eligible

    def __len__(self) -> int:
        return len(self.excluded)

    def to(self, device: torch.device | str) -> "ShardMask":
        """The same rules for a shard on a device."""
        if self.is_eligible_N is None:
            return self
        return ShardMask(self.num_items, self.excluded, self.is_eligible_N.to(device))

    def narrow(self, start: int, stop: int) -> "ShardMask":
        """The rules of queries `start` to `stop`."""
        return ShardMask(self.num_items, self.excluded.narrow(start, stop), self.is_eligible_N)

    def take(self, queries: Int64) -> "ShardMask":
        """The rules of the given queries, in the given order; one may be given more than once."""
        return ShardMask(self.num_items, self.excluded.take(queries), self.is_eligible_N)

    def allows(self, items: Lists) -> npt.NDArray[np.bool_]:
        """Whether the rules let each query be shown each item of its list."""
        is_allowed = ~items.is_in(self.excluded)
        if self.is_eligible_N is not None:
            is_allowed &= self.is_eligible_N.cpu().numpy()[items.values]
        return is_allowed

    def without(self, items: Lists) -> "ShardMask":
        """The same rules, which also hide each query's items in `items`."""
        return ShardMask(self.num_items, self.excluded.union(items), self.is_eligible_N)

    def without_for_all(self, is_hidden_N: Tensor) -> "ShardMask":
        """The same rules, which also hide these items from all queries; (N,) bool, on the mask's device."""
        is_shown_N = ~is_hidden_N if self.is_eligible_N is None else self.is_eligible_N & ~is_hidden_N
        return ShardMask(self.num_items, self.excluded, is_shown_N)

    def hide(self, scores_BN: Tensor, low: int) -> Tensor:
        """Set the scores of hidden items to -inf, in place; the tile's first column is the shard's item `low`."""
        high = low + scores_BN.shape[1]
        if self.is_eligible_N is not None:
            scores_BN.masked_fill_(~self.is_eligible_N[low:high], -torch.inf)
        items, queries = self._by_item
        start, stop = np.searchsorted(items, [low, high])
        if stop > start:
            cells = (torch.from_numpy(part[start:stop]).to(scores_BN.device) for part in (queries, items - low))
            scores_BN[tuple(cells)] = -torch.inf
        return scores_BN

    @cached_property
    def _by_item(self) -> tuple[Int64, Int64]:
        """Excluded items, ascending, and the query of each."""
        order = np.argsort(self.excluded.values, kind="stable")
        return self.excluded.values[order].astype(np.int64), self.excluded.owners[order]
