import zlib
from dataclasses import replace

import numpy as np
import pyarrow as pa

from pipeline.data.histories import Bucket, user_bucket
from pipeline.data.lists import Lists
from pipeline.data.seen import IN_ALL_PARTS


def make_bucket() -> Bucket:
    """Three users: a with events 0 1 2, b with none, c with 3 4 5 6."""
    return Bucket(
        user_ids=pa.array(["a", "b", "c"]),
        offsets=np.array([0, 3, 3, 7]),
        item_rows=np.arange(7, dtype=np.int32),
        event_ts=np.arange(7, dtype=np.int64),
        weights=np.ones(7, dtype=np.float32),
        hides=np.full(7, IN_ALL_PARTS, np.uint8),
        num_train=np.array([1, 0, 2], dtype=np.int32),
        num_validation=np.array([1, 0, 1], dtype=np.int32),
        left_out=pa.array(["", "a bot", ""]),
        also_seen=Lists.empty(3),
    )


def test_a_cut_shows_the_beginning_of_each_history():
    bucket = make_bucket()
    assert bucket.cut("train").values.tolist() == [0, 3, 4]
    assert bucket.cut("before_test").values.tolist() == [0, 1, 3, 4, 5]
    assert bucket.cut("whole").values.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert bucket.cut("train").offsets.tolist() == [0, 1, 1, 3]


def test_a_cut_has_the_columns_that_are_asked_for():
    bucket = replace(make_bucket(), event_ts=np.arange(10, 17), weights=np.arange(20, 27, dtype=np.float32))
    assert not bucket.cut("train").columns
    columns = bucket.cut("before_test", frozenset({"times", "weights"})).columns
    assert columns["times"].tolist() == [10, 11, 13, 14, 15]
    assert columns["weights"].tolist() == [20, 21, 23, 24, 25]
    assert bucket.cut("whole", frozenset({"times"})).columns.keys() == {"times"}
    assert not bucket.seen("whole").columns


def test_a_cut_and_what_it_holds_out_are_the_whole_history():
    bucket = make_bucket()
    assert bucket.held_out("validation").values.tolist() == [1, 5]
    assert bucket.held_out("test").values.tolist() == [2, 6]
    assert bucket.held_out("test").lengths.tolist() == [1, 0, 1]


def test_the_last_events_are_aligned_left_and_padded_right():
    rows, lengths = make_bucket().cut("whole").last(3)
    assert rows.tolist() == [[0, 1, 2], [-1, -1, -1], [4, 5, 6]]
    assert lengths.tolist() == [3, 0, 3]
    rows, lengths = make_bucket().cut("train").last(3)
    assert rows.tolist() == [[0, -1, -1], [-1, -1, -1], [3, 4, -1]]
    assert lengths.tolist() == [1, 0, 2]


def test_the_bucket_of_a_user_is_the_crc32_of_the_id_as_text():
    assert user_bucket(pa.array(["u0001234", "ü"]), 7).tolist() == [
        zlib.crc32(b"u0001234") % 7,
        zlib.crc32("ü".encode()) % 7,
    ]
    assert user_bucket(pa.array([-5, 12]), 7).tolist() == [zlib.crc32(b"-5") % 7, zlib.crc32(b"12") % 7]


def test_user_keys_are_ids_or_their_checksums():
    assert make_bucket().user_keys.tolist() == [zlib.crc32(name) for name in (b"a", b"b", b"c")]
    empty = np.zeros(0, dtype=np.int32)
    bucket = Bucket(
        pa.array([2**53 + 1], pa.int64()), np.array([0, 0]), empty, empty.astype(np.int64), empty.astype(np.float32),
        empty.astype(np.uint8), np.zeros(1, np.int32), np.zeros(1, np.int32), pa.array([""]), Lists.empty(1),
    )  # fmt: skip
    assert bucket.user_keys.tolist() == [2**53 + 1]
