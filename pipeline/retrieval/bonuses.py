"""Bonuses: numbers that are added to the MoL scores of single items, for single queries. B queries, M bonuses.

A published score is the float64 MoL score rounded to float32, plus the bonus, rounded to float32 once more. So the two
parts of a score add up to it in float32, bit for bit, and a bonus of 0 changes no score.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from pipeline.data.lists import NO_ITEM, Float32, Int64, Lists, offsets_of, ranges


@dataclass(frozen=True)
class Bonuses:
    """The bonuses of B queries, of either sign: item `rows.values[i]` gets `amounts[i]`.

    The rules win: a bonus does not show an item that they hide. Raises ValueError for a row that is not one of the
    `num_items` items, for rows of a query that do not ascend or repeat, and for an amount that is not finite.
    """

    rows: Lists
    amounts: Float32
    num_items: int  # of the whole index, or of the shard

    def __post_init__(self) -> None:
        rows, owners = self.rows.values, self.rows.owners
        if len(self.amounts) != len(rows):
            raise ValueError(f"there are {len(self.amounts)} amounts for {len(rows)} items with a bonus")
        is_outside = (rows < 0) | (rows >= self.num_items)
        if is_outside.any():
            row = rows[is_outside.argmax()]
            raise ValueError(f"query {owners[is_outside.argmax()]} has a bonus for row {row} of {self.num_items} items")
        is_late = (rows[1:] <= rows[:-1]) & (owners[1:] == owners[:-1])
        if is_late.any():
            query = owners[is_late.argmax()]
            raise ValueError(f"the rows with a bonus of query {query} do not ascend; sort them, and give each row once")
        is_finite = np.isfinite(self.amounts)
        if not is_finite.all():
            first = is_finite.argmin()
            raise ValueError(f"query {owners[first]} has a bonus of {self.amounts[first]} for row {rows[first]}")

    @staticmethod
    def none(num_queries: int, num_items: int) -> "Bonuses":
        """No bonus for any of the queries."""
        return Bonuses(Lists.empty(num_queries), np.empty(0, np.float32), num_items)

    @staticmethod
    def concat(parts: Iterable["Bonuses"]) -> "Bonuses":
        """Join the queries of one or more parts over the same items, one part after the other."""
        all_parts = list(parts)
        (num_items,) = {part.num_items for part in all_parts}
        amounts = np.concatenate([part.amounts for part in all_parts])
        return Bonuses(Lists.concat(part.rows for part in all_parts), amounts, num_items)

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, queries: Int64) -> "Bonuses":
        """The bonuses of the given queries, in the given order."""
        lengths = self.rows.lengths[queries]
        chosen = ranges(self.rows.offsets[queries], lengths)
        return Bonuses(Lists(offsets_of(lengths), self.rows.values[chosen]), self.amounts[chosen], self.num_items)

    def where(self, is_kept: npt.NDArray[np.bool_]) -> "Bonuses":
        """Keep only the marked bonuses."""
        return Bonuses(self.rows.where(is_kept), self.amounts[is_kept], self.num_items)

    def within(self, low: int, high: int) -> "Bonuses":
        """Keep the bonuses of the items `low` to `high`, and subtract `low`. Raises ValueError for unknown items."""
        if high > self.num_items:
            raise ValueError(f"bonuses are for {self.num_items} items, but the shard ends at item {high}")
        is_kept = (self.rows.values >= low) & (self.rows.values < high)
        return Bonuses(self.rows.within(low, high), self.amounts[is_kept], high - low)

    def as_tensors(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """(B, M) items (int64, padded with NO_ITEM) and amounts (float32, padded with 0); M is the longest list."""
        lengths = self.rows.lengths
        is_item_BM = np.arange(lengths.max(initial=0)) < lengths[:, None]
        at_BM = np.full(is_item_BM.shape, NO_ITEM, dtype=np.int64)
        amounts_BM = np.zeros(is_item_BM.shape, dtype=np.float32)
        at_BM[is_item_BM], amounts_BM[is_item_BM] = self.rows.values, self.amounts
        return torch.from_numpy(at_BM).to(device), torch.from_numpy(amounts_BM).to(device)
