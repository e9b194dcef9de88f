"""Convert times of any type into µs since 1970 UTC, and explain times that make no sense as they are declared."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from zoneinfo import ZoneInfo

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.columns import (
    DAY_US,
    EPOCH,
    TEXT,
    Mask,
    cast_exactly,
    each,
    is_text,
    mask_of,
    plain_column,
    plain_type,
)
from pipeline.data.lists import Int64
from pipeline.data.sources import NAMED_TIME_FORMATS, SourceSpec
from pipeline.errors import InputError

OLDEST_US = (date(1990, 1, 1) - EPOCH).days * DAY_US  # no log is older: an earlier time has the wrong unit
ANCIENT_US = (date(1, 1, 3) - EPOCH).days * DAY_US  # an earlier time has no date in some zone
NEWEST_US = (date(2100, 1, 1) - EPOCH).days * DAY_US
FAR_US = 1 << 62  # a larger product would wrap; a time that far away is absurd anyway
IN_UTC = pa.timestamp("us", tz="UTC")

MIN_EXPLAINED = 0.99  # of the values that a unit or a format must make sane to be suggested
SUSPECTED_FORMATS = (
    *("%m/%d/%Y %I:%M:%S %p", "%m/%d/%Y %I:%M %p", "%m/%d/%Y %H:%M:%S", "%m/%d/%Y %H:%M", "%m/%d/%Y"),
    *("%d/%m/%Y %I:%M:%S %p", "%d/%m/%Y %I:%M %p", "%d/%m/%Y %H:%M:%S", "%d/%m/%Y %H:%M", "%d/%m/%Y"),
    *("%m/%d/%y %H:%M", "%m/%d/%y", "%d/%m/%y %H:%M", "%d/%m/%y"),
    *("%d.%m.%Y %H:%M:%S", "%d.%m.%Y %H:%M", "%d.%m.%Y", "%Y.%m.%d %H:%M:%S", "%Y.%m.%d"),
    *("%Y/%m/%d %H:%M:%S", "%Y/%m/%d %H:%M", "%Y/%m/%d", "%d-%m-%Y %H:%M:%S", "%d-%m-%Y %H:%M", "%d-%m-%Y"),
    *("%m-%d-%Y %H:%M:%S", "%m-%d-%Y", "%Y%m%d", "%Y%m%d%H%M", "%Y%m%d%H%M%S", "%Y%m%d %H:%M:%S"),
    *("%d-%b-%Y %H:%M:%S", "%d-%b-%Y", "%d-%b-%y", "%d %b %Y %H:%M:%S", "%d %b %Y", "%b %d, %Y", "%B %d, %Y"),
    *("%a %b %d %H:%M:%S %z %Y", "%a %b %d %H:%M:%S %Z %Y", "%Y-%m-%d-%H.%M.%S.%f", "%Y:%m:%d %H:%M:%S"),
    *NAMED_TIME_FORMATS,
)
UNITS = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}


def check_time_type(raw: pa.DataType, spec: SourceSpec, column: str) -> None:
    """Raise InputError when times of this Arrow type cannot be read with the source's unit."""
    plain = plain_type(raw)
    types = pa.types
    if types.is_timestamp(plain) or types.is_date(plain) or types.is_null(plain) or is_text(plain):
        return
    if not types.is_integer(plain) and not types.is_floating(plain) and not types.is_decimal(plain):
        raise InputError(f"column {column!r} is {plain}; a time must be a timestamp, a date, a number or text")
    if spec.time_unit == "timestamp" and not spec.time_format:
        raise InputError(f"column {column!r} is {plain}; say what its numbers count with time_unit: s, ms, us or ns")


