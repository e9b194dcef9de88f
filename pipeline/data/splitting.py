"""Clean one user bucket: drop repeated events and bots, put events in order, and cut off the held-out parts."""

from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.cleaning import BOT, ORPHAN, rejected_table
from pipeline.data.columns import DAY_US, Mask, mask_of, numpy_of
from pipeline.data.days import NEVER, day_numbers, midnight
from pipeline.data.histories import Bucket
from pipeline.data.lists import Float32, Int32, Int64, Lists, offsets_of
from pipeline.data.period import begin
from pipeline.data.seen import SeenRule, hiding_codes
from pipeline.settings import SplitSettings

REUSED = "reused_event_ids"


@dataclass(frozen=True)
class SplitTimes:
    """A split by time, in µs: validation is `validation <= event_ts < test`, the test is everything from `test` on."""

    validation: int
    test: int

    @classmethod
    def of(cls, split: SplitSettings, ds: date, zone: str) -> "SplitTimes":
        """The last `test_days` ending with `ds` are the test, the `validation_days` before them the validation."""
        test = ds - timedelta(days=split.test_days - 1)
        return cls(midnight(test - timedelta(days=split.validation_days), zone), midnight(test, zone))


@dataclass(frozen=True)
class CleanBucket:
    """A cleaned bucket, how many rows were left out of it by reason, and examples of these rows."""

    bucket: Bucket
    counts: dict[str, int]  # rows_in = kept + duplicates + item_id_orphan + bot_events; and bot_users, reused_event_ids
    rejected: pa.Table


def clean_bucket(
    events: pa.Table,
    seen: pa.Table,
    item_ids: pa.Array,
    split: SplitSettings,
    ds: date,
    zone: str,
    rule: SeenRule,
    max_user_events_per_day: int,
) -> CleanBucket:
    """Make the histories of one bucket's users from their clean rows, which are in the order of the log.

    `seen` has the users and items of rows that are set aside and count as seen; `rule` says which of the others hide
    their items from their users. `item_ids` are all items in ascending
    order: an id's position is its item row. Two rows are one event when they have the same user, item and time, and the
    same `event_id` or, without one, the same type; the first stays. Days begin at midnight in `zone`.
    The bucket also has the users of whom all rows are set aside: they have seen these items, and no history.
    A user's events are in order of `event_ts`; of equal times, the one that comes first in the log (by key of its
    file, then by row) comes first. A bot is a user without events, whose `left_out` says so.
    """
    first, num_reused = _first_deliveries(events)
    duplicates = int((~first).sum())
    events = events.filter(pa.array(first))
    item_rows = rows_of(events["item_id"], item_ids)
    known = item_rows >= 0
    orphans = _reject(events, np.flatnonzero(~known), ORPHAN)
    num_orphans = int((~known).sum())
    events, item_rows = events.filter(pa.array(known)), item_rows[known]

    user_ids, users = _users_of(events["user_id"], seen["user_id"])
    times: Int64 = numpy_of(events["event_ts"])
    is_bot = _bots(users, day_numbers(times, zone), len(user_ids), max_user_events_per_day)
    of_bots = is_bot[users]
    bots = _reject(events, _first_of_each_user(users, of_bots), BOT)
    order = np.lexsort((times, users))  # stable: of equal times, the first in the log stays first
    order = order[~of_bots[order]]
    reasons = pa.array(["", f"taken for a bot: over {max_user_events_per_day} events on a day"])
    left_out = reasons.take(pa.array(is_bot.astype(np.int8)))
    weights, hides = numpy_of(events["weight"])[order], rule.has_type(events["event_type"])[order]
    kept = _Events(users[order], item_rows[order], times[order], weights, hides)
    also_seen = _items_of_users(seen, user_ids, item_ids)
    bucket = _cut(user_ids, left_out, kept, also_seen, split, ds, zone, rule)
    counts = {
        "kept": len(order),
        "duplicates": duplicates,
        REUSED: num_reused,
        ORPHAN: num_orphans,
        "bot_events": int(of_bots.sum()),
        "bot_users": int(is_bot.sum()),
    }
    return CleanBucket(bucket, counts, pa.concat_tables([orphans, bots]))


