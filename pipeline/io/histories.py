"""The Histories artifact: one Parquet file per user bucket, and the item index."""

import numpy as np
import pyarrow as pa

from pipeline.artifacts import Artifact, FileEntry
from pipeline.data.columns import numpy_of
from pipeline.data.histories import Bucket
from pipeline.data.lists import Int64, offsets_of
from pipeline.errors import InputError
from pipeline.io.artifacts import write_named_file
from pipeline.io.parquet import read_parquet_bytes, write_parquet_bytes
from pipeline.io.storage.base import ObjectNotFoundError, Storage
from pipeline.schema import SCHEMA_VERSION
from pipeline.schema import histories as histories_schema

ITEMS = "items.parquet"


def bucket_name(bucket: int) -> str:
    """The file of a user bucket, within the artifact."""
    return f"bucket-{bucket:05d}.parquet"


def read_bucket(storage: Storage, histories: Artifact, bucket: int) -> Bucket:
    """Read the histories of one user bucket. Raises InputError when they are not prepared yet."""
    return bucket_from_table(_read(storage, histories.key(bucket_name(bucket))))


def write_bucket(storage: Storage, histories: Artifact, index: int, bucket: Bucket) -> FileEntry:
    """Write bucket number `index`; writing the same bucket again is fine."""
    data = write_parquet_bytes(bucket_to_table(bucket), footer(histories))
    return write_named_file(storage, histories.prefix, bucket_name(index), data, bucket.num_users)


def read_items(storage: Storage, histories: Artifact) -> pa.Table:
    """Read the item index (`schema.items`): row i is item row i, in ascending order of `item_id`."""
    return _read(storage, histories.key(ITEMS))


def footer(histories: Artifact) -> dict[str, str]:
    """The Parquet footer of every file of the artifact."""
    return {"histories_id": histories.id, "schema_version": str(SCHEMA_VERSION)}


def bucket_to_table(bucket: Bucket) -> pa.Table:
    """Make a table with one row per user (`schema.histories`)."""
    schema = histories_schema(bucket.user_ids.type)
    offsets = pa.array(bucket.offsets.astype(np.int32))
    columns = [
        bucket.user_ids,
        *(
            pa.ListArray.from_arrays(offsets, pa.array(values), type=schema.field(name).type)
            for name, values in (
                ("item_rows", bucket.item_rows),
                ("event_ts", bucket.event_ts),
                ("weights", bucket.weights),
            )
        ),
        pa.array(bucket.num_train),
        pa.array(bucket.num_validation),
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def bucket_from_table(table: pa.Table) -> Bucket:
    """Make a bucket from a table: the inverse of `bucket_to_table`."""
    lengths: Int64 = numpy_of(table["item_rows"].combine_chunks().value_lengths()).astype(np.int64)
    return Bucket(
        user_ids=table["user_id"].combine_chunks(),
        offsets=offsets_of(lengths),
        item_rows=numpy_of(table["item_rows"].combine_chunks().flatten()),
        event_ts=numpy_of(table["event_ts"].combine_chunks().flatten()),
        weights=numpy_of(table["weights"].combine_chunks().flatten()),
        num_train=numpy_of(table["num_train"]),
        num_validation=numpy_of(table["num_validation"]),
    )


def _read(storage: Storage, key: str) -> pa.Table:
    try:
        source = storage.open(key)
    except ObjectNotFoundError:
        raise InputError(f"{storage.uri}/{key}: not there; run jobs/prepare.py first") from None
    with source:
        return read_parquet_bytes(source, f"{storage.uri}/{key}")
