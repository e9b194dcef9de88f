"""Convert one column of any log into ours: ids and times of any type, never through a lossy conversion."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.lists import Int64
from pipeline.data.sources import IdType, SourceSpec
from pipeline.errors import InputError

Mask = npt.NDArray[np.bool_]

DAY_US = 86_400_000_000
EPOCH = date(1970, 1, 1)
OLDEST_US = (date(1990, 1, 1) - EPOCH).days * DAY_US  # no log is older: an earlier time has the wrong unit
NEWEST_US = (date(2100, 1, 1) - EPOCH).days * DAY_US
UNIT_US = {"s": 1_000_000, "relative_s": 1_000_000, "ms": 1_000, "us": 1}
FAR_US = 1 << 62  # a larger product would wrap; a time that far away is absurd anyway

TEXT = pa.string()


def id_type(raw: pa.DataType, declared: IdType, column: str) -> pa.DataType:
    """The type that ids of this Arrow type are read as: int64 or string.

    Raises InputError for a type that cannot be an id.
    """
    plain = raw.value_type if pa.types.is_dictionary(raw) else raw
    is_text = _is_text(plain)
    if not is_text and not pa.types.is_integer(plain):
        raise InputError(f"column {column!r} is {plain}; an id must be an integer or text (cast it in the log)")
    if declared == "as_is":
        return TEXT if is_text else pa.int64()
    return TEXT if declared == "string" else pa.int64()


def check_time_type(raw: pa.DataType, spec: SourceSpec, column: str) -> None:
    """Raise InputError when times of this Arrow type cannot be read with the source's unit."""
    if pa.types.is_timestamp(raw) or pa.types.is_date(raw):
        return
    is_number = pa.types.is_integer(raw) or pa.types.is_floating(raw)
    if not is_number and not _is_text(raw):
        raise InputError(f"column {column!r} is {raw}; a time must be a timestamp, a date, a number or text")
    if is_number and spec.time_unit == "timestamp":
        raise InputError(f"column {column!r} is {raw}; say what its numbers count with time_unit: s, ms or us")


