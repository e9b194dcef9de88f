"""One column of any log into ours: ids and times of whatever type, never through a lossy conversion."""

from collections.abc import Callable
from datetime import UTC, date, datetime

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
OLDEST_US = (date(1990, 1, 1) - EPOCH).days * DAY_US  # no log is older: such a time has the wrong unit
NEWEST_US = (date(2100, 1, 1) - EPOCH).days * DAY_US
UNIT_US = {"s": 1_000_000, "relative_s": 1_000_000, "ms": 1_000, "us": 1}
FAR_US = 1 << 62  # beyond it a product would wrap; every such time is absurd anyway

TEXT = pa.string()


def id_type(found: pa.DataType, declared: IdType, column: str) -> pa.DataType:
    """int64 or string: what ids of this Arrow type become. Raises InputError for a type that cannot be an id."""
    if pa.types.is_dictionary(found):
        found = found.value_type
    is_text = _is_text(found)
    if not is_text and not pa.types.is_integer(found):
        raise InputError(f"column {column!r} is {found}; an id must be an integer or text (cast it in the log)")
    if declared == "as_is":
        return TEXT if is_text else pa.int64()
    return TEXT if declared == "string" else pa.int64()


def check_time_type(found: pa.DataType, spec: SourceSpec, column: str) -> None:
    """Raise InputError when times of this Arrow type cannot be read with the source's unit."""
    if pa.types.is_timestamp(found) or pa.types.is_date(found):
        return
    is_number = pa.types.is_integer(found) or pa.types.is_floating(found)
    if not is_number and not _is_text(found):
        raise InputError(f"column {column!r} is {found}; a time must be a timestamp, a date, a number or text")
    if is_number and spec.time_unit == "timestamp":
        raise InputError(f"column {column!r} is {found}; say what its numbers count with time_unit: s, ms or us")


def read_ids(column: pa.Array, wanted: pa.DataType) -> tuple[pa.Array, Mask, Mask]:
    """Ids of type `wanted` (int64 or string), which are null, and which cannot be read. Empty text is null."""
    column, bad = decode_text(column)
    is_null = mask_of(pc.is_null(column)) & ~bad
    if _is_text(column.type):
        is_null |= mask_of(pc.fill_null(pc.equal(pc.binary_length(column), 0), False))
        if wanted == TEXT:
            return column, is_null, bad
        column = pc.if_else(pa.array(is_null), pa.scalar(None, column.type), column)
    converted = cast_exactly(column, wanted)
    return converted, is_null, (mask_of(pc.is_null(converted)) & ~is_null) | bad


def read_times(column: pa.Array, spec: SourceSpec) -> tuple[Int64, Mask, Mask]:
    """µs since 1970 UTC, which are null, and which cannot be read. Absurd times stay absurd: they never wrap."""
    column, bad = decode_text(column)
    if _is_text(column.type):
        is_null = mask_of(pc.fill_null(pc.equal(pc.binary_length(column), 0), True)) & ~bad
        column = pc.if_else(pa.array(is_null), pa.scalar(None, column.type), column)
        column = _iso_times(column) if spec.time_unit == "timestamp" else cast_exactly(column, pa.int64(), pa.float64())
    else:
        is_null = mask_of(pc.is_null(column))
    unit_us, origin = UNIT_US.get(spec.time_unit, 1), 0
    if spec.time_unit == "relative_s":
        origin = (spec.time_origin - EPOCH).days * DAY_US
    if pa.types.is_date(column.type):
        column, unit_us, origin = pc.cast(column, pa.date32()).view(pa.int32()).cast(pa.int64()), DAY_US, 0
    elif pa.types.is_timestamp(column.type):
        unit, origin = column.type.unit, 0
        column, unit_us = column.view(pa.int64()), {"s": 1_000_000, "ms": 1_000, "us": 1, "ns": 0}[unit]
    bad |= mask_of(pc.is_null(column)) & ~is_null
    if pa.types.is_floating(column.type):
        seconds = column.fill_null(0.0).to_numpy(zero_copy_only=False).astype(np.float64)
        bad |= ~np.isfinite(seconds)
        limit = float(FAR_US // 2)
        values = np.clip(np.where(np.isfinite(seconds), seconds, 0.0) * unit_us, -limit, limit).round().astype(np.int64)
        return values + origin, is_null, bad
    column = cast_exactly(column, pa.int64())
    bad |= mask_of(pc.is_null(column)) & ~is_null
    whole = column.fill_null(0).to_numpy(zero_copy_only=False)
    if unit_us == 0:
        return whole // 1_000, is_null, bad
    limit_units = FAR_US // 2 // unit_us
    return np.clip(whole, -limit_units, limit_units) * unit_us + origin, is_null, bad


def suspected_unit(value: str, declared: str) -> str:
    """The unit, other than the declared one, under which a raw time would be sane; else an empty string."""
    try:
        number = float(value)
    except ValueError:
        return ""
    names = {"s": "seconds", "ms": "milliseconds", "us": "microseconds"}
    sane = [unit for unit in names if unit != declared and OLDEST_US <= number * UNIT_US[unit] < NEWEST_US]
    return f"they look like {names[sane[0]]}: set time_unit: {sane[0]}" if sane else ""


def decode_text(column: pa.Array) -> tuple[pa.Array, Mask]:
    """Text as a plain string array, with null where the bytes are no UTF-8, and where that was; others unchanged."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    none = np.zeros(len(column), dtype=bool)
    if not _is_text(column.type):
        return column, none
    try:
        text = column.cast(pa.large_binary()).cast(pa.large_string()).cast(TEXT)  # the cast from bytes checks
        return text, none
    except pa.ArrowInvalid:
        pass
    raw = column.cast(pa.binary())
    distinct = pc.dictionary_encode(raw)
    decoded = [_decoded(value) for value in distinct.dictionary.to_pylist()]
    text = pa.array(decoded, TEXT).take(distinct.indices)
    return text, mask_of(pc.is_null(text)) & ~mask_of(pc.is_null(raw))


def text_of(column: pa.Array) -> pa.Array:
    """Any column as text, for people; at most 200 characters."""
    column, bad = decode_text(column)
    if bad.any():
        column = pc.if_else(pa.array(bad), pa.scalar("(not UTF-8)"), column)
    return pc.utf8_slice_codeunits(column.cast(TEXT), 0, 200)


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
    """The column in the first type that holds all of it exactly; else in the last, null where a value does not fit."""
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


def _is_text(found: pa.DataType) -> bool:
    if pa.types.is_dictionary(found):
        found = found.value_type
    checks = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return any(
        check(found) for check in (*checks, pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    )


def mask_of(column: pa.Array) -> Mask:
    return np.asarray(column.to_numpy(zero_copy_only=False), dtype=bool)
