"""Training batches: histories cut into windows; every event but a user's first is a target once per epoch, unless its
weight is 0."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from pipeline.data.lists import NO_ITEM, Columns, Float32, Int32, Int64, Lists, ranges


@dataclass(frozen=True)
class Windows:
    """Runs of at most max_length + 1 consecutive events of one user: all but the last event are read, all but the
    first predicted."""

    events: Lists
    weights: Float32  # of each event as a target, all finite; an event of weight 0 is read, but never a target
    user_keys: Int64  # the user of each run
    users: Int64  # the user's place in `own`
    own: Lists  # the distinct items of each user that are hidden from them, in ascending order

    @property
    def num_targets(self) -> int:
        return int(self.targets_per_window.sum())

    @property
    def targets_per_window(self) -> Int64:
        is_target = self.weights > 0
        is_target[self.events.offsets[:-1]] = False  # the first event of a run is only read
        before = np.concatenate([[0], np.cumsum(is_target)])
        return np.diff(before[self.events.offsets])

    def __len__(self) -> int:
        return len(self.events)

    def take(self, chosen: Int64) -> "Windows":
        """The chosen runs, in the given order."""
        events = self.events.take(chosen)
        weights = self.weights[ranges(self.events.offsets[chosen], events.lengths)]
        return Windows(events, weights, self.user_keys[chosen], self.users[chosen], self.own)


@dataclass(frozen=True)
class SequenceBatch:
    """(B, L) events that the encoder reads and, in the same cell, the event that follows each; -1 pads the right.

    A cell without a target may hold an event: the one that follows has weight 0.
    """

    item_rows_BL: Int32
    targets_BL: Int32
    weights_BL: Float32  # of the targets; 0 where there is none
    user_keys_B: Int64
    own: Lists  # the distinct items that are hidden from each sequence's user, in ascending order
    columns: Columns = field(default_factory=dict)  # (B, L) each, of the events that are read; 0 pads the right


def cut_windows(
    histories: Lists, user_keys: Int64, max_length: int, weights: Float32 | None = None, seen: Lists | None = None
) -> Windows:
    """Cut each history from its end, so that its last window is as full as the history that a search will read.

    `weights` has one number for each event of the histories; without it all events weigh 1. `seen` are the items that
    each user is not shown; without it those of the history. Windows without a target are left out.
    """
    weights = np.ones(len(histories.values), np.float32) if weights is None else weights
    num_targets = np.maximum(histories.lengths - 1, 0)
    num_windows = -(-num_targets // max_length)
    user = np.repeat(np.arange(len(histories)), num_windows)
    windows_after = np.repeat(np.cumsum(num_windows), num_windows) - np.arange(len(user)) - 1
    stops = histories.offsets[1:][user] - windows_after * max_length
    starts = np.maximum(stops - max_length - 1, histories.offsets[:-1][user])
    lists = histories.runs(starts, stops - starts)
    own = histories.distinct() if seen is None else seen
    windows = Windows(lists, weights[ranges(starts, stops - starts)], user_keys[user], user, own)
    return windows.take(np.flatnonzero(windows.targets_per_window))


def join_windows(parts: Iterable[Windows]) -> Windows:
    """The windows of several buckets as one."""
    all_parts = list(parts)
    keys = np.concatenate([np.empty(0, np.int64), *(part.user_keys for part in all_parts)])
    firsts = np.cumsum([0, *(len(part.own) for part in all_parts)])
    users = [np.empty(0, np.int64), *(part.users + first for part, first in zip(all_parts, firsts, strict=False))]
    own = Lists.concat(part.own for part in all_parts)
    weights = np.concatenate([np.empty(0, np.float32), *(part.weights for part in all_parts)])
    return Windows(Lists.concat(part.events for part in all_parts), weights, keys, np.concatenate(users), own)


def num_steps(num_targets_by_rank: Iterable[int], batch_positions: int) -> int:
    """Steps of an epoch: as many as the rank with the most targets needs for batches of about `batch_positions`."""
    return -(-max(num_targets_by_rank) // batch_positions)


def epoch_batches(
    windows: Windows, steps: int, seed: int, epoch: int, rank: int, first: int = 0, last: int | None = None
) -> Iterator[SequenceBatch]:
    """All windows of this rank in a new order, in exactly `steps` batches of about as many targets each.

    Some batches may be empty. Those from `first` to `last` (exclusive) are made. The order depends on (seed, epoch,
    rank) alone: a resumed run sees what an uninterrupted one would.
    """
    order = np.random.default_rng((seed, epoch, rank)).permutation(len(windows))
    ends = np.cumsum(windows.targets_per_window[order])
    # Batch i takes the windows whose middle target lies in the i-th of `steps` equal parts of all targets.
    middles = ends - windows.targets_per_window[order] / 2
    bounds = np.searchsorted(middles, np.arange(steps + 1) * (ends[-1] / steps if len(ends) else 0.0))
    for step in range(steps)[first:last]:
        yield _batch(windows, order[bounds[step] : bounds[step + 1]])


def _batch(windows: Windows, chosen: Int64) -> SequenceBatch:
    """The chosen windows, longest first."""
    lengths = windows.events.lengths[chosen] - 1
    by_length = np.argsort(-lengths, kind="stable")
    chosen, lengths = chosen[by_length], lengths[by_length]
    shape = (len(chosen), int(lengths.max(initial=0)))
    inputs_BL, targets_BL = np.full(shape, NO_ITEM, np.int32), np.full(shape, NO_ITEM, np.int32)
    weights_BL = np.zeros(shape, np.float32)
    is_event_BL = np.arange(shape[1]) < lengths[:, None]
    read = ranges(windows.events.offsets[chosen], lengths)
    inputs_BL[is_event_BL] = windows.events.values[read]
    weights_BL[is_event_BL] = windows.weights[read + 1]
    targets_BL[is_event_BL] = np.where(windows.weights[read + 1] > 0, windows.events.values[read + 1], NO_ITEM)
    own = windows.own.take(windows.users[chosen])
    columns = windows.events.runs(windows.events.offsets[chosen], lengths).last_columns(shape[1])
    return SequenceBatch(inputs_BL, targets_BL, weights_BL, windows.user_keys[chosen], own, columns)


@dataclass(frozen=True)
class ValidationUsers:
    """Users whose histories training has seen, what is hidden from them, and the later items that a good model ranks
    high."""

    user_keys: Int64
    histories: Lists
    seen: Lists  # the distinct items that are not shown to each user, in ascending order
    held_out: Lists

    def __len__(self) -> int:
        return len(self.user_keys)

    def take(self, chosen: Int64) -> "ValidationUsers":
        lists = (each.take(chosen) for each in (self.histories, self.seen, self.held_out))
        return ValidationUsers(self.user_keys[chosen], *lists)

    def tiles(self, size: int) -> Iterator["ValidationUsers"]:
        """The users in runs of at most `size`."""
        for first in range(0, len(self), size):
            yield self.take(np.arange(first, min(first + size, len(self))))


def validation_users(histories: Lists, held_out: Lists, user_keys: Int64, seen: Lists | None = None) -> ValidationUsers:
    """The users that have a history and, after it, an item that may be shown to them.

    `seen` are the items that each user is not shown, without which they are those of the history; such held-out items
    are left out.
    """
    seen = histories.distinct() if seen is None else seen
    to_find = held_out.distinct().minus(seen)
    chosen = np.flatnonzero((to_find.lengths > 0) & (histories.lengths > 0))
    return ValidationUsers(user_keys, histories, seen, to_find).take(chosen)


def join_validation_users(parts: Iterable[ValidationUsers]) -> ValidationUsers:
    """The users of several buckets as one."""
    all_parts = list(parts)
    keys = np.concatenate([np.empty(0, np.int64), *(part.user_keys for part in all_parts)])
    histories = Lists.concat(part.histories for part in all_parts)
    seen = Lists.concat(part.seen for part in all_parts)
    return ValidationUsers(keys, histories, seen, Lists.concat(part.held_out for part in all_parts))


def sample_users(users: ValidationUsers, share: float, seed: int) -> ValidationUsers:
    """Choose about this share of the users, by key alone: the same users however they are spread over ranks."""
    noise = (users.user_keys.astype(np.uint64) + np.uint64(seed)) * np.uint64(0x9E3779B97F4A7C15)
    noise = (noise ^ (noise >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    return users.take(np.flatnonzero((noise >> np.uint64(11)).astype(np.float64) < share * 2.0**53))
