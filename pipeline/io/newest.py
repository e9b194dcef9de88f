"""The newest day of a log: no wrong clock, and no folder of the future, decides it."""

import logging
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date, timedelta
from statistics import median

import numpy as np
import pyarrow as pa

from pipeline.data.columns import EPOCH, text_of
from pipeline.data.days import day_numbers, looks_like_a_day
from pipeline.data.times import NEWEST_US, explain_times, oldest_us, read_times
from pipeline.errors import InputError
from pipeline.io.inputs import Log, day_of
from pipeline.io.rows import READERS, check_columns, num_rows, read_rows

log = logging.getLogger("nightrails")

FOLDERS_BEFORE = 7  # the files of more ds= folders are not opened
SLACK = timedelta(days=1)  # by which a log may be ahead of its store's clock: local days end after UTC's
EXAMPLES = 1_000


def newest_day(files: Log, zone: str, today: date) -> date:
    """Find the newest day, in `zone`, that looks like a day and is not after `today`, the store's, plus a slack of one.

    Says so when the log goes beyond it; a simulated log has no wrong clocks. Raises InputError when no day is left.
    """
    if files.is_partitioned:
        return _newest_folder(files, today) if not files.is_immutable else max(_days(files))
    return _newest_of_events(files, zone, today)


def check_age(files: Log, day: date, today: date, max_age_days: int | None) -> None:
    """Raise InputError when the log's newest day is older than `max_age_days`."""
    age = (today - day).days
    if max_age_days is not None and age > max_age_days:
        raise InputError(
            f"log.uri {files.uri}: its newest day is {day}, {age} days before today ({today}), and log.max_age_days is "
            f"{max_age_days}: the log is late; run again when it is complete, or ask for that day with --ds {day}"
        )


def _newest_folder(files: Log, today: date) -> date:
    """The newest `ds=` partition; only the files of the newest few are opened, to count their rows."""
    days = sorted(_days(files))
    known = [day for day in days if day <= today + SLACK]
    if not known:
        raise InputError(f"log.uri {files.uri}: its oldest partition is ds={days[0]}, but today is {today}")
    candidates = known[-FOLDERS_BEFORE - 1 :]
    of_candidates = [(day, file) for file in files.files if (day := day_of(file.key)) in candidates]
    with ThreadPoolExecutor(READERS) as pool:
        sizes = list(pool.map(lambda pair: num_rows(files, pair[1]), of_candidates))
    numbers: Counter[date] = Counter()
    for (day, _), size in zip(of_candidates, sizes, strict=True):
        numbers[day] += size
    chosen = next((day for day in reversed(candidates) if looks_like_a_day(day, numbers, FOLDERS_BEFORE)), known[-1])
    if chosen != days[-1]:
        unit = "bytes" if files.source.format == "csv" else "rows"
        rows = f"it has {numbers[days[-1]]} {unit}, where a usual day has {median(numbers.values()):.0f}"
        log.warning(
            "   %s: the newest partition is ds=%s, but %s; serving ds=%s; --ds chooses another day",
            *(files.uri, days[-1], rows if days[-1] in candidates else f"today is {today}", chosen),
        )
    return chosen


def _days(files: Log) -> set[date]:
    return {day for file in files.files if (day := day_of(file.key)) is not None}


@dataclass(frozen=True)
class _Times:
    """What a look at every time of the log gives: sane events by day, and some raw times."""

    numbers: Counter[date]
    examples: list[str]
    num_rows: int


def _newest_of_events(files: Log, zone: str, today: date) -> date:
    check_columns(files)
    times = _count_days(files, zone)
    if not times.numbers:
        raise InputError(
            f"{files.name}: no sane time in column {files.source.columns.event_ts!r} of its {times.num_rows} rows: "
            f"{explain_times(times.examples, files.source)} (in {files.source_file})"
        )
    days = sorted(times.numbers)
    known = [day for day in days if day <= today + SLACK]
    if not known:
        raise InputError(f"{files.name}: its oldest event is of {days[0]}, but today is {today}")
    chosen = next((day for day in reversed(known) if looks_like_a_day(day, times.numbers)), known[-1])
    later = sum(number for day, number in times.numbers.items() if day > chosen)
    if later:
        log.warning(
            "   %s: %d of its %d events are after %s, the last of %s, and no such day looks like a day "
            "(today is %s); serving ds=%s; --ds chooses another day",
            *(files.uri, later, sum(times.numbers.values()), chosen, days[-1], today, chosen),
        )
    return chosen


def _count_days(files: Log, zone: str) -> _Times:
    numbers: Counter[date] = Counter()
    examples: list[str] = []
    rows_read = 0
    for file in files.files:
        for rows in read_rows(files, file, None, ("event_ts",)):
            column = rows.table["event_ts"].combine_chunks()
            rows_read += len(column)
            times, is_null, is_bad = read_times(column, files.source)
            sane = times[~is_null & ~is_bad & (times >= oldest_us(files.source)) & (times < NEWEST_US)]
            days, of_days = np.unique(day_numbers(sane, zone), return_counts=True)
            for day, number in zip(days.tolist(), of_days.tolist(), strict=True):
                numbers[EPOCH + timedelta(days=day)] += number
            if len(examples) < EXAMPLES and len(column):
                spread = np.unique(np.linspace(0, len(column) - 1, EXAMPLES // 10, dtype=np.int64))
                examples += [text for text in text_of(column.take(pa.array(spread))).to_pylist() if text]
    return _Times(numbers, examples, rows_read)
