"""What a night sees of the log."""

from datetime import date, datetime, timedelta
from zoneinfo import ZoneInfo

import pyarrow as pa
import pytest

from pipeline.data.days import day_numbers, end_of, looks_like_a_day, midnight
from pipeline.data.period import Period
from pipeline.data.seen import SeenRule

DS = date(2026, 11, 20)
DAY = 86_400_000_000
END = midnight(DS, "UTC") + DAY
ZONES = ("UTC", "America/New_York", "Asia/Kolkata", "Pacific/Auckland")


def rows(times: list[int], is_learned: bool = True) -> pa.Table:
    """A user's rows at these times; the item is the row's number."""
    number = len(times)
    return pa.table(
        {
            "user_id": ["u"] * number,
            "item_id": [str(i) for i in range(number)],
            "event_ts": pa.array(times, pa.int64()),
            "event_type": ["view", "cart"] * (number // 2) + ["view"] * (number % 2),
            "is_learned": [is_learned] * number,
        }
    )


def cut(period: Period, events: pa.Table) -> tuple[str, str, dict[str, int]]:
    learned, seen, counts = period.cut(events)
    return "".join(learned["item_id"].to_pylist()), "".join(seen["item_id"].to_pylist()), counts


def until(
    lookback: int | None = None,
    seen_lookback: int | None = None,
    is_partitioned: bool = False,
    event_types: tuple[str, ...] | None = None,
) -> Period:
    seen = SeenRule(event_types, seen_lookback)
    return Period.until(DS, "UTC", lookback=lookback, seen=seen, is_partitioned=is_partitioned)


def test_lookbacks_count_days_that_end_with_the_nights():
    events = rows([END - 20 * DAY - 1, END - 20 * DAY, END - 10 * DAY - 1, END - 10 * DAY, END - 1])
    assert cut(until(), events) == ("01234", "", {"out_of_lookback": 0, "after_ds": 0})
    assert cut(until(10), events) == ("34", "012", {"out_of_lookback": 3, "after_ds": 0})
    assert cut(until(10, 20), events) == ("34", "12", {"out_of_lookback": 3, "after_ds": 0})
    assert cut(until(10, event_types=("cart",)), events)[:2] == ("34", "1")
    assert cut(until(10, event_types=()), events)[:2] == ("34", "")
    assert cut(until(10, 5), events)[:2] == ("34", "")
    assert cut(until(10**7), events)[0] == "01234"


def test_no_event_of_the_next_day_counts_as_the_day():
    events = rows([END - 1, END, END + 90 * DAY])
    assert cut(until(), events) == ("0", "12", {"out_of_lookback": 0, "after_ds": 2})
    assert cut(until().going_on(), events) == ("0", "", {"out_of_lookback": 0, "after_ds": 2})


def test_the_rows_of_a_partition_belong_to_its_day():
    assert cut(until(is_partitioned=True), rows([END - 1, END])) == ("01", "", {"out_of_lookback": 0, "after_ds": 0})


def test_what_was_set_aside_before_is_seen_whatever_its_time():
    learned, seen, _ = cut(until(1, 1).going_on(), rows([0, END + DAY], is_learned=False))
    assert (learned, seen) == ("", "01")


@pytest.mark.parametrize("zone", ZONES)
def test_days_begin_at_midnight_in_their_zone(zone):
    for day in (date(2026, 3, 8), date(2026, 10, 25), date(2026, 11, 1), date(1995, 6, 1)):
        first = datetime(day.year, day.month, day.day, tzinfo=ZoneInfo(zone))
        assert midnight(day, zone) == int(first.timestamp()) * 1_000_000
        assert end_of(day, zone) == midnight(day + timedelta(days=1), zone)
        inside = pa.array([midnight(day, zone), end_of(day, zone) - 1, end_of(day, zone)]).to_numpy()
        number = (day - date(1970, 1, 1)).days
        assert day_numbers(inside, zone).tolist() == [number, number, number + 1]


def test_a_day_looks_like_a_day_by_the_days_before_it():
    numbers = {DS - timedelta(days=age): 1_000 for age in range(1, 10)}
    assert looks_like_a_day(DS, numbers | {DS: 50})
    assert not looks_like_a_day(DS, numbers | {DS: 49})
    assert looks_like_a_day(DS, {DS: 1})
    assert looks_like_a_day(DS, {DS: 1, DS - timedelta(days=1): 3})
    grown = {DS - timedelta(days=age): 1 for age in range(1, 6)}
    assert looks_like_a_day(DS, grown | {DS: 10**6})
