import numpy as np
import pyarrow as pa
import pytest

from pipeline.data.cleaning import clean_rows, first_rejected, malformed_lines
from pipeline.data.sources import SourceSpec

NOON = 1_795_176_000_000_000  # µs, on DS
DAY = 86_400_000_000
TYPES = (pa.string(), pa.string())
NEWEST = NOON + DAY // 2  # the end of DS


def raw(rows: list[dict], **types: pa.DataType) -> pa.Table:
    names = sorted({name for row in rows for name in row})
    columns = {name: pa.array([row.get(name) for row in rows], types.get(name)) for name in names}
    number = len(rows)
    return pa.table(columns | {"file": pa.array([3] * number, pa.int32()), "row": pa.array(range(number), pa.int64())})


def event(**changed: object) -> dict:
    return {"user_id": "u", "item_id": "i", "event_ts": NOON, **changed}


def clean(rows: list[dict], spec: SourceSpec | None = None):
    return clean_rows(raw(rows), spec or SourceSpec(time_unit="us"), TYPES, NEWEST)


def test_each_bad_row_is_set_aside_with_the_first_reason_that_holds():
    cleaned = clean(
        [
            event(),
            event(user_id=None, item_id=None),
            event(item_id=""),
            event(event_ts=None),
            event(event_ts=NOON // 1_000),  # milliseconds taken for microseconds: 1970
            event(event_ts=NOON + DAY),
        ]
    )
    assert cleaned.events.filter(cleaned.events["is_learned"])["row"].to_pylist() == [0]
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
    }


def test_a_row_with_ids_that_is_set_aside_still_counts_as_seen():
    spec = SourceSpec(
        time_unit="us", event_weights={"buy": 1.0}, unknown_event_types="ignore", columns={"event_type": "event_type"}
    )
    rows = [
        event(item_id="learned", event_type="buy"),
        event(item_id="no time", event_ts=None, event_type="buy"),
        event(item_id="in 1970", event_ts=5, event_type="buy"),
        event(item_id="ahead", event_ts=NOON + DAY, event_type="buy"),
        event(item_id="other type", event_type="look"),
        event(item_id=None),
        event(user_id=""),
    ]
    cleaned = clean(rows, spec)
    seen = dict(zip(cleaned.events["item_id"].to_pylist(), cleaned.events["is_learned"].to_pylist(), strict=True))
    assert seen == {"learned": True, "no time": False, "in 1970": False, "ahead": False, "other type": False}


def test_words_that_mean_nobody_are_counted_until_the_source_decides():
    rows = [event(), event(user_id="nan"), event(item_id="None"), event(user_id="nan", item_id=None)]
    undecided = clean(rows)
    assert undecided.counts == {"kept": 3, "item_id_null": 1, "word:user_id:nan": 1, "word:item_id:None": 1}
    decided = clean(rows, SourceSpec(time_unit="us", null_words=("nan", "x")))
    assert decided.counts == {"kept": 2, "nobody": 1, "item_id_null": 1}
    assert decided.events["item_id"].to_pylist() == ["i", "None"]
    assert clean(rows, SourceSpec(time_unit="us", null_words=())).counts == {"kept": 3, "item_id_null": 1}


def test_an_empty_event_id_is_none():
    cleaned = clean(
        [event(event_id=""), event(event_id="1")], SourceSpec(time_unit="us", columns={"event_id": "event_id"})
    )
    assert cleaned.events["event_id"].to_pylist() == [None, "1"]


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


def test_all_bad_rows_are_kept_in_the_order_of_the_log():
    cleaned = clean([event(item_id=None)] * 2 + [event()] + [event(user_id=None)] * 5)
    assert cleaned.rejected["row"].to_pylist() == [0, 1, 3, 4, 5, 6, 7]
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
    cleaned = clean_rows(table, SourceSpec(time_unit="us"), TYPES, NEWEST)
    assert cleaned.counts == {"kept": 1, "user_id_unreadable": 1}
    assert cleaned.rejected["user_id"].to_pylist() == ["(not UTF-8)"]


def test_no_rows_are_fine():
    empty = raw([event()]).slice(0, 0)
    cleaned = clean_rows(empty, SourceSpec(time_unit="us"), TYPES, NEWEST)
    assert cleaned.counts == {"kept": 0}
    assert cleaned.events.num_rows == cleaned.rejected.num_rows == 0
    assert np.array_equal(cleaned.events.schema.names, clean([event()]).events.schema.names)