def rows_of(ids: pa.ChunkedArray, item_ids: pa.Array) -> Int32:
    """The item row of each id, its position in `item_ids`; -1 for an unknown id.

    Hashes the distinct ids of the events, which are fewer than the items, and looks up each item among them.
    """
    encoded = pc.dictionary_encode(ids.combine_chunks())
    distinct_of_item = pc.index_in(item_ids, value_set=encoded.dictionary)
    known = np.flatnonzero(mask_of(pc.is_valid(distinct_of_item)))
    row_of_distinct = np.full(len(encoded.dictionary), -1, dtype=np.int32)
    row_of_distinct[numpy_of(distinct_of_item.take(pa.array(known)))] = known
    rows: Int32 = row_of_distinct[numpy_of(encoded.indices)]
    return rows


def _first_deliveries(events: pa.Table) -> tuple[Mask, int]:
    """True for each row that is not a later copy of another; and the number of these rows whose `event_id` an earlier
    event of the user has, with another item or time."""
    is_first = np.ones(events.num_rows, dtype=bool)
    if not events.num_rows:
        return is_first, 0
    users, items = _distinct(events["user_id"])[1], _distinct(events["item_id"])[1]
    times = numpy_of(events["event_ts"])
    has_id = mask_of(pc.is_valid(events["event_id"]))
    named, others = np.flatnonzero(has_id), np.flatnonzero(~has_id)
    num_ids = 0
    if len(named):
        ids = _distinct(events["event_id"].take(pa.array(named)))[1]
        is_first[named] = _first_of_each(users[named], ids, items[named], times[named])
        num_ids = int(_first_of_each(users[named], ids).sum())
    if len(others):
        kinds = _distinct(events["event_type"].take(pa.array(others)))[1]
        is_first[others] = _first_of_each(users[others], items[others], kinds, times[others])
    return is_first, int(is_first[named].sum()) - num_ids


def _users_of(user_ids: pa.ChunkedArray, others: pa.ChunkedArray) -> tuple[pa.Array, Int32]:
    """The distinct ids of both in ascending order, and the position among them of each of `user_ids`."""
    distinct, position = _distinct(pa.chunked_array([*user_ids.chunks, pc.unique(others)], user_ids.type))
    return distinct, position[: len(user_ids)]


def _items_of_users(seen: pa.Table, user_ids: pa.Array, item_ids: pa.Array) -> Lists:
    """The items, distinct, that each of `user_ids` has in `seen`; other users and items are left out."""
    users = pc.fill_null(pc.index_in(seen["user_id"].combine_chunks(), user_ids), -1)
    users, rows = numpy_of(users), rows_of(seen["item_id"], item_ids)
    known = (users >= 0) & (rows >= 0)
    order = np.argsort(users[known], kind="stable")
    lengths = np.bincount(users[known], minlength=len(user_ids)).astype(np.int64)
    return Lists(offsets_of(lengths), rows[known][order]).distinct()


def _first_of_each(*keys: npt.NDArray[Any]) -> Mask:
    """True where a combination of keys occurs for the first time."""
    order = np.lexsort(keys)  # stable: the first of equals comes first
    is_first = np.ones(len(order), dtype=bool)
    same = np.ones(len(order) - 1, dtype=bool)
    for key in keys:
        same &= key[order][1:] == key[order][:-1]
    is_first[order[1:][same]] = False
    return is_first


