"""The days of a log: midnights and day numbers in its time zone."""

from collections.abc import Mapping
from datetime import UTC, date, datetime, timedelta
from statistics import median
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.columns import DAY_US, EPOCH
from pipeline.data.lists import Int64

# A day looks like a day when it has at least this share of the rows of the median of the days before it.
MIN_SHARE = 0.05
DAYS_BEFORE = 28  # of those that have events

NEVER = int(np.iinfo(np.int64).min)  # µs before every time


def midnight(day: date, zone: str) -> int:
    """The first moment of `day` in `zone`, in µs since 1970 UTC."""
    if zone == "UTC":
        return (day - EPOCH).days * DAY_US
    local = datetime(day.year, day.month, day.day, tzinfo=ZoneInfo(zone))
    return (local - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)


def end_of(day: date, zone: str) -> int:
    """The first moment after `day` in `zone`, in µs since 1970 UTC."""
    return midnight(day + timedelta(days=1), zone)


def day_numbers(times_us: Int64, zone: str) -> Int64:
    """The day in `zone` of each time, counted from 1970-01-01."""
    if zone != "UTC":
        local = pc.local_timestamp(pa.array(times_us).cast(pa.timestamp("us", tz=zone)))
        times_us = local.cast(pa.int64()).to_numpy(zero_copy_only=False)
    return times_us // DAY_US


def looks_like_a_day(day: date, numbers: Mapping[date, int], days_before: int = DAYS_BEFORE) -> bool:
    """Whether a day has about as many rows as the days before it usually have; `numbers` are rows by day."""
    before = [numbers[other] for other in sorted(other for other in numbers if other < day)[-days_before:]]
    return not before or numbers[day] >= MIN_SHARE * median(before)
