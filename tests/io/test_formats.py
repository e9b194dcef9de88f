"""What a file holds, by its first bytes, and how its content is quoted."""

import bz2
import gzip
import io
import lzma
import sqlite3
import tarfile
import zipfile

import pyarrow as pa
import pyarrow.orc as orc
import pyarrow.parquet as pq
import pytest

from pipeline.errors import InputError
from pipeline.io.formats import COMPRESSED, HEAD_BYTES, WAY_OUT, content_of, shown, shown_names
from pipeline.io.inputs import list_log
from pipeline.io.rows import check_columns
from tests.io.inputs_on_disk import settings_for

TABLE = pa.table({"user_id": ["u1", "u2"], "event_ts": [5, 6]})


def packed(kind: str) -> bytes:
    """A small file of this kind, made by the library that owns the format."""
    sink = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(sink, "w") as archive:
            archive.writestr("log.csv", "user_id\n")
    elif kind == "Excel":
        with zipfile.ZipFile(sink, "w") as archive:
            archive.writestr("[Content_Types].xml", "<x/>")
    elif kind == "tar":
        with tarfile.open(fileobj=sink, mode="w") as archive:
            archive.addfile(tarfile.TarInfo("log.csv"), io.BytesIO())
    elif kind == "Parquet":
        pq.write_table(TABLE, sink)
    elif kind == "ORC":
        orc.write_table(TABLE, sink)
    elif kind == "Arrow":
        with pa.ipc.new_file(sink, TABLE.schema) as writer:
            writer.write_table(TABLE)
    elif kind == "SQLite":
        with sqlite3.connect(":memory:") as connection:
            connection.execute("create table log (user_id)")
            sink.write(connection.serialize())
    return sink.getvalue()


def compressed(text: bytes, codec: str) -> bytes:
    """Compress in two pieces, which make two members, streams or frames."""
    python = {"gzip": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
    pieces = []
    for piece in (text[: len(text) // 2], text[len(text) // 2 :]):
        if codec in python:
            pieces.append(python[codec](piece))
        else:
            sink = pa.BufferOutputStream()
            with pa.CompressedOutputStream(sink, codec) as stream:
                stream.write(piece)
            pieces.append(sink.getvalue().to_pybytes())
    return b"".join(pieces)


@pytest.mark.parametrize("kind", ["zip", "Excel", "tar", "Parquet", "ORC", "Arrow", "SQLite"])
def test_files_are_known_by_what_the_library_of_their_format_writes(kind):
    assert content_of(packed(kind)[:HEAD_BYTES]) == kind


@pytest.mark.parametrize("codec", COMPRESSED)
@pytest.mark.parametrize("text", [b"", b"user_id,item_id\n"])
def test_compressions_are_known_also_of_nothing(codec, text):
    assert content_of(compressed(text, codec)[:HEAD_BYTES]) == codec


@pytest.mark.parametrize(
    "head", [b"", b"user", b"PAR1,ORC\n", b"ORC,x\n", b"PARENT\x01x\n", b"BZh9,x", b"PK,x", b"\xe9"]
)
def test_text_is_text_whatever_a_column_is_called(head):
    assert content_of(head) == "text"


def test_every_content_that_is_not_read_has_a_way_out():
    named = {
        "7z",
        "rar",
        "snappy",
        "compress",
        "Avro",
        "HDF5",
        "zip",
        "tar",
        "ORC",
        "Excel",
        "SQLite",
        "Arrow",
        "Parquet",
    }
    assert set(WAY_OUT) == named


def test_what_is_quoted_has_no_control_characters_and_an_end():
    assert shown("a\x1b[2J\u202e\n") == repr("a\x1b[2J\u202e\n")
    assert shown("a\x1b[2J\u202e\n").isprintable()
    assert len(shown("\x00" * 5_000)) < 210
    assert shown_names(["user_id", "a\x1bb", ""]) == "user_id, 'a\\x1bb', ''"
    assert shown_names(f"c{number}" for number in range(4_000)).endswith("c18, c19 and 3,980 more")
    assert len(shown_names(f"c{number}" * 100 for number in range(4_000))) < 1_000


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"user_id,item_id\nu1,i1\n", "text, not Parquet (or damaged); set format: csv"),
        (gzip.compress(b"user_id,item_id\nu1,i1\n", mtime=0), "a gzip file, not Parquet (or damaged); set format: csv"),
        (packed("zip"), "a zip file, not Parquet (or damaged); unpack it"),
        (packed("Parquet")[:-3], "damaged or cut short"),
    ],
)
def test_a_file_that_is_not_parquet_is_named(tmp_path, data, words):
    lake = tmp_path / "lake"
    lake.mkdir()
    (lake / "x.parquet").write_bytes(data)
    with pytest.raises(InputError) as error:
        check_columns(list_log(settings_for(tmp_path, lake)))
    assert f"x.parquet: {words}" in str(error.value)
