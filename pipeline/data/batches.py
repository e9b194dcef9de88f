"""Training batches: histories cut into windows, every event but a user's first a target once per epoch."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.data.interactions import PADDING, Int32, Int64, Sequences, ranges


@dataclass(frozen=True)
class Windows:
    """Runs of at most max_length + 1 consecutive events of one user: all but the last are read, all but the first
    predicted. Window w is `item_rows[starts[w] : starts[w] + lengths[w]]`, of the user `user_keys[w]`."""

    item_rows: Int32
    starts: Int64
    lengths: Int64
    user_keys: Int64

    @property
    def num_targets(self) -> int:
        return int(self.lengths.sum()) - len(self.lengths)

    def __len__(self) -> int:
        return len(self.starts)


@dataclass(frozen=True)
class SequenceBatch:
    """(B, L) events that the encoder reads and, at the same place, the event that follows each; -1 pads the right."""

    item_rows_BL: Int32
    targets_BL: Int32
    user_keys_B: Int64


def cut_windows(sequences: Sequences, user_keys: Int64, max_length: int) -> Windows:
    """Cut each history from its end, so that its last window is as full as the history that a search will read.

    Users with fewer than two events give none.
    """
    num_targets = np.maximum(sequences.lengths - 1, 0)
    num_windows = -(-num_targets // max_length)
    user = np.repeat(np.arange(len(num_targets)), num_windows)
    windows_after = np.repeat(np.cumsum(num_windows), num_windows) - np.arange(len(user)) - 1
    stops = sequences.offsets[1:][user] - windows_after * max_length
    starts = np.maximum(stops - max_length - 1, sequences.offsets[:-1][user])
    return Windows(sequences.item_rows, starts, stops - starts, user_keys[user])


def join_windows(parts: Iterable[Windows]) -> Windows:
    """The windows of several buckets as one."""
    found = list(parts)
    shifts = np.cumsum([0, *(len(part.item_rows) for part in found)])
    return Windows(
        np.concatenate([np.empty(0, np.int32), *(part.item_rows for part in found)]),
        np.concatenate([np.empty(0, np.int64), *(part.starts + shift for part, shift in zip(found, shifts, strict=False))]),
        np.concatenate([np.empty(0, np.int64), *(part.lengths for part in found)]),
        np.concatenate([np.empty(0, np.int64), *(part.user_keys for part in found)]),
    )


def num_steps(num_windows_by_rank: Iterable[int], batch_size: int) -> int:
    """Steps of an epoch: as many as the rank with the most windows needs for batches of at most `batch_size`."""
    return -(-max(num_windows_by_rank) // batch_size)


def epoch_batches(windows: Windows, steps: int, seed: int, epoch: int, rank: int) -> Iterator[SequenceBatch]:
    """All windows of this rank in a new order, spread evenly over exactly `steps` batches (some may be empty).

    The order depends on (seed, epoch, rank) alone: a resumed run sees what an uninterrupted one would.
    """
    order = np.random.default_rng((seed, epoch, rank)).permutation(len(windows))
    for chosen in np.array_split(order, steps):
        yield _batch(windows, chosen)


def _batch(windows: Windows, chosen: Int64) -> SequenceBatch:
    lengths = windows.lengths[chosen] - 1
    shape = (len(chosen), int(lengths.max(initial=0)))
    inputs_BL, targets_BL = np.full(shape, PADDING, np.int32), np.full(shape, PADDING, np.int32)
    is_event_BL = np.arange(shape[1]) < lengths[:, None]
    at = ranges(windows.starts[chosen], lengths)
    inputs_BL[is_event_BL] = windows.item_rows[at]
    targets_BL[is_event_BL] = windows.item_rows[at + 1]
    return SequenceBatch(inputs_BL, targets_BL, windows.user_keys[chosen])
