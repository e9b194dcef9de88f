import re

import numpy as np
import pyarrow as pa
import pytest

from pipeline.artifacts import Artifact
from pipeline.data.histories import Bucket
from pipeline.data.lists import Lists
from pipeline.errors import InputError
from pipeline.io.histories import (
    bucket_from_table,
    bucket_to_table,
    read_bucket,
    read_eligible,
    read_item_ids,
    read_items,
    write_bucket,
    write_items,
)
from pipeline.io.parquet import read_parquet_bytes, write_parquet_bytes
from pipeline.io.storage import open_storage
from pipeline.io.storage.base import Storage
from pipeline.schema import SCHEMA_VERSION
from pipeline.schema import histories as histories_schema
from tests.item_index import item_index

HISTORIES = Artifact("histories", "0123456789abcdef")


def make_bucket(user_ids: pa.Array) -> Bucket:
    lengths = np.arange(len(user_ids))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    number = int(offsets[-1])
    return Bucket(
        user_ids=user_ids,
        offsets=offsets,
        item_rows=np.arange(number, dtype=np.int32),
        event_ts=np.arange(number, dtype=np.int64) + 2**60,
        weights=np.linspace(0, 1, number, dtype=np.float32),
        hides=(np.arange(number) % 8).astype(np.uint8),
        num_train=(lengths // 2).astype(np.int32),
        num_validation=(lengths - lengths // 2).astype(np.int32),
        left_out=pa.array([""] * (len(user_ids) - 1) + ["a bot"] * bool(len(user_ids)), pa.string()),
        also_seen=Lists.of([[number, 7] for number in range(len(user_ids))]),
    )


@pytest.mark.parametrize(
    "user_ids",
    [pa.array(["a", "b", "ü"]), pa.array([2**53 + 1, -4], pa.int64()), pa.array([], pa.string())],
)
def test_a_bucket_reads_back_as_it_was_written(storage: Storage, user_ids):
    bucket = make_bucket(user_ids)
    entry = write_bucket(storage, HISTORIES, 3, bucket)
    found = read_bucket(storage, HISTORIES, 3)
    assert found.user_ids.equals(bucket.user_ids)
    assert found.left_out.equals(bucket.left_out)
    assert found.also_seen.offsets.tolist() == bucket.also_seen.offsets.tolist()
    assert found.also_seen.values.tolist() == bucket.also_seen.values.tolist()
    for name in ("offsets", "item_rows", "event_ts", "weights", "hides", "num_train", "num_validation"):
        assert np.array_equal(getattr(found, name), getattr(bucket, name)), name
        assert getattr(found, name).dtype == getattr(bucket, name).dtype, name
    assert re.fullmatch(r"bucket-00003-\w{16}\.parquet", entry.key)
    assert entry.rows == len(user_ids)
    assert storage.head(f"histories/0123456789abcdef/{entry.key}").size == entry.bytes


def test_the_file_has_our_schema_and_says_whose_it_is(tmp_path):
    storage = open_storage(str(tmp_path))
    entry = write_bucket(storage, HISTORIES, 0, make_bucket(pa.array(["a", "b"])))
    footer = read_parquet_bytes(storage.read(HISTORIES.key(entry.key)), "bucket").schema.metadata
    assert footer == {b"histories_id": HISTORIES.id.encode(), b"schema_version": str(SCHEMA_VERSION).encode()}
    assert bucket_to_table(make_bucket(pa.array(["a", "b"]))).schema.equals(histories_schema(pa.string()))


def test_a_bucket_in_several_chunks_is_read_whole():
    table = bucket_to_table(make_bucket(pa.array(["a", "b", "c", "d"])))
    chunked = pa.concat_tables([table.slice(2), table.slice(0, 2)])
    found = bucket_from_table(chunked)
    assert found.user_ids.to_pylist() == ["c", "d", "a", "b"]
    assert found.item_rows.tolist() == [1, 2, 3, 4, 5, 0]
    assert found.offsets.tolist() == [0, 2, 5, 5, 6]


def test_of_two_attempts_with_other_bytes_the_first_stands(tmp_path, monkeypatch):
    """As when a night began before an upgrade of pyarrow, and goes on after it."""
    storage, bucket = open_storage(str(tmp_path)), make_bucket(pa.array(["a", "b"]))
    first = write_bucket(storage, HISTORIES, 0, bucket)
    monkeypatch.setattr("pipeline.io.histories.write_parquet_bytes", other_bytes)
    assert write_bucket(storage, HISTORIES, 0, bucket) == first
    assert read_bucket(storage, HISTORIES, 0).user_ids.to_pylist() == ["a", "b"]
    storage.delete(HISTORIES.key(first.key))  # the first attempt's file is lost: the next one stands
    second = write_bucket(storage, HISTORIES, 0, bucket)
    assert second != first
    assert read_bucket(storage, HISTORIES, 0).user_ids.to_pylist() == ["a", "b"]


def other_bytes(table: pa.Table, footer: dict[str, str]) -> bytes:
    return write_parquet_bytes(table, footer | {"written_by": "another version"})


def test_only_the_columns_that_are_asked_for_are_read(tmp_path):
    storage = open_storage(str(tmp_path))
    write_items(storage, HISTORIES, item_index(pa.array(["a", "b"]), [1, 2], [True, False]))
    assert read_items(storage, HISTORIES, ["num_events"]).to_pydict() == {"num_events": [1, 2]}
    assert read_item_ids(storage, HISTORIES).to_pylist() == ["a", "b"]
    assert read_eligible(storage, HISTORIES).tolist() == [True, False]


def test_histories_that_were_not_prepared_say_what_to_run(tmp_path):
    storage = open_storage(str(tmp_path))
    with pytest.raises(InputError, match=r"run jobs/prepare\.py first"):
        read_bucket(storage, HISTORIES, 0)
    with pytest.raises(InputError, match=r"run jobs/prepare\.py first"):
        read_items(storage, HISTORIES)
