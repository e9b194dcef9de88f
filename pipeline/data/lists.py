"""Ragged arrays: one list of item rows per owner, a user or a query, all in one array."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]

NO_ITEM = -1  # pads lists of item rows in a rectangular array

EventColumn = Literal["times", "weights"]
Columns = Mapping[EventColumn, Int64 | Float32]


@dataclass(frozen=True)
class Lists:
    """The list of owner b is `values[offsets[b]:offsets[b + 1]]`. Values are item rows: not negative.

    Where the values are events, `columns` may hold more of each: times in µs since 1970 UTC, weights. What keeps the
    order of the values keeps their columns; `distinct`, `union` and `within` give lists without columns.
    """

    offsets: Int64  # one more than there are owners; begins with 0
    values: Int32
    columns: Columns = field(default_factory=dict)

    @staticmethod
    def of(lists: Iterable[npt.ArrayLike]) -> "Lists":
        """Make an owner for each of the given lists."""
        arrays = [np.asarray(each, dtype=np.int32) for each in lists]
        lengths = np.array([len(each) for each in arrays], dtype=np.int64)
        return Lists(offsets_of(lengths), np.concatenate([np.empty(0, np.int32), *arrays]))

    @staticmethod
    def empty(num_owners: int) -> "Lists":
        """Make an empty list for each owner."""
        return Lists(np.zeros(num_owners + 1, np.int64), np.empty(0, np.int32))

    @staticmethod
    def concat(parts: Iterable["Lists"]) -> "Lists":
        """Join the owners of all parts, one part after the other. All parts have the same columns."""
        all_parts = list(parts)
        lengths = np.concatenate([np.empty(0, np.int64), *(part.lengths for part in all_parts)])
        values = np.concatenate([np.empty(0, np.int32), *(part.values for part in all_parts)])
        names = all_parts[0].columns if all_parts else ()
        columns = {name: np.concatenate([part.columns[name] for part in all_parts]) for name in names}
        return Lists(offsets_of(lengths), values, columns)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, owner: int) -> Int32:
        return self.values[self.offsets[owner] : self.offsets[owner + 1]]

    @property
    def lengths(self) -> Int64:
        return np.diff(self.offsets)

    @property
    def owners(self) -> Int64:
        """The owner of each value."""
        return np.repeat(np.arange(len(self)), self.lengths)

    def take(self, owners: Int64) -> "Lists":
        """The lists of the given owners, in the given order; owner -1 has an empty list."""
        lengths = np.where(owners >= 0, self.offsets[owners + 1] - self.offsets[owners], 0)
        return self.runs(self.offsets[owners], lengths)

    def runs(self, starts: Int64, lengths: Int64) -> "Lists":
        """The runs of values that begin at these places, one list for each."""
        return self._at(offsets_of(lengths), ranges(starts, lengths))

    def narrow(self, start: int, stop: int) -> "Lists":
        """The lists of owners `start` to `stop`, without a copy of the values."""
        offsets = self.offsets[start : stop + 1]
        return self._at(offsets - offsets[0], slice(offsets[0], offsets[-1]))

    def where(self, is_kept: npt.NDArray[np.bool_]) -> "Lists":
        """Keep only the marked values of each owner, in their order."""
        kept_before = np.concatenate([[0], np.cumsum(is_kept)])
        return self._at(kept_before[self.offsets], is_kept)

    def within(self, low: int, high: int) -> "Lists":
        """Keep the values from `low` to `high`, and subtract `low`."""
        kept = self.where((self.values >= low) & (self.values < high))
        return Lists(kept.offsets, (kept.values - low).astype(np.int32))

    def distinct(self) -> "Lists":
        """Sort each list in ascending order, without repeats."""
        span = _span(self)
        codes = np.sort(self._codes(span), kind="stable")  # np.unique hashes: many times slower on nearly sorted lists
        codes = codes[np.diff(codes, prepend=-1) > 0]
        lengths = np.bincount(codes // span, minlength=len(self)).astype(np.int64)
        return Lists(offsets_of(lengths), (codes % span).astype(np.int32))

    def union(self, others: "Lists") -> "Lists":
        """The values that the same owner has in either, in ascending order and without repeats."""
        owners = np.concatenate([self.owners, others.owners])
        order = np.argsort(owners, kind="stable")
        values = np.concatenate([self.values, others.values])[order]
        return Lists(self.offsets + others.offsets, values).distinct()

    def minus(self, others: "Lists") -> "Lists":
        """Remove the values that the same owner has in `others`; the order stays."""
        return self.where(~self.is_in(others))

    def is_in(self, others: "Lists") -> npt.NDArray[np.bool_]:
        """Whether the same owner has each value in `others`."""
        span = max(_span(self), _span(others))
        return np.isin(self._codes(span), others._codes(span))

    def last(self, n: int) -> tuple[Int32, Int32]:
        """(owners, n): the last `n` values of each list, padded with NO_ITEM at the right, and how many there are."""
        lengths = np.minimum(self.lengths, n)
        rows = np.full((len(self), n), NO_ITEM, dtype=np.int32)
        rows[np.arange(n) < lengths[:, None]] = self.values[ranges(self.offsets[1:] - lengths, lengths)]
        return rows, lengths.astype(np.int32)

    def last_columns(self, n: int) -> Columns:
        """(owners, n) each: the columns of the last `n` values of each list, padded with 0 at the right."""
        lengths = np.minimum(self.lengths, n)
        chosen, is_value = ranges(self.offsets[1:] - lengths, lengths), np.arange(n) < lengths[:, None]
        return {name: _filled(is_value, column[chosen]) for name, column in self.columns.items()}

    def _at(self, offsets: Int64, places: Int64 | npt.NDArray[np.bool_] | slice) -> "Lists":
        """New lists of the values at these places, with their columns."""
        columns = {name: column[places] for name, column in self.columns.items()}
        return Lists(offsets, self.values[places], columns)

    def _codes(self, span: int) -> Int64:
        """One number for each pair of an owner and a value below `span`."""
        return self.owners * span + self.values


def offsets_of(lengths: Int64) -> Int64:
    """Offsets of consecutive runs of these lengths: where each run begins, and where the last one ends."""
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def ranges(starts: Int64, lengths: Int64) -> Int64:
    """`starts[0], starts[0] + 1, …` for `lengths[0]` numbers, then the same for the next run, in one array."""
    shifts = starts - offsets_of(lengths)[:-1]
    return np.repeat(shifts, lengths) + np.arange(lengths.sum(), dtype=np.int64)


def _filled(is_value: npt.NDArray[np.bool_], values: Int64 | Float32) -> Int64 | Float32:
    """The values, row by row, in the marked cells of a rectangle; 0 in the others."""
    cells = np.zeros(is_value.shape, values.dtype)
    cells[is_value] = values
    return cells


def _span(lists: Lists) -> int:
    return 1 + int(lists.values.max(initial=0))