def read_ids(column: pa.Array, wanted: pa.DataType) -> tuple[pa.Array, Mask, Mask]:
    """Read ids as type `wanted` (int64 or string); masks of null and of unreadable ids. Empty text is null."""
    plain, is_null, is_undecodable = _plain(column)
    ids = cast_exactly(plain, wanted)
    return ids, is_null, (mask_of(pc.is_null(ids)) & ~is_null) | is_undecodable


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
            return np.clip(numbers * self.us, -limit, limit).round().astype(np.int64) + self.origin_us
        most = FAR_US // 2 // self.us
        return np.clip(numbers // self.per_us, -most, most).astype(np.int64) * self.us + self.origin_us


TIMESTAMP_CLOCKS = {"s": _Clock(1_000_000), "ms": _Clock(1_000), "us": _Clock(1), "ns": _Clock(1, per_us=1_000)}


def read_times(column: pa.Array, spec: SourceSpec) -> tuple[Int64, Mask, Mask]:
    """Read times as µs since 1970 UTC; masks of null and of unreadable times. Empty text is null."""
    plain, is_null, is_undecodable = _plain(column)
    numbers, clock = _numbers(plain, spec)
    is_bad = (mask_of(pc.is_null(numbers)) & ~is_null) | is_undecodable
    values = numbers.fill_null(0).to_numpy(zero_copy_only=False)
    is_finite = np.isfinite(values)
    return clock.read(np.where(is_finite, values, 0)), is_null, is_bad | ~is_finite


def _plain(column: pa.Array) -> tuple[pa.Array, Mask, Mask]:
    """The column without dictionary and with null for empty text; masks of null rows and of rows that are no UTF-8."""
    plain, is_undecodable = decode_text(column)
    is_null = mask_of(pc.is_null(plain)) & ~is_undecodable
    if _is_text(plain.type):
        is_empty = mask_of(pc.fill_null(pc.equal(pc.binary_length(plain), 0), False))
        if is_empty.any():
            is_null |= is_empty
            plain = pc.if_else(pa.array(is_null), pa.scalar(None, plain.type), plain)
    return plain, is_null, is_undecodable


def _numbers(times: pa.Array, spec: SourceSpec) -> tuple[pa.Array, _Clock]:
    """The times as int64 or float64, null where one cannot be read, and the clock that they count by."""
    if _is_text(times.type) and spec.time_unit == "timestamp":
        return _iso_times(times).view(pa.int64()), TIMESTAMP_CLOCKS["us"]
    if pa.types.is_timestamp(times.type):
        return times.view(pa.int64()), TIMESTAMP_CLOCKS[times.type.unit]
    if pa.types.is_date(times.type):
        return pc.cast(times, pa.date32()).view(pa.int32()).cast(pa.int64()), _Clock(DAY_US)
    origin_us = (spec.time_origin - EPOCH).days * DAY_US if spec.time_unit == "relative_s" else 0
    clock = _Clock(UNIT_US.get(spec.time_unit, 1), origin_us=origin_us)
    if _is_text(times.type):
        return cast_exactly(times, pa.int64(), pa.float64()), clock
    if pa.types.is_floating(times.type):
        return times.cast(pa.float64()), clock
    return cast_exactly(times, pa.int64()), clock


def suspected_unit(value: str, declared: str) -> str:
    """A hint for people: the unit, other than the declared one, that makes a raw time sane; empty without one."""
    try:
        number = float(value)
    except ValueError:
        return ""
    names = {"s": "seconds", "ms": "milliseconds", "us": "microseconds"}
    sane = [unit for unit in names if unit != declared and OLDEST_US <= number * UNIT_US[unit] < NEWEST_US]
    return f"they look like {names[sane[0]]}: set time_unit: {sane[0]}" if sane else ""


def decode_text(column: pa.Array) -> tuple[pa.Array, Mask]:
    """Text as a plain string array, null where the bytes are no UTF-8, and the mask of rows that are no UTF-8.

    Any other column comes back without its dictionary, if it has one.
    """
    flat = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
    none = np.zeros(len(flat), dtype=bool)
    if not _is_text(flat.type):
        return flat, none
    try:
        return flat.cast(pa.large_binary()).cast(pa.large_string()).cast(TEXT), none  # the cast from bytes checks
    except pa.ArrowInvalid:
        pass
    raw = flat.cast(pa.binary())
    distinct = pc.dictionary_encode(raw)
    decoded = [_decoded(value) for value in distinct.dictionary.to_pylist()]
    text = pa.array(decoded, TEXT).take(distinct.indices)
    return text, mask_of(pc.is_null(text)) & ~mask_of(pc.is_null(raw))


def text_of(column: pa.Array) -> pa.Array:
    """Any column as text, for people; at most 200 characters."""
    plain, is_undecodable = decode_text(column)
    text = plain.cast(TEXT)
    if is_undecodable.any():
        text = pc.if_else(pa.array(is_undecodable), pa.scalar("(not UTF-8)"), text)
    return pc.utf8_slice_codeunits(text, 0, 200)


def _iso_times(column: pa.Array) -> pa.Array:
    """ISO 8601 text as µs; null where it cannot be read. Without a zone it is UTC."""
    for wanted in (pa.timestamp("us"), pa.timestamp("us", tz="UTC")):  # Arrow reads a column of one kind at once
        try:
            return pc.cast(column, wanted).cast(pa.timestamp("us", tz="UTC"))
        except pa.ArrowInvalid:
            continue
    return _each(column, _iso_time, pa.timestamp("us", tz="UTC"))


def _iso_time(text: str) -> datetime | None:
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError:
        return None
    return moment.replace(tzinfo=moment.tzinfo or UTC).astimezone(UTC)


def cast_exactly(column: pa.Array, *wanted: pa.DataType) -> pa.Array:
    """Cast to the first type that holds all values exactly; else to the last, with null where a value does not fit."""
    for kind in wanted:
        try:
            return pc.cast(column, kind)
        except pa.ArrowInvalid:
            continue
    kind = wanted[-1]

    def convert(value: object) -> object:
        try:
            return pa.scalar(value, column.type).cast(kind).as_py()
        except pa.ArrowInvalid:
            return None

    return _each(column, convert, kind)


def _each(column: pa.Array, convert: Callable[[str], object], wanted: pa.DataType) -> pa.Array:
    """Convert every distinct value by itself: the slow way, for columns with a few bad values among good ones."""
    distinct = pc.dictionary_encode(column)
    values = [None if value is None else convert(value) for value in distinct.dictionary.to_pylist()]
    return pa.array(values, wanted).take(distinct.indices)


def _decoded(value: bytes | None) -> str | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return None


def _is_text(raw: pa.DataType) -> bool:
    plain = raw.value_type if pa.types.is_dictionary(raw) else raw
    types = pa.types
    strings = (types.is_string, types.is_large_string, types.is_string_view)
    return any(check(plain) for check in (*strings, types.is_binary, types.is_large_binary, types.is_binary_view))


def numpy_of(column: pa.Array | pa.ChunkedArray) -> npt.NDArray[Any]:
    """Convert a column to a NumPy array; copies where Arrow's memory cannot be shared."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    values: npt.NDArray[Any] = array.to_numpy(zero_copy_only=False)
    return values


def mask_of(column: pa.Array) -> Mask:
    """Convert a column of booleans without null."""
    return np.asarray(numpy_of(column), dtype=bool)
