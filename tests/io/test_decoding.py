"""Text of any compression and encoding against Python's own codecs."""

import codecs
import gzip
from io import BytesIO

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.sources import CsvFormat
from pipeline.errors import InputError
from pipeline.io.decoding import UNREADABLE, Converted, Decoding, Replacing, open_text
from pipeline.io.formats import COMPRESSED
from tests.io.test_formats import compressed, packed
from tests.io.text_logs import cells, num_malformed, read

TWICE = gzip.compress(gzip.compress(b"x", mtime=0), mtime=0)
TEXT = "user_id,item_id,event_ts,title\nu1,i1,5,café\nu2,i2,6,naïve\n"
ROWS = [("u1", "i1", "5"), ("u2", "i2", "6")]


@pytest.mark.parametrize("codec", COMPRESSED)
@pytest.mark.parametrize("name", ["log.csv", "log.csv.gz", "part-0000"])
def test_compression_is_seen_by_content_and_never_by_name(tmp_path, codec, name):
    assert cells(read(tmp_path, compressed(TEXT.encode(), codec), name)) == ROWS


def test_text_that_is_called_gz_is_text(tmp_path):
    assert cells(read(tmp_path, TEXT, "log.csv.gz")) == ROWS


@pytest.mark.parametrize("codec", COMPRESSED)
@pytest.mark.parametrize("cut", [0.5, 0.95])
@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_a_compressed_file_that_is_cut_short_is_refused(tmp_path, codec, cut, encoding):
    lines = "".join(f"u{number * 7919 % 10_007},i{number},{number},é\n" for number in range(30_000))
    data = compressed(("user_id,item_id,event_ts,title\n" + lines).encode(encoding), codec)
    with pytest.raises(InputError, match=r"log\.csv: damaged or cut short"):
        read(tmp_path, data[: int(len(data) * cut)], encoding=encoding)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (packed("zip"), "a zip file, not text; unpack it"),
        (packed("tar"), "a tar file, not text; unpack it"),
        (gzip.compress(packed("tar"), mtime=0), "a tar file in a compressed file, not text; unpack it"),
        (TWICE, "a gzip file in a compressed file, not text; compress it only once"),
        (packed("Parquet"), "a Parquet file, not text; set format: parquet"),
        (packed("Excel"), "an Excel file, not text; write it as Parquet or CSV"),
        (b"7z\xbc\xaf\x27\x1c", "a 7z file, not text; unpack it"),
        (b"Rar!\x1a\x07\x01\x00", "a rar file, not text; unpack it"),
        (
            b"\xff\x06\x00\x00sNaPpY",
            "a snappy file, not text; unpack it, or compress it with gzip, zstd, bz2, xz or lz4",
        ),
        (TEXT.encode("utf-16-le"), "set csv: {encoding: utf-16-le}"),
        (TEXT.encode("utf-16-be"), "set csv: {encoding: utf-16-be}"),
    ],
)
def test_what_is_no_text_is_refused_by_name_with_the_way_out(tmp_path, data, words):
    with pytest.raises(InputError) as error:
        read(tmp_path, data)
    assert words in str(error.value)
    assert str(error.value).isprintable()


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_says_the_encoding(tmp_path, encoding):
    assert cells(read(tmp_path, TEXT.encode(encoding))) == ROWS
    assert cells(read(tmp_path, codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"))) == ROWS


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16", "utf-16-le", "cp037"])
def test_the_encoding_of_the_source_holds_for_names_and_values(tmp_path, encoding):
    text = TEXT.replace("u1", "ü1").replace("title", "título")
    assert cells(read(tmp_path, text.encode(encoding), encoding=encoding))[0] == ("ü1", "i1", "5")


def test_bytes_that_are_not_utf8_do_no_harm_where_nobody_reads_and_make_an_id_unreadable(tmp_path):
    text = TEXT.replace("u2", "ü2") + "cut\xe9\n"
    parts = read(tmp_path, text.encode("latin-1"))
    users = [user for part in parts for user in part.table["user_id"].to_pylist()]
    assert users == [b"u1", b"\xff2"]
    assert num_malformed(parts) == 1
    assert [line for part in parts for line in part.malformed] == ["cut\ufffd"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_late_malformed_line_that_is_not_utf8_names_the_setting(tmp_path):
    text = "user_id,item_id,event_ts\n" + "u1,i1,5\n" * 200_000
    with pytest.raises(InputError, match=r"log\.csv: after row \d.*set csv: \{encoding: latin-1\}.* in mine\.yaml"):
        read(tmp_path, text.encode() + b"caf\xe9,1\n")


def test_an_encoding_that_python_does_not_know_is_refused_when_the_source_is_read():
    for name in ("nonsense", "base64", "undefined"):
        with pytest.raises(ValueError, match=f"no encoding of text is called '{name}'"):
            CsvFormat(encoding=name)


@given(
    st.text(max_size=40),
    st.sampled_from(["utf-8", "utf-16", "utf-32", "latin-1", "cp1252", "shift_jis"]),
    st.integers(1, 9),
)
def test_a_text_is_decoded_wherever_reads_cut_it(text, encoding, size):
    data = text.encode(encoding, "ignore")
    stream = Converted(BytesIO(data), Decoding(encoding))
    assert b"".join(iter(lambda: stream.read(size), b"")).decode() == data.decode(encoding)


@given(st.binary(max_size=40), st.integers(1, 9))
def test_bytes_that_are_not_in_the_encoding_are_marked(data, size):
    decoding = Decoding("utf-8")
    stream = Converted(BytesIO(data), decoding)
    found = b"".join(iter(lambda: stream.read(size), b"")).decode()
    assert found.replace(UNREADABLE, "") == data.decode("utf-8", "ignore").replace(UNREADABLE, "")
    assert decoding.found_unreadable == (UNREADABLE in found)


@given(st.binary(max_size=60), st.sampled_from([b"::", b"ab", b"aab", b"-->"]), st.integers(1, 9), st.data())
def test_a_sequence_is_replaced_wherever_reads_cut_it(data, old, size, draws):
    for position in sorted(draws.draw(st.lists(st.integers(0, len(data)), max_size=4)), reverse=True):
        data = data[:position] + old + data[position:]
    stream = Converted(BytesIO(data), Replacing(old, b"\x1f"))
    assert b"".join(iter(lambda: stream.read(size), b"")) == data.replace(old, b"\x1f")


def test_only_a_text_that_must_be_converted_goes_through_a_temporary_file():
    def is_read_in_place(data: bytes, **form: object) -> bool:
        text = open_text(pa.BufferReader(data), CsvFormat.model_validate(form), "x")
        text.stream.read(1_000)
        return text.is_as_arrow_reads_it

    assert is_read_in_place(TEXT.encode())
    assert is_read_in_place(gzip.compress(TEXT.encode()))
    assert not is_read_in_place(TEXT.encode("latin-1"))
    assert not is_read_in_place(TEXT.encode("utf-16"))
    assert not is_read_in_place(compressed(TEXT.encode(), "xz"))
    assert not is_read_in_place(b"a::b\n", delimiter="::", quote="")
