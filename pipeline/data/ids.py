"""Convert ids of any type into ours, string or int64, so that each comes back as the same text."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.columns import (
    TEXT,
    Mask,
    cast_exactly,
    is_text,
    mask_of,
    numpy_of,
    plain_column,
    plain_type,
    text_of,
)
from pipeline.data.lists import Int64
from pipeline.data.sources import IdType
from pipeline.errors import InputError

# What exports write where there is nobody.
_WORDS = """nan NaN NAN nat NaT none None NONE null Null NULL nil <nil> <NA> <null> (null) (none) \\N N/A n/a #N/A
NA undefined unknown Unknown UNKNOWN anonymous Anonymous 00000000-0000-0000-0000-000000000000"""
WORDS_FOR_NOBODY = (*_WORDS.split(), "(not set)")


MAX_ID_BYTES = 1 << 16


def id_type(raw: pa.DataType, declared: IdType, column: str, way_out: str) -> pa.DataType:
    """The type that ids of this Arrow type are read as: int64 or string; null for a column of nulls, which fits both.

    Raises InputError for a type that cannot be an id; `way_out` is the key that declares the ids as text.
    """
    plain = plain_type(raw)
    if pa.types.is_null(plain):
        return plain
    is_whole = pa.types.is_integer(plain) or (pa.types.is_decimal(plain) and plain.scale == 0)
    if pa.types.is_decimal(plain) and declared == "as_is":
        raise InputError(f"column {column!r} is {plain}; set {way_out}: string to read its ids as text")
    if not is_text(plain) and not is_whole:
        raise InputError(f"column {column!r} is {plain}; an id must be an integer or text (cast it in the log)")
    if declared == "as_is":
        return TEXT if is_text(plain) else pa.int64()
    return TEXT if declared == "string" else pa.int64()


def read_ids(column: pa.Array, wanted: pa.DataType) -> tuple[pa.Array, Mask, Mask]:
    """Read ids as type `wanted` (int64 or string); masks of null and of unreadable ids. Empty text is null.

    Text of more than MAX_ID_BYTES is unreadable: no id is that long, and memory holds many. Text is read as int64 where
    the number is written as the text again: '007' and '0x7' are unreadable, not 7.
    """
    plain, is_null, is_undecodable = plain_column(column)
    if is_text(plain.type) and (pc.max(pc.binary_length(plain)).as_py() or 0) > MAX_ID_BYTES:
        is_short = pc.less_equal(pc.binary_length(plain), MAX_ID_BYTES)
        plain = pc.if_else(is_short, plain, pa.scalar(None, plain.type))
    ids = cast_exactly(plain, wanted)
    if is_text(plain.type) and pa.types.is_integer(wanted):
        same = pc.fill_null(pc.equal(ids.cast(TEXT), plain.cast(TEXT)), False)
        ids = pc.if_else(same, ids, pa.scalar(None, wanted))
    return ids, is_null, (mask_of(pc.is_null(ids)) & ~is_null) | is_undecodable


def rows_among(ids: pa.Array, known: pa.Array) -> Int64:
    """The place of each id in `known`, -1 for one that is not there. Ids of another type are compared as text."""
    if ids.type != known.type:
        ids, known = ids.cast(TEXT), known.cast(TEXT)
    return numpy_of(pc.fill_null(pc.index_in(ids, known), -1)).astype(np.int64)


def words_in(ids: pa.Array, words: tuple[str, ...]) -> Mask:
    """Which ids are one of `words`; an id that is a number is none."""
    if not is_text(ids.type) or not words:
        return np.zeros(len(ids), dtype=bool)
    return mask_of(pc.is_in(ids, pa.array(words, ids.type)))


def ids_of_table(column: pa.ChunkedArray, name: str, wanted: pa.DataType, declared: IdType, origin: str) -> pa.Array:
    """The ids of a table beside the log, the catalogue or the queries, with the log's type; `declared` is its id type.

    Raises InputError for ids of another type, for null, and for ids that cannot be read.
    """
    try:
        found = id_type(column.type, declared, name, f"{name}_type")
    except InputError as error:
        raise InputError(f"{origin}: {error}") from None
    if found != wanted and not pa.types.is_null(found):
        raise InputError(
            f"{origin}: {name} is {found} there, but {wanted} in the log; write the table with the log's type, or set "
            f"{name}_type: string in the log's source to read both as text"
        )
    ids, is_null, is_bad = read_ids(column.combine_chunks(), wanted)
    if is_null.any():
        raise InputError(f"{origin}: {is_null.sum()} rows have no {name} (null or empty); remove them")
    if is_bad.any():
        example = text_of(column.combine_chunks().filter(pa.array(is_bad))[:1])[0].as_py()
        raise InputError(f"{origin}: {is_bad.sum()} rows have a {name} that is no {wanted}, for example {example!r}")
    return ids
