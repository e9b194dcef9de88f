"""The optional table of the users to serve."""

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import InputError
from pipeline.io.logs import Snapshot
from pipeline.io.parquet import read_parquet_bytes
from pipeline.io.storage import open_storage


def read_user_ids(queries: Snapshot) -> pa.Array:
    """The distinct `user_id`s of the table, as string or int64, ascending. Raises InputError for a null one."""
    storage = open_storage(queries.uri)
    parts = []
    for info in queries.files:
        origin = f"{storage.uri}/{info.key}"
        with storage.open(info.key) as file:
            ids = read_parquet_bytes(file, origin, columns=["user_id"])["user_id"]
        if ids.null_count:
            raise InputError(f"{origin}: {ids.null_count} rows have no user_id; remove them")
        parts.append(_plain_ids(ids, origin))
    types = {part.type for part in parts}
    if len(types) > 1:
        raise InputError(f"{queries.uri}: user_id is a string in some files and an integer in others; use one type")
    distinct = pc.unique(pa.chunked_array([chunk for part in parts for chunk in part.chunks], type=types.pop()))
    return distinct.take(pc.sort_indices(distinct))


def _plain_ids(ids: pa.ChunkedArray, origin: str) -> pa.ChunkedArray:
    if pa.types.is_dictionary(ids.type):
        ids = ids.cast(ids.type.value_type)
    if pa.types.is_integer(ids.type):
        return ids.cast(pa.int64())
    if pa.types.is_string(ids.type) or pa.types.is_large_string(ids.type):
        return ids.cast(pa.string())
    raise InputError(f"{origin}: column user_id is {ids.type}; an id is a string or an integer")
