"""Delimited text against Python's own csv: any delimiter, quotes, blocks, and lines that are no rows."""

import csv
import gzip
import io
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.sources import SourceSpec
from pipeline.io import delimited
from pipeline.io.decoding import Converted, Replacing
from pipeline.io.delimited import RawRows
from pipeline.io.formats import SHOWN
from pipeline.io.inputs import Log
from pipeline.io.rows import check_columns, read_rows
from pipeline.io.storage import open_storage

NAMES = ("user_id", "item_id", "event_ts")
TITLES = ["user_id", "item_id", "event_ts"]


def source_of(delimiter: str, quote: str = '"', column_names: tuple[str, ...] = ()) -> SourceSpec:
    form = {"delimiter": delimiter, "quote": quote, "column_names": column_names}
    return SourceSpec.model_validate({"format": "csv", "files": "*", "time_unit": "s", "csv": form})


def read(tmp_path: Path, text: str, delimiter: str = ",", name: str = "log.csv", **form: object) -> list[RawRows]:
    (tmp_path / "lake").mkdir(exist_ok=True)
    data = text.encode()
    (tmp_path / "lake" / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    storage = open_storage(str(tmp_path / "lake"))
    log = Log(storage.uri, tuple(storage.list()), source=source_of(delimiter, **form))
    check_columns(log)
    return list(read_rows(log, log.files[0], None, NAMES))


def cells(parts: list[RawRows]) -> list[tuple[str, ...]]:
    rows = (row for part in parts for row in part.table.select(NAMES).to_pylist())
    return [tuple(value.decode() for value in row.values()) for row in rows]


ROWS = [("u1", "i1", "5"), ("ü 2", "i,2", "6"), ('say "x"', "", "7"), ("u::4", "tab\there", "8")]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("name", ["log.csv", "log.csv.gz"])
def test_rows_are_what_pythons_csv_wrote(tmp_path, delimiter, name):
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter, lineterminator="\n").writerows([TITLES, *ROWS])
    assert cells(read(tmp_path, text.getvalue(), delimiter, name)) == ROWS


@pytest.mark.parametrize("delimiter", ["::", "||", "<->"])
def test_a_delimiter_of_several_characters_cuts_where_python_would(tmp_path, delimiter):
    lines = [delimiter.join(row) for row in (TITLES, ("u1", "a:b|c", "5"), ("u-2", "<", "6"))]
    assert cells(read(tmp_path, "\n".join(lines), delimiter, quote="")) == [("u1", "a:b|c", "5"), ("u-2", "<", "6")]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_byte_order_mark_and_the_ends_of_lines_are_no_part_of_a_name_or_value(tmp_path, end):
    text = "\ufeff" + end.join([",".join(TITLES), "u1,i1,5", "u2,i2,6", ""])
    assert cells(read(tmp_path, text)) == [("u1", "i1", "5"), ("u2", "i2", "6")]


def test_names_that_the_source_gives_leave_the_first_line_a_row(tmp_path):
    names = ("user_id", "item_id", "rating", "event_ts")
    assert cells(read(tmp_path, "u1,i1,4.0,5\nu2,i2,3.5,6\n", column_names=names)) == [
        ("u1", "i1", "5"),
        ("u2", "i2", "6"),
    ]


def test_columns_come_under_our_names_in_whatever_order_the_file_has_them(tmp_path):
    assert cells(read(tmp_path, "event_ts,note,item_id,user_id\n5,x,i1,u1\n")) == [("u1", "i1", "5")]


def test_malformed_lines_are_told_with_the_block_that_they_are_in_and_only_once(tmp_path, monkeypatch):
    """Blocks of some lines; the third block has more malformed lines than are kept, the last has nothing else."""
    monkeypatch.setattr(delimited, "TEXT_BLOCK_BYTES", 64)
    monkeypatch.setattr(delimited, "MAX_MALFORMED", 3)
    good = [f"user{number},item{number},{number}" for number in range(20)]
    bad = [f"broken{number},x" for number in range(30)]
    lines = [*good[:10], *bad[:20], *good[10:], *bad[20:]]
    parts = read(tmp_path, "\n".join([",".join(TITLES), *lines]))
    assert len(parts) > 5
    assert cells(parts) == [tuple(line.split(",")) for line in good]
    assert sum(part.num_malformed for part in parts) == 30
    assert all(len(part.malformed) == min(3, part.num_malformed) for part in parts)
    assert [line for part in parts for line in part.malformed][:3] == bad[:3]
    assert {line for part in parts for line in part.malformed} <= set(bad)


def test_a_long_malformed_line_is_cut(tmp_path):
    (part,) = read(tmp_path, ",".join(TITLES) + "\nu1,i1,5\n" + "x" * 1_000 + "\n")
    assert part.malformed == ("x" * SHOWN,)


@given(st.binary(max_size=60), st.sampled_from([b"::", b"ab", b"aab", b"-->"]), st.integers(1, 9), st.data())
def test_a_sequence_is_replaced_wherever_reads_cut_it(data, old, size, draws):
    for position in sorted(draws.draw(st.lists(st.integers(0, len(data)), max_size=4)), reverse=True):
        data = data[:position] + old + data[position:]
    stream = Converted(pa.BufferReader(data), Replacing(old, b"\x1f"))
    assert b"".join(iter(lambda: stream.read(size), b"")) == data.replace(old, b"\x1f")
