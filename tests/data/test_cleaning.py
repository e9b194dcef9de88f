from datetime import date

import numpy as np
import pyarrow as pa
import pytest

from pipeline.data.cleaning import Period, clean_rows, first_rejected, malformed_lines
from pipeline.data.sources import SourceSpec

DS = date(2026, 11, 20)
NOON = 1_795_176_000_000_000  # µs, on DS
DAY = 86_400_000_000
TYPES = (pa.string(), pa.string())
PERIOD = Period.until(DS, 10, is_partitioned=True)


def raw(rows: list[dict], **types: pa.DataType) -> pa.Table:
    names = sorted({name for row in rows for name in row})
    columns = {name: pa.array([row.get(name) for row in rows], types.get(name)) for name in names}
    number = len(rows)
    return pa.table(columns | {"file": pa.array([3] * number, pa.int32()), "row": pa.array(range(number), pa.int64())})


def event(**changed: object) -> dict:
    return {"user_id": "u", "item_id": "i", "event_ts": NOON, **changed}


def clean(rows: list[dict], spec: SourceSpec | None = None, period: Period = PERIOD, max_rejected: int = 10):
    return clean_rows(raw(rows), spec or SourceSpec(time_unit="us"), TYPES, period, max_rejected)


def test_each_bad_row_is_set_aside_with_the_first_reason_that_holds():
    cleaned = clean(
        [
            event(),
            event(user_id=None, item_id=None),
            event(item_id=""),
            event(event_ts=None),
            event(event_ts=NOON // 1_000),  # milliseconds taken for microseconds: 1970
            event(event_ts=NOON + DAY),
            event(event_ts=NOON - 11 * DAY),
        ]
    )
    assert cleaned.events["row"].to_pylist() == [0]
    assert cleaned.rejected.select(["row", "reason"]).to_pylist() == [
        {"row": 1, "reason": "user_id_null"},
        {"row": 2, "reason": "item_id_null"},
        {"row": 3, "reason": "event_ts_null"},
        {"row": 4, "reason": "event_ts_too_old"},
        {"row": 5, "reason": "event_ts_in_future"},
    ]
    assert cleaned.rejected["event_ts"].to_pylist()[3] == str(NOON // 1_000)
    assert cleaned.counts == {
        "kept": 1,
        "user_id_null": 1,
        "item_id_null": 1,
        "event_ts_null": 1,
        "event_ts_too_old": 1,
        "event_ts_in_future": 1,
        "out_of_lookback": 1,
    }


def test_clocks_may_differ_by_an_hour():
    midnight = NOON + DAY // 2
    cleaned = clean([event(event_ts=midnight + 3_599_999_999), event(event_ts=midnight + 3_600_000_000)])
    assert cleaned.counts == {"kept": 1, "event_ts_in_future": 1}


def test_without_partitions_later_days_are_left_out_and_no_fault():
    period = Period.until(DS, 10, is_partitioned=False)
    cleaned = clean([event(), event(event_ts=NOON + 5 * DAY), event(event_ts=NOON * 1_000)], period=period)
    assert cleaned.counts == {"kept": 1, "after_ds": 1, "event_ts_in_future": 1}


def test_the_lookback_counts_days_that_end_with_ds():
    first_midnight = NOON + DAY // 2 - 10 * DAY
    cleaned = clean([event(event_ts=first_midnight), event(event_ts=first_midnight - 1)])
    assert cleaned.counts == {"kept": 1, "out_of_lookback": 1}


@pytest.mark.parametrize(
    ("unknown", "counts"),
    [
        ("error", {"kept": 2, "event_type_unknown": 1}),
        ("ignore", {"kept": 2, "ignored_event_type": 1}),
        ("weight", {"kept": 3}),
    ],
)
def test_unknown_event_types_are_what_the_source_says(unknown, counts):
    columns = {"event_type": "event_type"}
    spec = SourceSpec(
        time_unit="us", event_weights={"buy": 3.0}, default_weight=0.5, unknown_event_types=unknown, columns=columns
    )
    cleaned = clean([event(event_type="buy"), event(event_type="look"), event(event_type=None)], spec)
    assert cleaned.counts == counts
    weights = dict(zip(cleaned.events["row"].to_pylist(), cleaned.events["weight"].to_pylist(), strict=True))
    assert weights[0] == 3.0
    assert weights[2] == 0.5  # no type: nothing to be unknown
    assert weights.get(1, 0.5) == 0.5


def test_a_value_can_multiply_the_weight():
    spec = SourceSpec(
        time_unit="us", event_type="rating", event_weights={"rating": 2.0}, value_is_weight=True,
        columns={"event_value": "event_value"},
    )  # fmt: skip
    values = [4.5, None, float("nan"), -3.0]
    cleaned = clean([event(event_value=value) for value in values], spec)
    assert cleaned.events["weight"].to_pylist() == [9.0, 2.0, 2.0, 0.0]
    assert cleaned.events["event_type"].to_pylist() == ["rating"] * 4


def test_only_the_first_bad_rows_of_each_reason_are_kept():
    cleaned = clean([event(user_id=None)] * 5 + [event(item_id=None)] * 2, max_rejected=3)
    assert cleaned.rejected["row"].to_pylist() == [0, 1, 2, 5, 6]
    assert cleaned.counts["user_id_null"] == 5


def test_first_rejected_is_the_same_however_the_rows_arrive():
    parts = [malformed_lines(("x",), file, row) for file in (0, 1) for row in (0, 5, 9)]
    forwards = first_rejected(pa.concat_tables(parts), 4)
    assert forwards.equals(first_rejected(pa.concat_tables(parts[::-1]), 4))
    assert forwards.select(["file", "row"]).to_pylist() == [
        {"file": 0, "row": 0},
        {"file": 0, "row": 5},
        {"file": 0, "row": 9},
        {"file": 1, "row": 0},
    ]


def test_text_that_is_no_utf8_is_shown_as_such():
    table = raw([event(user_id=b"\xff"), event(user_id=b"u")], user_id=pa.binary())
    cleaned = clean_rows(table, SourceSpec(time_unit="us"), TYPES, PERIOD, 10)
    assert cleaned.counts == {"kept": 1, "user_id_unreadable": 1}
    assert cleaned.rejected["user_id"].to_pylist() == ["(not UTF-8)"]


def test_no_rows_are_fine():
    empty = raw([event()]).slice(0, 0)
    cleaned = clean_rows(empty, SourceSpec(time_unit="us"), TYPES, PERIOD, 10)
    assert cleaned.counts == {"kept": 0}
    assert cleaned.events.num_rows == cleaned.rejected.num_rows == 0
    assert np.array_equal(cleaned.events.schema.names, clean([event()]).events.schema.names)
