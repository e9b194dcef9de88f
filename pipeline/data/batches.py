"""Training batches: histories cut into windows, every event but a user's first a target once per epoch."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from pipeline.data.lists import PADDING, Int32, Int64, Sequences, offsets_of, ranges


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
        np.concatenate(
            [np.empty(0, np.int64), *(part.starts + shift for part, shift in zip(found, shifts, strict=False))]
        ),
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


@dataclass(frozen=True)
class ValidationUsers:
    """Users with what training saw of them and the later items, new to them, that a good model ranks high."""

    user_keys: Int64
    histories: Sequences
    held_out: Sequences

    def __len__(self) -> int:
        return len(self.user_keys)

    def take(self, chosen: Int64) -> "ValidationUsers":
        return ValidationUsers(self.user_keys[chosen], _take(self.histories, chosen), _take(self.held_out, chosen))

    def tiles(self, size: int) -> Iterator["ValidationUsers"]:
        """The users in runs of at most `size`."""
        for first in range(0, len(self), size):
            yield self.take(np.arange(first, min(first + size, len(self))))


def validation_users(histories: Sequences, held_out: Sequences, user_keys: Int64) -> ValidationUsers:
    """Those users that have a history and, after it, an item that is not in it; seen held-out items are left out."""
    stride = int(max(histories.item_rows.max(initial=0), held_out.item_rows.max(initial=0))) + 1
    is_new = ~np.isin(_codes(held_out, stride), _codes(histories, stride))
    owner = np.repeat(np.arange(len(user_keys)), held_out.lengths)
    num_new = np.bincount(owner[is_new], minlength=len(user_keys)).astype(np.int64)
    new = Sequences(offsets_of(num_new), held_out.item_rows[is_new])
    return ValidationUsers(user_keys, histories, new).take(np.flatnonzero((num_new > 0) & (histories.lengths > 0)))


def join_validation_users(parts: Iterable[ValidationUsers]) -> ValidationUsers:
    """The users of several buckets as one."""
    found = list(parts)
    keys = np.concatenate([np.empty(0, np.int64), *(part.user_keys for part in found)])
    return ValidationUsers(keys, _join(p.histories for p in found), _join(p.held_out for p in found))


def sample_users(users: ValidationUsers, share: float, seed: int) -> ValidationUsers:
    """About this share of the users, chosen by key alone: the same ones however the users are spread over ranks."""
    noise = (users.user_keys.astype(np.uint64) + np.uint64(seed)) * np.uint64(0x9E3779B97F4A7C15)
    noise = (noise ^ (noise >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    return users.take(np.flatnonzero((noise >> np.uint64(11)).astype(np.float64) < share * 2.0**53))


def _codes(sequences: Sequences, stride: int) -> Int64:
    """One number for each (sequence, item row)."""
    owner = np.repeat(np.arange(len(sequences.lengths), dtype=np.int64), sequences.lengths)
    return owner * stride + sequences.item_rows


def _take(sequences: Sequences, chosen: Int64) -> Sequences:
    lengths = sequences.lengths[chosen]
    return Sequences(offsets_of(lengths), sequences.item_rows[ranges(sequences.offsets[:-1][chosen], lengths)])


def _join(parts: Iterable[Sequences]) -> Sequences:
    found = list(parts)
    lengths = np.concatenate([np.empty(0, np.int64), *(part.lengths for part in found)])
    return Sequences(offsets_of(lengths), np.concatenate([np.empty(0, np.int32), *(part.item_rows for part in found)]))
