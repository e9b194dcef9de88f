"""The events of the night's day beside those of the days before: half a delivery, a tracker that is gone, a missing
day. Pure: counts in, findings out."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import date, timedelta
from statistics import median
from typing import Any

from pipeline.settings import PrepareSettings

OTHER = "(other)"  # events of types that the source file does not name
WEEKS, DAYS = 4, 7  # the days that are usual: of the same weekday, or, where these are too few, the last ones
LEAST_DAYS = 3
LEAST_EVENTS = 100  # on a usual day; with fewer, chance alone changes their number much
LEAST_SHARE = 0.01  # of the events; a rarer type is not looked at

EventsByDay = Mapping[date, Counter[str]]  # number of events by type


@dataclass(frozen=True)
class Finding:
    """A figure of the day that is not as usual."""

    rule: str
    value: float
    usual: float
    threshold: float
    words: str

    def plain(self) -> dict[str, Any]:
        """Make a dict for `validation-….json`."""
        return asdict(self)


def odd_figures(events: EventsByDay, ds: date, settings: PrepareSettings) -> list[Finding]:
    """What is odd about the events of `ds`, before repeats are dropped, beside those of the days before it.

    The usual number is the median of the same weekday in the last four weeks, or of the last week where the log has
    less than three such days. Nothing is odd where a usual day has less than 100 events, or the log less than three
    days before. A day is missing where its weekday has events in the other weeks: some logs rest on Sundays.
    """
    before = [ds - timedelta(days=days) for days in range(1, WEEKS * 7 + 1)]
    first = min((day for day in before if day in events), default=ds)  # an older stray time begins no log
    before = [day for day in before if day >= first]
    same_weekday = [day for day in before if day.weekday() == ds.weekday()]
    usual_days = same_weekday if len(same_weekday) >= LEAST_DAYS else before[:DAYS]
    totals = {day: events.get(day, Counter()).total() for day in [ds, *before]}
    if len(usual_days) < LEAST_DAYS:
        return []
    usual = float(median(totals[day] for day in usual_days))
    if usual < LEAST_EVENTS:
        return []
    found = []
    most = settings.max_day_change
    if not usual / most <= totals[ds] <= usual * most:
        words = f"{ds} has {totals[ds]:,} events, a usual {ds:%A} {usual:,.0f}"
        found.append(Finding("max_day_change", totals[ds], usual, most, words))
    found += [
        Finding("missing_day", 0, its_usual, 0, f"there is no event of {day}, a usual {day:%A} has {its_usual:,.0f}")
        for day in sorted(before)
        if not totals[day] and (its_usual := _usual_of(day, totals)) >= LEAST_EVENTS
    ]
    return found + _odd_types(events, ds, [day for day in usual_days if totals[day]], settings.max_type_change)


def _usual_of(day: date, totals: Mapping[date, int]) -> float:
    """The median of the other days of the same weekday; 0 without any."""
    others = [total for other, total in totals.items() if other != day and other.weekday() == day.weekday()]
    return float(median(others)) if others else 0.0


def _odd_types(events: EventsByDay, ds: date, usual_days: list[date], most: float) -> list[Finding]:
    """The types whose share of the day's events is not as usual."""
    today = events.get(ds, Counter())
    if not today or not usual_days:
        return []
    found = []
    for name in sorted({kind for day in [ds, *usual_days] for kind in events[day]}):
        share = today[name] / today.total()
        usual = float(median(events[day][name] / events[day].total() for day in usual_days))
        if max(share, usual) >= LEAST_SHARE and not usual / most <= share <= usual * most:
            words = f"{share:.1%} of the events of {ds} are of the type {name!r}, usually {usual:.1%}"
            found.append(Finding("max_type_change", share, usual, most, words))
    return found
