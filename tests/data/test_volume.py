"""The day's events beside those of the days before."""

from collections import Counter
from datetime import date, timedelta

import pytest

from pipeline.data.volume import odd_figures
from pipeline.settings import PrepareSettings

DS = date(2026, 11, 20)  # a Friday
SETTINGS = PrepareSettings()
USUAL = {"view": 900, "buy": 100}


def log_of(num_days: int = 40, **changes: dict[str, int]) -> dict[date, Counter[str]]:
    """Usual days, the weekend with three times as many events; `d3` changes the day three days before DS."""
    events = {}
    for ago in range(num_days):
        day = DS - timedelta(days=ago)
        times = 3 if day.weekday() >= 5 else 1
        numbers = changes.get(f"d{ago}", {name: times * number for name, number in USUAL.items()})
        if sum(numbers.values()):
            events[day] = Counter(numbers)
    return events


def words(events: dict[date, Counter[str]], ds: date = DS) -> list[str]:
    return [f"{finding.rule}: {finding.words}" for finding in odd_figures(events, ds, SETTINGS)]


@pytest.mark.parametrize("ds", [DS - timedelta(days=ago) for ago in range(10)])
def test_usual_days_are_not_odd_on_any_weekday(ds):
    assert words(log_of(), ds) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"d0": {"view": 440, "buy": 50}}, ["max_day_change: 2026-11-20 has 490 events, a usual Friday 1,000"]),
        ({"d0": {"view": 1_850, "buy": 200}}, ["max_day_change: 2026-11-20 has 2,050 events, a usual Friday 1,000"]),
        ({"d0": {"view": 520, "buy": 60}}, []),
        ({"d3": {}}, ["missing_day: there is no event of 2026-11-17, a usual Tuesday has 1,000"]),
        ({"d7": {}}, ["missing_day: there is no event of 2026-11-13, a usual Friday has 1,000"]),
        (
            {"d0": {"view": 1_000}},
            ["max_type_change: 0.0% of the events of 2026-11-20 are of the type 'buy', usually 10.0%"],
        ),
        (
            {"d0": {"view": 850, "buy": 90, "(other)": 60}},
            ["max_type_change: 6.0% of the events of 2026-11-20 are of the type '(other)', usually 0.0%"],
        ),
        ({"d0": {"view": 895, "buy": 100, "(other)": 5}}, []),  # too rare to look at
        ({"d0": {}}, ["max_day_change: 2026-11-20 has 0 events, a usual Friday 1,000"]),
        ({"d40": {"view": 9}}, []),  # long ago
    ],
)
def test_what_is_odd_is_said(changes, said):
    assert words(log_of(**changes)) == said


def test_a_young_log_is_compared_with_its_last_days_and_a_very_young_one_with_nothing():
    for num_days in (1, 2, 3):
        assert words(log_of(num_days, d0={"view": 1})) == []
    assert words(log_of(4, d0={"view": 1})) != []
    assert words(log_of(10, d0={"view": 450, "buy": 50})) == []


def test_few_events_tell_nothing():
    small = {day: Counter({"view": 9}) for day in log_of()}
    assert words(small | {DS: Counter()}) == []
    assert words({}) == []


def test_a_log_that_rests_on_sundays_misses_none_and_a_stray_old_time_begins_no_log():
    resting = {day: kinds for day, kinds in log_of().items() if day.weekday() != 6}
    for ago in range(7):
        assert words(resting, DS - timedelta(days=ago)) == []
    assert words(log_of(20) | {date(1995, 1, 1): Counter({"view": 1})}) == []


def test_later_days_do_not_matter():
    late = {DS + timedelta(days=1): Counter({"view": 50_000})}
    assert words(log_of() | late) == []
