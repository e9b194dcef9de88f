"""Ragged arrays: one list of item rows per user."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int32 = npt.NDArray[np.int32]


Int64 = npt.NDArray[np.int64]


Float32 = npt.NDArray[np.float32]


PADDING = -1


@dataclass(frozen=True)
class Sequences:
    """Item rows by user, in the order of the events: user u has `item_rows[offsets[u]:offsets[u + 1]]`."""

    offsets: Int64
    item_rows: Int32

    @property
    def lengths(self) -> Int64:
        return np.diff(self.offsets)

    def last(self, n: int) -> tuple[Int32, Int32]:
        """The last `n` events of each user, oldest first, as (users, n) rows with -1 to the right of them, and the
        number of events in each row."""
        lengths = np.minimum(self.lengths, n)
        rows = np.full((len(lengths), n), PADDING, dtype=np.int32)
        kept = np.arange(n) < lengths[:, None]
        rows[kept] = self.item_rows[ranges(self.offsets[1:] - lengths, lengths)]
        return rows, lengths.astype(np.int32)


def offsets_of(lengths: Int64) -> Int64:
    """Where each of consecutive runs of these lengths begins, and where the last one ends."""
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def ranges(starts: Int64, lengths: Int64) -> Int64:
    """`starts[0], starts[0] + 1, …` for `lengths[0]` numbers, then the same for the next run, in one array."""
    shifts = starts - offsets_of(lengths)[:-1]
    return np.repeat(shifts, lengths) + np.arange(lengths.sum(), dtype=np.int64)
