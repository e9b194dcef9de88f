"""Which items of a catalogue may be shown on a day."""

from datetime import UTC, date, datetime

import pyarrow as pa
import pytest

from pipeline.data.availability import is_eligible
from pipeline.errors import InputError
from pipeline.settings import ItemsSettings

DS = date(2026, 11, 20)


def eligible(settings: ItemsSettings | None = None, **columns: pa.Array) -> list[bool]:
    (length,) = {len(column) for column in columns.values()}
    catalogue = pa.table({"item_id": list(range(length))} | columns)
    return is_eligible(catalogue, settings or ItemsSettings(), DS, "items.parquet").tolist()


def moments(*texts: str | None, zone: str | None = "UTC", unit: str = "us") -> pa.Array:
    times = [None if text is None else datetime.fromisoformat(text).replace(tzinfo=UTC) for text in texts]
    return pa.array(times, pa.timestamp(unit, zone))


def test_a_catalogue_that_says_nothing_hides_nothing():
    assert eligible(title=pa.array(["a", "b"])) == [True, True]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_a_status_counts_whatever_its_case_and_spaces(kind):
    words = ["active", " Live", "RETIRED", "sold_out ", None]
    assert eligible(status=pa.array(words).cast(kind)) == [True, True, False, False, True]


def test_a_status_that_nobody_declared_is_refused_with_the_lists_to_add_it_to():
    with pytest.raises(
        InputError, match=r"items.parquet, column 'status': 'B' \(2 items\), 'A' \(1 items\) are in neither"
    ):
        eligible(status=pa.array(["B", "A", "active", "B"]))
    own = ItemsSettings(live_statuses=["b"], hidden_statuses=["A ", "active"])
    assert eligible(own, status=pa.array(["B", "A", "active", "B"])) == [True, False, False, True]


def test_a_status_may_be_a_number_or_a_truth():
    own = ItemsSettings(live_statuses=["1", "true"], hidden_statuses=["0", "false"])
    assert eligible(own, status=pa.array([1, 0, None])) == [True, False, True]
    assert eligible(own, status=pa.array([True, False])) == [True, False]


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_times_are_judged_at_the_last_moment_of_the_day(unit):
    times = moments("2026-11-20 00:00:00", "2026-11-20 23:59:59", "2026-11-21 00:00:00", None, unit=unit)
    assert eligible(available_from=times) == [True, True, False, True]
    assert eligible(available_until=times) == [False, False, True, True]


def test_a_date_means_its_whole_day():
    days = pa.array([date(2026, 11, 19), date(2026, 11, 20), date(2026, 11, 21), None], pa.date32())
    assert eligible(available_from=days) == [True, True, False, True]
    assert eligible(available_until=days) == [False, True, True, True]


def test_all_columns_must_agree():
    columns = {"status": pa.array(["active", "active", "retired"])}
    columns["available_until"] = moments("2026-11-20 12:00:00", "2026-12-01 00:00:00", "2026-12-01 00:00:00")
    assert eligible(**columns) == [False, True, False]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"available_until": pa.array(["soon"])}, "column 'available_until': string is neither a time nor a date"),
        ({"available_from": pa.array([1])}, "column 'available_from': int64 is neither a time nor a date"),
        ({"status": pa.array([["active"]])}, "column 'status': list.* is no text"),
        ({"status": pa.array(["retired"])}, "by the columns status none of its 1 items may be shown on 2026-11-20"),
    ],
)
def test_columns_that_cannot_be_read_and_an_empty_offer_are_refused(columns, words):
    with pytest.raises(InputError, match=words):
        eligible(**columns)
