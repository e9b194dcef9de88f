"""The tables that tonight's rules read: attributes of queries, and lists of blocked items."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.availability import is_before_end
from pipeline.data.catalog import without_dictionaries
from pipeline.data.ids import ids_of_table
from pipeline.data.sources import IdType
from pipeline.errors import InputError
from pipeline.io.inputs import MAX_USERS_BYTES, Files, Log
from pipeline.io.parquet import arrow_errors_named, read_bounded
from pipeline.io.storage.base import ObjectInfo

UNTIL = "until"


@dataclass(frozen=True)
class Blocks:
    """The items that a rule blocks: each for the user at the same place, or without `user_ids` for everybody."""

    name: str
    item_ids: pa.Array
    user_ids: pa.Array | None


def attribute_names(queries: Files) -> list[str]:
    """The columns of the queries table, but for `user_id`, by its first file. Raises InputError for a file that cannot
    be read."""
    return [name for name in _column_names(queries, queries.files[0]) if name != "user_id"]


def names_users(blocked: Files) -> bool:
    """Whether a table of blocked items is of single users, by its first file."""
    return "user_id" in _column_names(blocked, blocked.files[0])


def _column_names(files: Files, file: ObjectInfo) -> list[str]:
    with arrow_errors_named(files.origin(file)), files.open(file) as source:
        names: list[str] = pq.read_schema(source).names
    return names


def read_attributes(queries: Files, columns: Sequence[str], wanted: pa.DataType, declared: IdType) -> pa.Table:
    """Read `user_id` and the attributes `columns` of the queries table, a row per user in ascending order; ids as in
    `read_user_ids`.

    Raises InputError as `read_user_ids`, and for a user with two rows that differ.
    """
    tables = []
    for file in queries.files:
        origin = queries.origin(file)
        names = ["user_id", *(name for name in columns if name != "user_id")]
        with queries.open(file) as source:
            table = without_dictionaries(read_bounded(source, origin, names, MAX_USERS_BYTES))
        ids = ids_of_table(table["user_id"], "user_id", wanted, declared, origin)
        tables.append(table.set_column(table.column_names.index("user_id"), "user_id", ids))
    try:
        joined = pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowTypeError as error:
        raise InputError(f"{queries.name}: a column has other types in other files: {error}") from None
    rows = pl.DataFrame(pl.from_arrow(joined)).unique().sort("user_id")
    doubled = rows.filter(pl.col("user_id").is_duplicated())["user_id"]
    if len(doubled):
        raise InputError(
            f"{queries.name}: user_id {doubled[0]!r} has rows with different values; keep one row per user"
        )
    return rows.to_arrow().cast(pa.schema([joined.schema.field(name) for name in rows.columns]))


def read_blocks(
    name: str, blocked: Files, user_type: pa.DataType, item_type: pa.DataType, log: Log, ds: date
) -> Blocks:
    """Read the table of the rule `name`: the pairs that it blocks at the end of `ds`.

    Raises InputError for a missing column, ids of another type than the log's, null, and an `until` that is no time.
    """
    parts = []
    for file in blocked.files:
        origin = blocked.origin(file)
        names = _column_names(blocked, file)
        if "item_id" not in names:
            raise InputError(f"{origin}: no column 'item_id'; the table has {', '.join(names[:20])}")
        read = [name for name in ("user_id", "item_id", UNTIL) if name in names]
        with blocked.open(file) as source:
            table = without_dictionaries(read_bounded(source, origin, read, MAX_USERS_BYTES))
        if UNTIL in table.column_names:
            table = table.filter(pa.array(is_before_end(table[UNTIL], UNTIL, ds, origin)))
        items = ids_of_table(table["item_id"], "item_id", item_type, log.source.item_id_type, origin)
        users = None
        if "user_id" in table.column_names:
            users = ids_of_table(table["user_id"], "user_id", user_type, log.source.user_id_type, origin)
        parts.append(Blocks(name, items, users))
    if len({part.user_ids is None for part in parts}) > 1:
        raise InputError(f"{blocked.name}: some of its files have a column 'user_id' and some have none")
    users = [part.user_ids for part in parts if part.user_ids is not None]
    return Blocks(name, pa.concat_arrays([part.item_ids for part in parts]), pa.concat_arrays(users) if users else None)
