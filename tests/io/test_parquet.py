import errno
import io
import pickle
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InfrastructureError, InputError
from pipeline.io.parquet import has_page_checksums, read_bounded, read_parquet_bytes, write_parquet_bytes

TABLE = pa.table(
    {
        "id": pa.array([2**53 + 1, -1, 0], pa.int64()),
        "name": ["ä", "", "日本"],
        "rows": pa.array([[1, 2], [], [3]], pa.list_(pa.int32())),
        "score": pa.array([0.1, 1e-38, -0.0], pa.float32()),
    }
)


def test_a_table_comes_back_as_it_was() -> None:
    data = write_parquet_bytes(TABLE, {"run_id": "run-1"})
    assert read_parquet_bytes(data, "t").replace_schema_metadata(None).equals(TABLE)
    assert read_parquet_bytes(pa.BufferReader(data), "t", ["score", "id"]).equals(TABLE.select(["score", "id"]))


def test_the_footer_says_what_it_was_given() -> None:
    footer = pq.read_metadata(pa.BufferReader(write_parquet_bytes(TABLE, {"run_id": "run-1"}))).metadata
    assert footer[b"run_id"] == b"run-1"
    assert read_parquet_bytes(write_parquet_bytes(TABLE, {"run_id": "run-1"}), "t").schema.metadata == {
        b"run_id": b"run-1"
    }


def test_the_same_table_gives_the_same_bytes() -> None:
    assert write_parquet_bytes(TABLE, {"a": "b"}) == write_parquet_bytes(TABLE, {"a": "b"})


def test_a_missing_column_is_named_with_those_that_are_there() -> None:
    with pytest.raises(InputError, match=r"log\.parquet: no column 'user'; it has id, name, rows, score"):
        read_parquet_bytes(write_parquet_bytes(TABLE), "log.parquet", ["id", "user"])


def test_a_column_that_is_there_twice_is_refused() -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_arrays([pa.array([1])] * 2, ["id", "id"]), sink)
    for columns in (None, ["id"]):
        with pytest.raises(InputError, match=r"items\.parquet: 2 columns are called 'id'"):
            read_bounded(pa.BufferReader(sink.getvalue()), "items.parquet", columns, 1_000)


@pytest.mark.parametrize("data", [b"", b"PAR1", b"not parquet at all", b"PAR1" + b"\0" * 100 + b"PAR1"])
def test_what_is_no_parquet_is_named(data: bytes) -> None:
    with pytest.raises(InputError, match=r"^log\.parquet: damaged or cut short"):
        read_parquet_bytes(data, "log.parquet")


def test_a_truncated_file_is_refused_wherever_it_was_cut() -> None:
    data = write_parquet_bytes(TABLE)
    for length in range(0, len(data), 37):
        with pytest.raises(InputError, match="cut"):
            read_parquet_bytes(data[:length], "cut")


def test_no_flipped_bit_is_read_as_good_data() -> None:
    rng = random.Random(1)
    table = pa.table({"x": [rng.random() for _ in range(5_000)], "y": [str(rng.random()) for _ in range(5_000)]})
    data = write_parquet_bytes(table)
    end_of_pages = max(
        chunk.data_page_offset + chunk.total_compressed_size
        for chunk in (pq.read_metadata(pa.BufferReader(data)).row_group(0).column(i) for i in range(2))
    )
    silent = 0
    for _ in range(300):
        flipped = bytearray(data)
        flipped[rng.randrange(4, min(end_of_pages, len(data)))] ^= 1 << rng.randrange(8)
        try:
            silent += not read_parquet_bytes(bytes(flipped), "flipped").equals(table)
        except InputError:
            continue
    assert silent == 0


class PickledType(pa.ExtensionType):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__(pa.binary(), "tests.pickled")

    def __arrow_ext_serialize__(self) -> bytes:
        return b""

    @classmethod
    def __arrow_ext_deserialize__(cls, *_: object) -> "PickledType":
        return cls()


@pytest.mark.parametrize("is_registered", [True, False])
@pytest.mark.parametrize("is_nested", [True, False])
def test_a_column_that_can_carry_code_is_refused(is_registered: bool, is_nested: bool) -> None:
    pa.register_extension_type(PickledType())
    values = pa.ExtensionArray.from_storage(PickledType(), pa.array([pickle.dumps(1)]))
    column = pa.StructArray.from_arrays([values], ["inner"]) if is_nested else values
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"id": [1], "payload": column}), sink)
    data = sink.getvalue().to_pybytes()
    if not is_registered:
        pa.unregister_extension_type("tests.pickled")
    try:
        with pytest.raises(InputError, match=r"column '(payload|inner)' has the extension type"):
            read_parquet_bytes(data, "log.parquet", ["id"])
    finally:
        if is_registered:
            pa.unregister_extension_type("tests.pickled")


def test_a_store_that_fails_half_way_is_not_taken_for_damage() -> None:
    class Failing(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(InfrastructureError, match="the store failed"):
        read_parquet_bytes(pa.PythonFile(Failing(b"x" * 1_000), mode="r"), "log.parquet")


@pytest.mark.parametrize("has_checksums", [True, False])
@pytest.mark.parametrize("number", [1, 300_000])
@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("use_dictionary", [True, False])
def test_pages_with_checksums_are_told_from_those_without(has_checksums, number, version, use_dictionary) -> None:
    sink = pa.BufferOutputStream()
    table = pa.table({"a": [f"x{i % 7}" * 40 for i in range(number)]})
    form = {"write_page_checksum": has_checksums, "data_page_version": version, "use_dictionary": use_dictionary}
    pq.write_table(table, sink, **form)
    source = pa.BufferReader(sink.getvalue())
    assert has_page_checksums(source, pq.ParquetFile(source).metadata) == has_checksums


def test_a_file_without_a_row_has_nothing_to_check() -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"a": pa.array([], pa.string())}), sink)
    source = pa.BufferReader(sink.getvalue())
    assert has_page_checksums(source, pq.ParquetFile(source).metadata)


@pytest.mark.parametrize("as_dictionary", [True, False])
def test_a_small_file_that_unfolds_into_a_large_table_is_refused(as_dictionary: bool) -> None:
    number, size = 3_000, 20_000
    values = pa.DictionaryArray.from_arrays(pa.array([0] * number, pa.int32()), pa.array(["x" * size]))
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"id": values if as_dictionary else values.cast(pa.string())}), sink)
    data = sink.getvalue()
    assert data.size < 100_000
    with pytest.raises(InputError, match=r"items: its first \d+ of 3000 rows take 0.0 GB in memory"):
        read_bounded(pa.BufferReader(data), "items", None, max_bytes=number * size // 2)
    assert read_bounded(pa.BufferReader(data), "items", ["id"], max_bytes=2 * number * size).num_rows == number
