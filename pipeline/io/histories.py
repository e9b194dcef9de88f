"""The Histories artifact: one Parquet file per user bucket, and the item index."""

import json
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from pipeline.artifacts import Artifact, FileEntry
from pipeline.data.columns import Mask, mask_of, numpy_of
from pipeline.data.histories import Bucket
from pipeline.data.lists import Int64, Lists, offsets_of
from pipeline.errors import InputError
from pipeline.io.artifacts import Claims, read_file, read_manifest, sizes_of, write_file
from pipeline.io.parquet import read_parquet_bytes, write_parquet_bytes
from pipeline.io.storage.base import Storage
from pipeline.schema import SCHEMA_VERSION
from pipeline.schema import histories as histories_schema


def bucket_claims(storage: Storage, histories: Artifact) -> Claims[FileEntry]:
    """The claims of the user buckets: part n is bucket n."""
    return Claims(storage, histories.prefix, "bucket", FileEntry, lambda entry: sizes_of(histories.prefix, entry))


def items_claims(storage: Storage, histories: Artifact) -> Claims[FileEntry]:
    """The claim of the item index: part 0 is the only one."""
    return Claims(storage, histories.prefix, "items", FileEntry, lambda entry: sizes_of(histories.prefix, entry))


def read_bucket(storage: Storage, histories: Artifact, bucket: int) -> Bucket:
    """Read the histories of one user bucket. Raises InputError when they are not prepared yet."""
    return bucket_from_table(_read(bucket_claims(storage, histories), bucket))


def write_bucket(storage: Storage, histories: Artifact, index: int, bucket: Bucket) -> FileEntry:
    """Write bucket number `index` and its claim. The first attempt's entry stands."""
    return _write(bucket_claims(storage, histories), index, bucket_to_table(bucket), histories)


def read_items(storage: Storage, histories: Artifact, columns: Sequence[str] | None = None) -> pa.Table:
    """Read columns of the item index (`schema.items`), or all: row i is item row i, in ascending order of `item_id`.

    Raises InputError when the histories are not prepared yet.
    """
    return _read(items_claims(storage, histories), 0, columns)


def read_item_ids(storage: Storage, histories: Artifact) -> pa.Array:
    """Read the id of each item. Raises InputError when the histories are not prepared yet."""
    return read_items(storage, histories, ["item_id"])["item_id"].combine_chunks()


def read_eligible(storage: Storage, histories: Artifact) -> Mask:
    """Read which items may be shown tonight; (N,). Raises InputError when the histories are not prepared yet."""
    return mask_of(read_items(storage, histories, ["is_eligible"])["is_eligible"])


def read_num_events(storage: Storage, histories: Artifact, part: str) -> Int64:
    """Read the number of events of each item in a part of the histories (`pipeline.data.seen.PARTS`); (N,).

    Raises InputError when the histories are not prepared yet, KeyError for a part that there is not.
    """
    columns = {
        "train": ["num_train_events"],
        "before_test": ["num_train_events", "num_validation_events"],
        "whole": ["num_events"],
    }[part]
    items = read_items(storage, histories, columns)
    return sum((numpy_of(items[name]).astype(np.int64) for name in columns), start=np.zeros(len(items), np.int64))


def write_items(storage: Storage, histories: Artifact, items: pa.Table) -> FileEntry:
    """Write the item index (`schema.items`) and its claim. The first attempt's entry stands."""
    return _write(items_claims(storage, histories), 0, items, histories)


def footer(histories: Artifact) -> dict[str, str]:
    """The Parquet footer of every file of the artifact."""
    return {"histories_id": histories.id, "schema_version": str(SCHEMA_VERSION)}


def bucket_to_table(bucket: Bucket) -> pa.Table:
    """Make a table with one row per user (`schema.histories`)."""
    schema = histories_schema(bucket.user_ids.type)

    def lists(name: str, offsets: Int64, values: np.ndarray) -> pa.Array:
        return pa.ListArray.from_arrays(offsets.astype(np.int32), pa.array(values), type=schema.field(name).type)

    columns = [
        bucket.user_ids,
        lists("item_rows", bucket.offsets, bucket.item_rows),
        lists("event_ts", bucket.offsets, bucket.event_ts),
        lists("weights", bucket.offsets, bucket.weights),
        lists("hides", bucket.offsets, bucket.hides),
        pa.array(bucket.num_train),
        pa.array(bucket.num_validation),
        bucket.left_out,
        lists("also_seen", bucket.also_seen.offsets, bucket.also_seen.values),
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def bucket_from_table(table: pa.Table) -> Bucket:
    """Make a bucket from a table: the inverse of `bucket_to_table`."""
    events, also_seen = _lists(table["item_rows"]), _lists(table["also_seen"])
    return Bucket(
        user_ids=table["user_id"].combine_chunks(),
        offsets=events.offsets,
        item_rows=events.values,
        event_ts=numpy_of(table["event_ts"].combine_chunks().flatten()),
        weights=numpy_of(table["weights"].combine_chunks().flatten()),
        hides=numpy_of(table["hides"].combine_chunks().flatten()),
        num_train=numpy_of(table["num_train"]),
        num_validation=numpy_of(table["num_validation"]),
        left_out=table["left_out"].combine_chunks(),
        also_seen=also_seen,
    )


def _lists(column: pa.ChunkedArray) -> Lists:
    array = column.combine_chunks()
    lengths: Int64 = numpy_of(array.value_lengths()).astype(np.int64)
    return Lists(offsets_of(lengths), numpy_of(array.flatten()))


def _write(claims: Claims[FileEntry], part: int, table: pa.Table, histories: Artifact) -> FileEntry:
    data = write_parquet_bytes(table, footer(histories))
    name = f"{claims.stem}-{part:05d}.parquet"
    return claims.claim(part, write_file(claims.storage, claims.prefix, name, data, table.num_rows))


def _read(claims: Claims[FileEntry], part: int, columns: Sequence[str] | None = None) -> pa.Table:
    storage, entry = claims.storage, claims.read(part)
    if entry is None:
        raise InputError(f"{storage.uri}/{claims.key(part)}: not there, or its file is gone; run jobs/prepare.py first")
    key = f"{claims.prefix}/{entry.key}"
    with storage.open(key) as source:
        return read_parquet_bytes(source, f"{storage.uri}/{key}", columns)


def odd_days(storage: Storage, histories: Artifact) -> list[str]:
    """What `prepare` found odd about the events of the night's day, in words; nothing where it did not look."""
    manifest = read_manifest(storage, histories.prefix)
    found: list[str] = []
    for entry in manifest.files if manifest else ():
        if entry.key.startswith("validation-"):
            validation = json.loads(read_file(storage, histories.prefix, entry, "remove the histories, prepare again"))
            found += [f"the log: {finding['words']}" for finding in validation.get("odd", ())]
    return found
