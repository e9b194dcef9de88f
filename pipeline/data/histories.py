"""Histories in memory: one bucket of users, and the parts of their histories that a step may see."""

import zlib
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.lists import EventColumn, Float32, Int32, Int64, Lists, offsets_of, ranges
from pipeline.data.seen import Codes, hides_in


@dataclass(frozen=True)
class Bucket:
    """The histories of one user bucket. Users ascend by id; the events of user u, oldest first, are at
    `offsets[u]:offsets[u + 1]`: the first `num_train[u]` for training, the next `num_validation[u]` for model
    selection, the rest for the test. `event_ts` is in µs since 1970 UTC."""

    user_ids: pa.Array  # string or int64
    offsets: Int64
    item_rows: Int32
    event_ts: Int64
    weights: Float32
    hides: Codes  # in which parts an event hides its item from the user (`pipeline.data.seen`)
    num_train: Int32
    num_validation: Int32
    left_out: pa.Array  # string: why the user gets no list; "" for everybody else
    also_seen: Lists  # items of events that were set aside: nothing is learned from them, and they are not shown again

    @property
    def num_users(self) -> int:
        return len(self.user_ids)

    @property
    def user_keys(self) -> Int64:
        """A number for each user that never changes: the id itself, or the crc32 of a string id."""
        if pa.types.is_integer(self.user_ids.type):
            keys: Int64 = self.user_ids.to_numpy(zero_copy_only=False).astype(np.int64)
            return keys
        return _checksums(self.user_ids)

    def cut(self, part: str, reads: frozenset[EventColumn] = frozenset()) -> Lists:
        """The history visible in `part`: train, before_test (train and validation), or whole; else KeyError.

        Its columns are those named in `reads`.
        """
        return self._events(self.offsets[:-1], self._num_visible(part), reads)

    def events_of(self, part: str) -> Int64:
        """The numbers of the events of `cut(part)`, in their order: indices into `event_ts` and `weights`."""
        return ranges(self.offsets[:-1], self._num_visible(part))

    def seen(self, part: str) -> Lists:
        """The items, distinct, that a user who has the history `cut(part)` is not shown."""
        return self.cut(part).where(hides_in(self.hides[self.events_of(part)], part)).union(self.also_seen)

    def first_test_event(self) -> Int64:
        """(U,) the time of each user's first test event; of a user without one, any."""
        first = self.offsets[:-1] + self.num_train + self.num_validation
        times: Int64 = np.append(self.event_ts, 0)[first]
        return times

    def held_out(self, part: str) -> Lists:
        """The events of a weight above 0 that `part`, validation or test, holds out; else KeyError."""
        after_train = self.offsets[:-1] + self.num_train
        after_validation = after_train + self.num_validation
        if part == "validation":
            return self._weighing(after_train, self.num_validation.astype(np.int64))
        if part == "test":
            return self._weighing(after_validation, self.offsets[1:] - after_validation)
        raise KeyError(part)

    def _num_visible(self, part: str) -> Int64:
        visible = {
            "train": self.num_train.astype(np.int64),
            "before_test": self.num_train.astype(np.int64) + self.num_validation,
            "whole": np.diff(self.offsets),
        }[part]
        return np.asarray(visible)

    def _events(self, starts: Int64, lengths: Int64, reads: frozenset[EventColumn] = frozenset()) -> Lists:
        chosen = ranges(starts, lengths)
        columns: dict[EventColumn, Int64 | Float32] = {}
        if "times" in reads:
            columns["times"] = self.event_ts[chosen]
        if "weights" in reads:
            columns["weights"] = self.weights[chosen]
        return Lists(offsets_of(lengths), self.item_rows[chosen], columns)

    def _weighing(self, starts: Int64, lengths: Int64) -> Lists:
        """The items of each user's events from `starts` on that have a weight above 0."""
        return self._events(starts, lengths).where(self.weights[ranges(starts, lengths)] > 0)


def user_bucket(user_ids: pa.Array, num_buckets: int) -> Int32:
    """The bucket of each user: crc32 of the id, written as text in UTF-8, modulo `num_buckets`.

    Any language can repeat it. Ids must not be null.
    """
    return (_checksums(user_ids) % num_buckets).astype(np.int32)


def _checksums(ids: pa.Array) -> Int64:
    """crc32 of each id as text; every distinct id is hashed once."""
    distinct = pc.dictionary_encode(ids.combine_chunks() if isinstance(ids, pa.ChunkedArray) else ids)
    hashed = [zlib.crc32(str(value).encode()) for value in distinct.dictionary.to_pylist()]
    checksums: Int64 = np.array(hashed, dtype=np.int64)[distinct.indices.to_numpy(zero_copy_only=False)]
    return checksums