def _bots(users: Int32, days: Int64, num_users: int, max_per_day: int) -> Mask:
    """Which users have more than `max_per_day` events on some day."""
    order = np.lexsort((days, users))
    begins = np.ones(len(order), dtype=bool)
    begins[1:] = (np.diff(users[order]) != 0) | (np.diff(days[order]) != 0)
    starts = np.flatnonzero(begins)
    sizes = np.diff(np.append(starts, len(order)))
    is_bot = np.zeros(num_users, dtype=bool)
    is_bot[users[order[starts[sizes > max_per_day]]]] = True
    return is_bot


@dataclass(frozen=True)
class _Events:
    """Events in order of user and time."""

    users: Int32  # positions in the bucket
    item_rows: Int32
    times: Int64  # µs
    weights: Float32
    has_type: Mask  # whether events of this type hide their items


def _cut(
    user_ids: pa.Array,
    left_out: pa.Array,
    events: _Events,
    also_seen: Lists,
    split: SplitSettings,
    ds: date,
    zone: str,
    rule: SeenRule,
) -> Bucket:
    """The bucket of these users. A split that leaves one out holds out the last two events of each history."""
    num_users, users, times = len(user_ids), events.users, events.times
    lengths = np.bincount(users, minlength=num_users)
    offsets = offsets_of(lengths)
    since: list[Int64 | int]
    if split.method == "leave_one_out":  # shorter histories have nothing to predict from: all train
        num_validation = (lengths >= 3).astype(np.int64)
        num_train = lengths - 2 * num_validation
        first_held_out = (offsets[:-1] + num_train, offsets[:-1] + num_train + num_validation)
        since = [
            _since(np.append(times, 0)[at], num_validation > 0, ds, zone, rule.days)[users] for at in first_held_out
        ]
    else:
        bounds = SplitTimes.of(split, ds, zone)
        num_train = np.bincount(users[times < bounds.validation], minlength=num_users)
        num_validation = np.bincount(users[times < bounds.test], minlength=num_users) - num_train
        days = (split.test_days + split.validation_days, split.test_days)
        since = [begin(ds - timedelta(days=held_out), zone, rule.days) for held_out in days]
    since.append(begin(ds, zone, rule.days))
    return Bucket(
        user_ids=user_ids,
        offsets=offsets,
        item_rows=events.item_rows,
        event_ts=times,
        weights=events.weights,
        hides=hiding_codes(events.has_type, times, since),
        num_train=num_train.astype(np.int32),
        num_validation=num_validation.astype(np.int32),
        left_out=left_out,
        also_seen=also_seen,
    )


def _since(first_held_out: Int64, is_held_out: Mask, ds: date, zone: str, days: int | None) -> Int64:
    """(U,) the times so many days before these, or before the end of `ds` for a user of whom nothing is held out."""
    of_night = begin(ds, zone, days)
    if days is None or of_night == NEVER:
        return np.full_like(first_held_out, NEVER)
    return np.where(is_held_out, first_held_out - days * DAY_US, of_night)


def _first_of_each_user(users: Int32, of_bots: Mask) -> Int64:
    """The first row of each bot."""
    rows = np.flatnonzero(of_bots)
    _, first = np.unique(users[rows], return_index=True)
    return np.sort(rows[first])


def _reject(events: pa.Table, rows: Int64, reason: str) -> pa.Table:
    """Set these rows aside for `reason`, with times that people can read."""
    chosen = events.take(pa.array(rows))
    times = pc.cast(chosen["event_ts"], pa.timestamp("us", tz="UTC"))
    readable = chosen.set_column(chosen.column_names.index("event_ts"), "event_ts", times)
    return rejected_table(readable, pa.repeat(reason, len(rows)))


def _distinct(column: pa.ChunkedArray) -> tuple[pa.Array, Int32]:
    """The distinct values in ascending order, and the position of each row's value among them."""
    encoded = pc.dictionary_encode(column.combine_chunks())
    order = pc.sort_indices(encoded.dictionary)
    rank = np.empty(len(order), dtype=np.int32)
    rank[numpy_of(order)] = np.arange(len(order), dtype=np.int32)
    return encoded.dictionary.take(order), rank[numpy_of(encoded.indices)]
