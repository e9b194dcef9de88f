"""Work on columns of any type: text in any of Arrow's forms, conversions without loss, NumPy."""

from collections.abc import Callable
from datetime import date
from typing import Any
from uuid import UUID

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Mask = npt.NDArray[np.bool_]

DAY_US = 86_400_000_000
EPOCH = date(1970, 1, 1)

TEXT = pa.string()
FLAT = {pa.string_view(): pa.large_string(), pa.binary_view(): pa.large_binary()}


def plain_type(raw: pa.DataType) -> pa.DataType:
    """The type of the values behind a dictionary or an extension type; a UUID is text."""
    if isinstance(raw, pa.UuidType):
        return TEXT
    if isinstance(raw, pa.BaseExtensionType):
        return plain_type(raw.storage_type)
    return plain_type(raw.value_type) if pa.types.is_dictionary(raw) else raw


def plain_values(column: pa.Array) -> pa.Array:
    """The values of a column without dictionary, extension type or view; a UUID is text, as 8-4-4-4-12 digits."""
    if isinstance(column.type, pa.UuidType):
        return each(column.storage.cast(pa.binary()), lambda raw: str(UUID(bytes=raw)), TEXT)
    if isinstance(column.type, pa.BaseExtensionType):
        return plain_values(column.storage)
    if pa.types.is_dictionary(column.type):
        return plain_values(column.dictionary).take(column.indices)
    flat = FLAT.get(column.type)
    if pa.types.is_fixed_size_binary(column.type):
        flat = pa.binary()
    return column if flat is None else column.cast(flat)


def without_views(rows: pa.RecordBatch) -> pa.RecordBatch:
    """The rows with plain text or bytes in place of views, at any depth: Arrow cannot take or filter views."""
    return rows.cast(pa.schema(map(_without_views, rows.schema), rows.schema.metadata))


def _without_views(field: pa.Field) -> pa.Field:
    raw, types = field.type, pa.types
    if types.is_struct(raw):
        return field.with_type(pa.struct(map(_without_views, raw)))
    if types.is_list(raw):
        return field.with_type(pa.list_(_without_views(raw.value_field)))
    if types.is_large_list(raw):
        return field.with_type(pa.large_list(_without_views(raw.value_field)))
    if types.is_map(raw):
        return field.with_type(pa.map_(_without_views(raw.key_field), _without_views(raw.item_field)))
    return field.with_type(FLAT.get(raw, raw))


def plain_column(column: pa.Array) -> tuple[pa.Array, Mask, Mask]:
    """The plain values, null for empty text; masks of null rows and of rows that are no UTF-8."""
    plain, is_undecodable = decode_text(column)
    is_null = mask_of(pc.is_null(plain)) & ~is_undecodable
    if is_text(plain.type):
        is_empty = mask_of(pc.fill_null(pc.equal(pc.binary_length(plain), 0), False))
        if is_empty.any():
            is_null |= is_empty
            plain = pc.if_else(pa.array(is_null), pa.scalar(None, plain.type), plain)
    return plain, is_null, is_undecodable


def decode_text(column: pa.Array) -> tuple[pa.Array, Mask]:
    """Text as a plain string array, null where the bytes are no UTF-8, and the mask of rows that are no UTF-8.

    Of any other column the plain values come back.
    """
    flat = plain_values(column)
    none = np.zeros(len(flat), dtype=bool)
    if not is_text(flat.type):
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

    return each(column, convert, kind)


def each(column: pa.Array, convert: Callable[[Any], object], wanted: pa.DataType) -> pa.Array:
    """Convert every distinct value by itself: the slow way, for columns with a few bad values among good ones."""
    distinct = pc.dictionary_encode(column)
    values = [None if value is None else convert(value) for value in distinct.dictionary.to_pylist()]
    return pa.array(values, wanted).take(distinct.indices)


def _decoded(value: bytes | None) -> str | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        return None


def is_text(raw: pa.DataType) -> bool:
    """Whether the plain values are text or bytes."""
    plain = plain_type(raw)
    types = pa.types
    strings = (types.is_string, types.is_large_string, types.is_string_view, types.is_fixed_size_binary)
    return any(check(plain) for check in (*strings, types.is_binary, types.is_large_binary, types.is_binary_view))


def numpy_of(column: pa.Array | pa.ChunkedArray) -> npt.NDArray[Any]:
    """Convert a column to a NumPy array; copies where Arrow's memory cannot be shared."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    values: npt.NDArray[Any] = array.to_numpy(zero_copy_only=False)
    return values


def mask_of(column: pa.Array) -> Mask:
    """Convert a column of booleans without null."""
    return np.asarray(numpy_of(column), dtype=bool)


class DistinctIds:
    """Collects ids and drops repeated ones, each time when more ids wait than are already merged."""

    def __init__(self, id_type: pa.DataType) -> None:
        self._merged = pa.array([], id_type)
        self._waiting: list[pa.Array] = []

    def add(self, ids: pa.Array) -> None:
        self._waiting.append(ids)
        if sum(map(len, self._waiting)) > max(len(self._merged), 1_000_000):
            self._merge()

    def ascending(self) -> pa.Array:
        self._merge()
        return self._merged.take(pc.sort_indices(self._merged))

    def _merge(self) -> None:
        self._merged = pc.unique(pa.concat_arrays([self._merged, *self._waiting]))
        self._waiting = []
