"""What a catalogue says of its items, as features: whole numbers, the hashes of a column's name and a value.

Hashes need no vocabulary, so a feature is the same number on every night, and one that is new tonight has one too. N
items.
"""

import zlib

import numpy as np
import polars as pl

from pipeline.data.lists import Lists, offsets_of
from pipeline.errors import InputError
from pipeline.settings import ContentSettings

STEPS_PER_OCTAVE = 4  # of a number's size: features of intervals that grow


def features_of(items: pl.DataFrame, settings: ContentSettings) -> Lists:
    """(N,) the features of each item, distinct and ascending, below `num_hashes`; nulls and empty texts have none.

    Raises InputError for a column that is not there, or whose values cannot be read as its key says.
    """
    parts = [
        _hashed(name, _read(items, kind, name), settings.num_hashes)
        for kind in ("values", "words", "numbers")
        for name in getattr(settings, kind)
    ]
    rows = pl.concat([pl.DataFrame(schema={"row": pl.Int64, "feature": pl.Int32}), *parts])
    rows = rows.unique().sort("row", "feature")
    lengths = np.bincount(rows["row"].to_numpy(), minlength=len(items)).astype(np.int64)
    return Lists(offsets_of(lengths), rows["feature"].to_numpy().astype(np.int32))


def _read(items: pl.DataFrame, kind: str, name: str) -> pl.Series:
    """The values of a column, each as text or as a list of texts."""
    column = items[name]
    inner = column.dtype.inner if isinstance(column.dtype, pl.List) else column.dtype
    if kind == "values" and not (inner.is_nested() or inner == pl.Object):
        return column.cast(pl.List(pl.String) if isinstance(column.dtype, pl.List) else pl.String)
    if kind == "words" and column.dtype == pl.String:
        return column.str.to_lowercase().str.extract_all(r"[\p{L}\p{N}]+")
    if kind == "numbers" and column.dtype.is_numeric():
        size = column.cast(pl.Float64)
        size = size.set(~size.is_finite(), None)
        steps = ((size.abs() + 1.0).log(2.0) * STEPS_PER_OCTAVE).floor() * size.sign()
        return steps.cast(pl.Int64).cast(pl.String)
    wanted = {"values": "plain values, or lists of them", "words": "texts", "numbers": "numbers"}[kind]
    raise InputError(
        f"model.content.{kind}: the column item.{name} has values of the type {column.dtype}, not {wanted}"
    )


def _hashed(name: str, values: pl.Series, num_hashes: int) -> pl.DataFrame:
    rows = pl.DataFrame({"row": np.arange(len(values), dtype=np.int64), "value": values})
    if isinstance(values.dtype, pl.List):
        rows = rows.explode("value")
    rows = rows.drop_nulls("value").filter(pl.col("value") != "")
    distinct = rows["value"].unique()
    hashes = [zlib.crc32(f"{name}={value}".encode()) % num_hashes for value in distinct.to_list()]
    of_value = pl.DataFrame({"value": distinct, "feature": pl.Series(hashes, dtype=pl.Int32)})
    return rows.join(of_value, on="value").select("row", "feature")
