"""The cleaning of a bucket against a slow obvious one, and its laws."""

from collections import defaultdict
from collections.abc import Sequence
from datetime import date

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.histories import Bucket
from pipeline.data.item_events import NEVER, ItemEvents
from pipeline.data.seen import SeenRule
from pipeline.data.splitting import SplitTimes, clean_bucket, rows_of
from pipeline.settings import SplitSettings

DS = date(2026, 11, 20)
DAY = 86_400_000_000
FIRST = 1_795_132_800_000_000 - 9 * DAY  # midnight, nine days before DS
ITEMS = pa.array(["a", "b", "c", "d"])  # "x" and "y" are orphans
MAX_PER_DAY = 4

EVENT = st.fixed_dictionaries(
    {
        "user_id": st.sampled_from(["u", "v", "w"]),
        "item_id": st.sampled_from(["a", "b", "c", "d", "x"]),
        "event_ts": st.integers(0, 39).map(lambda quarter: FIRST + quarter * DAY // 4),
        "event_type": st.sampled_from(["", "view"]),
        "event_id": st.sampled_from([None, None, "1", "2"]),
    }
)
ALL_HIDE = SeenRule()
SEEN = pa.schema([("user_id", pa.string()), ("item_id", pa.string())])
METHODS = st.sampled_from(["time", "leave_one_out"])


def table_of(events: list[dict]) -> pa.Table:
    schema = pa.schema(
        [("user_id", pa.string()), ("item_id", pa.string()), ("event_ts", pa.int64()), ("weight", pa.float32()),
         ("event_type", pa.string()), ("event_id", pa.string()), ("file", pa.int32()), ("row", pa.int64())]
    )  # fmt: skip
    rows = [{"weight": 1.0, "event_id": None, "event_type": "", **e, "file": 0, "row": i} for i, e in enumerate(events)]
    return pa.Table.from_pylist(rows, schema=schema)


def clean(
    events: list[dict],
    method: str = "time",
    validation_days: int = 1,
    test_days: int = 1,
    seen: Sequence[tuple] = (),
    rule: SeenRule = ALL_HIDE,
):
    split = SplitSettings(method=method, validation_days=validation_days, test_days=test_days)
    pairs = pa.Table.from_pylist([{"user_id": user, "item_id": item} for user, item in seen], schema=SEEN)
    return clean_bucket(table_of(events), pairs, ITEMS, split, DS, "UTC", rule, MAX_PER_DAY)


def slowly(events: list[dict], method: str) -> tuple[dict[str, tuple], dict[str, int]]:
    """What clean_bucket should give: user -> (items, times, num_train, num_validation), and the counts."""
    counts = dict.fromkeys(("kept", "duplicates", "reused_event_ids", "item_id_orphan", "bot_events", "bot_users"), 0)
    seen, ids, histories = set(), set(), defaultdict(list)
    for event in events:
        has_id = event["event_id"] is not None
        id_or_type = ("id", event["event_id"]) if has_id else ("type", event["event_type"])
        key = (event["user_id"], event["item_id"], event["event_ts"], id_or_type)
        if key in seen:
            counts["duplicates"] += 1
            continue
        seen.add(key)
        if has_id:
            counts["reused_event_ids"] += (event["user_id"], event["event_id"]) in ids
            ids.add((event["user_id"], event["event_id"]))
        if event["item_id"] not in ITEMS.to_pylist():
            counts["item_id_orphan"] += 1
            continue
        histories[event["user_id"]].append(event)
    found = {}
    for user in sorted(histories):
        per_day = defaultdict(int)
        for event in histories[user]:
            per_day[event["event_ts"] // DAY] += 1
        if max(per_day.values()) > MAX_PER_DAY:
            counts["bot_users"] += 1
            counts["bot_events"] += len(histories[user])
            found[user] = ([], [], 0, 0)
            continue
        history = sorted(histories[user], key=lambda e: e["event_ts"])  # Python's sort is stable too
        counts["kept"] += len(history)
        if method == "leave_one_out":
            held_out = 1 if len(history) >= 3 else 0
            num_train, num_validation = len(history) - 2 * held_out, held_out
        else:
            num_train = sum(e["event_ts"] < FIRST + 8 * DAY for e in history)
            num_validation = sum(FIRST + 8 * DAY <= e["event_ts"] < FIRST + 9 * DAY for e in history)
        items = [ITEMS.to_pylist().index(e["item_id"]) for e in history]
        found[user] = (items, [e["event_ts"] for e in history], num_train, num_validation)
    return found, counts


@given(st.lists(EVENT, max_size=40), METHODS)
def test_a_bucket_is_what_the_slow_way_gives(events, method):
    clean_one = clean(events, method)
    bucket = clean_one.bucket
    found = {}
    for u, user in enumerate(bucket.user_ids.to_pylist()):
        at = slice(bucket.offsets[u], bucket.offsets[u + 1])
        found[user] = (
            bucket.item_rows[at].tolist(),
            bucket.event_ts[at].tolist(),
            int(bucket.num_train[u]),
            int(bucket.num_validation[u]),
        )
    expected, counts = slowly(events, method)
    assert found == expected
    assert list(found) == sorted(found)
    assert clean_one.counts == counts
    assert sum(counts.values()) - counts["bot_users"] - counts["reused_event_ids"] == len(events)


RULES = st.builds(SeenRule, st.sampled_from([None, (), ("view",), ("", "view")]), st.sampled_from([None, 1, 2, 10**9]))


@given(st.lists(EVENT, max_size=40), METHODS, RULES)
def test_what_a_user_has_seen_follows_the_rule_in_each_part(events, method, rule):
    """The lists of a part are made when the first event that it does not see happens, or at the end of the day."""
    bucket = clean(events, method, rule=rule).bucket
    types = _types_in_order(events, bucket)
    for part, back in (("train", 2), ("before_test", 1), ("whole", 0)):
        seen = bucket.seen(part)
        for u in range(bucket.num_users):
            start, end = int(bucket.offsets[u]), int(bucket.offsets[u + 1])
            stop = start + len(bucket.cut(part)[u])
            made_at = FIRST + (10 - back) * DAY
            if method == "leave_one_out":
                made_at = int(bucket.event_ts[stop]) if stop < end else FIRST + 10 * DAY
            visible = range(start, stop)
            of_type = [e for e in visible if rule.event_types is None or types[e] in rule.event_types]
            hiding = [e for e in of_type if rule.days is None or bucket.event_ts[e] >= made_at - rule.days * DAY]
            assert seen[u].tolist() == sorted({int(bucket.item_rows[e]) for e in hiding})


def _types_in_order(events: list[dict], bucket: Bucket) -> list[str]:
    """The type of each event of the bucket."""
    types: list[str] = []
    for u, user in enumerate(bucket.user_ids.to_pylist()):
        if bucket.offsets[u] == bucket.offsets[u + 1]:
            continue
        of_user, keys = [], set()
        for event in events:
            id_or_type = event["event_id"] or ("type", event["event_type"])
            key = (event["item_id"], event["event_ts"], id_or_type)
            if event["user_id"] == user and event["item_id"] in ITEMS.to_pylist() and key not in keys:
                keys.add(key)
                of_user.append(event)
        types += [event["event_type"] for event in sorted(of_user, key=lambda e: e["event_ts"])]
    return types


@given(st.lists(EVENT.map(lambda e: e | {"event_id": None}), max_size=30), st.randoms(use_true_random=False), METHODS)
def test_the_order_of_the_log_decides_only_between_equal_times(events, random, method):
    shuffled = list(events)
    random.shuffle(shuffled)
    one, other = clean(events, method), clean(shuffled, method)
    assert one.counts == other.counts
    assert one.bucket.user_ids.equals(other.bucket.user_ids)
    assert np.array_equal(one.bucket.event_ts, other.bucket.event_ts)
    assert np.array_equal(one.bucket.num_train, other.bucket.num_train)
    by_time = [
        sorted(zip(np.repeat(np.arange(b.num_users), np.diff(b.offsets)), b.event_ts, b.item_rows, strict=True))
        for b in (one.bucket, other.bucket)
    ]
    assert by_time[0] == by_time[1]


@given(st.lists(EVENT, max_size=20), METHODS)
def test_delivering_the_log_twice_changes_nothing(events, method):
    once, twice = clean(events, method), clean(events + events, method)
    assert np.array_equal(once.bucket.item_rows, twice.bucket.item_rows)
    assert np.array_equal(once.bucket.offsets, twice.bucket.offsets)
    assert twice.counts["duplicates"] == once.counts["duplicates"] + len(events)
    assert twice.counts["kept"] == once.counts["kept"]


def test_equal_times_keep_the_order_of_the_log():
    events = [{"user_id": "u", "item_id": item, "event_ts": FIRST} for item in "cab"]
    assert clean(events).bucket.item_rows.tolist() == [2, 0, 1]


def test_time_splits_end_with_ds():
    times = SplitTimes.of(SplitSettings(validation_days=2, test_days=3), DS, "UTC")
    assert times.test == FIRST + 7 * DAY
    assert times.validation == FIRST + 5 * DAY


def test_an_event_at_the_first_moment_of_a_part_is_in_that_part():
    """The last moment of training, the first and last of validation, the first of the test."""
    moments = (8 * DAY - 1, 8 * DAY, 9 * DAY - 1, 9 * DAY)
    bucket = clean([{"user_id": "u", "item_id": "a", "event_ts": FIRST + moment} for moment in moments]).bucket
    assert (bucket.num_train.tolist(), bucket.num_validation.tolist()) == ([1], [2])
    assert bucket.held_out("test").lengths.tolist() == [1]


def test_leave_one_out_leaves_short_histories_to_training():
    events = [{"user_id": "u", "item_id": "a", "event_ts": FIRST + i} for i in range(2)]
    events += [{"user_id": "v", "item_id": "a", "event_ts": FIRST + i} for i in range(3)]
    bucket = clean(events, "leave_one_out").bucket
    assert bucket.num_train.tolist() == [2, 1]
    assert bucket.num_validation.tolist() == [0, 1]
    assert bucket.held_out("test").lengths.tolist() == [0, 1]


def test_a_bot_is_left_out_whole_and_reported_once():
    bot = [{"user_id": "u", "item_id": "a", "event_ts": FIRST + i} for i in range(MAX_PER_DAY + 1)]
    earlier = [{"user_id": "u", "item_id": "b", "event_ts": FIRST - DAY}]
    person = [{"user_id": "v", "item_id": "a", "event_ts": FIRST + i} for i in range(MAX_PER_DAY)]
    found = clean(bot + earlier + person)
    assert found.bucket.user_ids.to_pylist() == ["u", "v"]
    assert found.bucket.left_out.to_pylist() == [f"taken for a bot: over {MAX_PER_DAY} events on a day", ""]
    assert np.diff(found.bucket.offsets).tolist() == [0, MAX_PER_DAY]
    assert found.counts["bot_users"] == 1
    assert found.counts["bot_events"] == MAX_PER_DAY + 2
    assert found.rejected.select(["row", "reason", "user_id"]).to_pylist() == [
        {"row": 0, "reason": "user_id_bot", "user_id": "u"}
    ]


@given(st.lists(st.integers(0, 30), max_size=30), st.lists(st.integers(0, 30), max_size=10, unique=True))
def test_rows_of_ids_are_their_places(ids, items):
    items.sort()
    expected = [items.index(i) if i in items else -1 for i in ids]
    found = rows_of(pa.chunked_array([pa.array(ids, pa.int64())]), pa.array(items, pa.int64()))
    assert found.tolist() == expected


@given(st.lists(EVENT, max_size=30), METHODS)
def test_item_counts_add_up_to_the_events_of_each_part(events, method):
    bucket = clean(events, method).bucket
    found = ItemEvents.none_of(4)
    found.add(ItemEvents.of(bucket))
    parts = (bucket.item_rows, bucket.cut("train").values, bucket.held_out("validation").values)
    for part, numbers in zip(parts, found.counts_3R, strict=True):
        assert numbers.tolist() == [int((part == row).sum()) for row in range(4)]
    for row, first in enumerate(found.first_R.tolist()):
        assert first == min(bucket.event_ts[bucket.item_rows == row].tolist(), default=NEVER)


@given(st.lists(EVENT, max_size=30), st.lists(EVENT, max_size=30))
def test_the_events_of_two_buckets_add_up(one, other):
    """A user stands in one bucket only, so the second one's users have names of their own."""
    others = [event | {"user_id": "other " + event["user_id"]} for event in other]
    apart, together = ItemEvents.none_of(4), ItemEvents.none_of(4)
    for events in (one, others):
        apart.add(ItemEvents.of(clean(events).bucket))
    together.add(ItemEvents.of(clean(one + others).bucket))
    assert (apart.counts_3R == together.counts_3R).all()
    assert (apart.first_R == together.first_R).all()


@pytest.mark.parametrize("method", ["time", "leave_one_out"])
def test_an_empty_bucket_is_fine(method):
    found = clean([], method)
    assert found.bucket.num_users == 0
    assert found.bucket.offsets.tolist() == [0]
    assert found.counts["kept"] == 0


def test_items_of_rows_that_were_set_aside_are_kept_apart_and_distinct():
    event = {"user_id": "u", "item_id": "a", "event_ts": FIRST, "event_type": "view"}
    seen = [("u", "c"), ("u", "b"), ("u", "c"), ("u", "x"), ("nobody", "a"), ("v", "d")]
    bucket = clean([event, event | {"user_id": "v"}], seen=seen).bucket
    assert bucket.user_ids.to_pylist() == ["nobody", "u", "v"]  # the first has no history, and has seen an item
    assert [bucket.also_seen[user].tolist() for user in range(3)] == [[0], [1, 2], [3]]
    assert bucket.item_rows.tolist() == [0, 0]
    assert [bucket.seen("whole")[user].tolist() for user in range(3)] == [[0], [0, 1, 2], [0, 3]]