@dataclass(frozen=True)
class _Clock:
    """How the numbers of a column become µs since 1970 UTC: (number // per_us) · us + origin_us."""

    us: int
    per_us: int = 1
    origin_us: int = 0

    def read(self, numbers: npt.NDArray[np.int64] | npt.NDArray[np.float64]) -> Int64:
        """Convert numbers to µs; absurd times are moved to the end of the scale, so that they never wrap."""
        if np.issubdtype(numbers.dtype, np.floating):
            limit = float(FAR_US // 2)
            return np.clip(numbers * (self.us / self.per_us), -limit, limit).round().astype(np.int64) + self.origin_us
        most = FAR_US // 2 // self.us
        return np.clip(numbers // self.per_us, -most, most).astype(np.int64) * self.us + self.origin_us


CLOCKS = {"s": _Clock(1_000_000), "ms": _Clock(1_000), "us": _Clock(1), "ns": _Clock(1, per_us=1_000)}


def oldest_us(spec: SourceSpec) -> int:
    """The first time that is no fault; seconds of relative_s may count from any day."""
    return ANCIENT_US if spec.time_unit == "relative_s" else OLDEST_US


def read_times(column: pa.Array, spec: SourceSpec) -> tuple[Int64, Mask, Mask]:
    """Read times as µs since 1970 UTC; masks of null and of unreadable times. Empty text is null."""
    plain, is_null, is_undecodable = plain_column(column)
    numbers, clock = _numbers(plain, spec)
    is_bad = (mask_of(pc.is_null(numbers)) & ~is_null) | is_undecodable
    values = numbers.fill_null(0).to_numpy(zero_copy_only=False)
    is_finite = np.isfinite(values)
    return clock.read(np.where(is_finite, values, 0)), is_null, is_bad | ~is_finite


def _numbers(times: pa.Array, spec: SourceSpec) -> tuple[pa.Array, _Clock]:
    """The times as int64 or float64, null where one cannot be read, and the clock that they count by."""
    types = pa.types
    if types.is_null(times.type):
        return times.cast(pa.int64()), CLOCKS["us"]
    if types.is_timestamp(times.type):
        return in_utc(times, spec.time_zone).view(pa.int64()), CLOCKS[times.type.unit]
    if types.is_date(times.type):
        return in_utc(_midnights(times), spec.time_zone).view(pa.int64()), CLOCKS["us"]
    if spec.time_format:
        return formatted_times(_digits(times), spec.time_format, spec.time_zone).view(pa.int64()), CLOCKS["us"]
    if is_text(times.type) and spec.time_unit == "timestamp":
        return _iso_times(times, spec.time_zone).view(pa.int64()), CLOCKS["us"]
    if spec.time_unit == "relative_s":
        clock = _Clock(1_000_000, origin_us=(spec.time_origin - EPOCH).days * DAY_US)
    else:
        clock = CLOCKS.get(spec.time_unit, CLOCKS["us"])
    if types.is_floating(times.type):
        return times.cast(pa.float64()), clock
    if is_text(times.type) or (types.is_decimal(times.type) and times.type.scale > 0):
        return cast_exactly(times, pa.int64(), pa.float64()), clock
    return cast_exactly(times, pa.int64()), clock


def _midnights(dates: pa.Array) -> pa.Array:
    """Dates as timestamps without a zone; absurd dates are moved to the end of the scale."""
    is_days = pa.types.is_date32(dates.type)
    numbers = dates.view(pa.int32()).cast(pa.int64()) if is_days else dates.view(pa.int64())
    clock = _Clock(DAY_US) if is_days else CLOCKS["ms"]
    micros = clock.read(numbers.fill_null(0).to_numpy(zero_copy_only=False))
    return pa.array(micros // DAY_US * DAY_US, pa.timestamp("us"), mask=mask_of(pc.is_null(dates)))


def in_utc(times: pa.Array, zone: str) -> pa.Array:
    """Times in UTC. A timestamp without a zone is a wall clock's in `zone`; of a repeated hour it is the first, and in
    the hour that is skipped it is the moment of the change."""
    if times.type.tz is not None or zone == "UTC":
        return times.cast(pa.timestamp(times.type.unit, tz="UTC"))
    local = pc.assume_timezone(times, zone, ambiguous="earliest", nonexistent="latest")
    return local.cast(pa.timestamp(times.type.unit, tz="UTC"))


def _digits(times: pa.Array) -> pa.Array:
    """Text as it is; a number as its digits, null for a fraction."""
    return times if is_text(times.type) else cast_exactly(times, pa.int64()).cast(TEXT)


def formatted_times(text: pa.Array, time_format: str, zone: str) -> pa.Array:
    """Text in the form `time_format` (strptime's, or a name of NAMED_TIME_FORMATS) as UTC; null where it is in another.

    A time that names no zone is a wall clock's in `zone`. Raises InputError for a form that leaves the day open.
    """
    pattern = NAMED_TIME_FORMATS.get(time_format, time_format)
    pattern = re.sub(r"\.%f", "%.f", pattern)  # of the parser below: a fraction of any length
    try:
        read = pl.Series(text.cast(TEXT)).str.strip_chars().str.to_datetime(pattern, time_unit="us", strict=False)
    except pl.exceptions.PolarsError as error:
        reason = str(error).split("\n")[0]
        raise InputError(f"time_format {time_format!r}: this form cannot be read ({reason})") from None
    return in_utc(read.to_arrow(), zone)


def _iso_times(column: pa.Array, zone: str) -> pa.Array:
    """ISO 8601 text as UTC; null where it cannot be read. A time that names no zone is a wall clock's in `zone`."""
    column = column.cast(TEXT)
    for wanted in (pa.timestamp("us"), IN_UTC):  # Arrow reads a column of one kind at once
        try:
            return in_utc(pc.cast(column, wanted), zone)
        except pa.ArrowInvalid:
            continue
    named = pc.replace_substring_regex(column, pattern=r"\s*(?:UTC|GMT|Etc/UTC)$", replacement="Z")
    offset = pc.replace_substring_regex(named, pattern=r"\s+([+-]\d\d:?\d\d)$", replacement=r"\1")
    try:
        return pc.cast(offset, IN_UTC)
    except pa.ArrowInvalid:
        return each(offset, lambda text: _iso_time(text, ZoneInfo(zone)), IN_UTC)


def _iso_time(text: str, zone: ZoneInfo) -> datetime | None:
    try:
        moment = datetime.fromisoformat(text.strip())
        return moment.replace(tzinfo=moment.tzinfo or zone).astimezone(UTC)
    except (ValueError, OverflowError):  # Python knows no moment before the year 1 or after 9999
        return None


@dataclass(frozen=True)
class _Reading:
    """One way to read raw times: the key that says so, in words, and what the values are then."""

    key: str
    times_us: Int64
    is_sane: Mask


def explain_times(values: Sequence[str], spec: SourceSpec) -> str:
    """Say how these raw times, in text, can be read instead: each way with the first three of them read so.

    A way is named when it explains nearly all values; the sentence says so when none does.
    """
    sample = [value for value in values if value.strip()]
    if not sample:
        return "all of them are null or empty"
    ways: list[_Reading] = []
    for way in _readings(sample, spec):
        is_new = not any(np.array_equal(way.times_us, other.times_us) for other in ways)
        if way.is_sane.mean() >= MIN_EXPLAINED and is_new:
            ways.append(way)
    at = np.flatnonzero(ways[0].is_sane)[:3].tolist() if ways else range(len(sample))[:3]
    shown = ", ".join(repr(sample[i][:40]) for i in at)
    if not ways:
        return f"{shown}: no time_unit or common time_format explains them; is this the column of the time?"
    return f"{shown} would be " + ", or ".join(f"{_dates(way.times_us[at])} with {way.key}" for way in ways[:2])


def _readings(values: Sequence[str], spec: SourceSpec) -> Iterator[_Reading]:
    text = pa.array(values, TEXT)
    numbers = cast_exactly(text, pa.int64(), pa.float64())
    for unit in UNITS:
        if unit != spec.time_unit:
            filled = numbers.fill_null(0).to_numpy(zero_copy_only=False)
            yield _reading(f"time_unit: {unit}", CLOCKS[unit].read(np.where(np.isfinite(filled), filled, 0)))
    if spec.time_unit != "timestamp" or spec.time_format:
        yield _reading("time_unit: timestamp", _filled(_iso_times(text, spec.time_zone)))
    for form in SUSPECTED_FORMATS:
        if form != spec.time_format:
            yield _reading(f"time_format: {form!r}", _filled(formatted_times(text, form, spec.time_zone)))


def read_as_unit(numbers: pa.Array, unit: str) -> Mask:
    """Whether each number, in this unit since 1970, is the time of an event."""
    values = numbers.fill_null(0).to_numpy(zero_copy_only=False)
    return _reading(unit, CLOCKS[unit].read(np.where(np.isfinite(values), values, 0))).is_sane


def read_as_iso(text: pa.Array) -> Mask:
    """Whether each text is the time of an event in ISO 8601."""
    return _reading("timestamp", _filled(_iso_times(text, "UTC"))).is_sane


def read_as_format(times: pa.Array, form: str) -> Mask:
    """Whether each text, or the digits of each number, is the time of an event in this form."""
    return _reading(form, _filled(formatted_times(_digits(times), form, "UTC"))).is_sane


def _reading(key: str, times_us: Int64) -> _Reading:
    return _Reading(key, times_us, (times_us >= OLDEST_US) & (times_us < NEWEST_US))


def _filled(times: pa.Array) -> Int64:
    micros: Int64 = times.view(pa.int64()).fill_null(0).to_numpy(zero_copy_only=False)
    return micros


def _dates(times_us: Int64) -> str:
    return ", ".join(str(datetime.fromtimestamp(time // 1_000_000, UTC).replace(tzinfo=None)) for time in times_us)
