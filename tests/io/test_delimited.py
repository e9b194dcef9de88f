"""Delimited text against Python's own csv: any delimiter, quotes, ends of lines, blocks, and lines that are no rows."""

import csv
import io
import re
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.sources import CsvFormat
from pipeline.errors import InputError
from pipeline.io import delimited
from pipeline.io.formats import SHOWN
from tests.io.text_logs import cells, num_malformed, read

TITLES = ["user_id", "item_id", "event_ts"]
ROWS = [("u1", "i1", "5"), ("ü 2", "i,2", "6"), ('say "x"', "", "7"), ("u::4", "tab\there", "8")]
HINT = "a value that begins with a quote goes on to the next quote"


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|", "\x01", " "])
def test_rows_are_what_pythons_csv_wrote(tmp_path, delimiter):
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter, lineterminator="\n").writerows([TITLES, *ROWS])
    assert cells(read(tmp_path, text.getvalue(), delimiter=delimiter)) == ROWS


@pytest.mark.parametrize("delimiter", ["::", "||", "<->", "¦"])
def test_a_delimiter_of_several_bytes_cuts_where_python_would(tmp_path, delimiter):
    lines = [delimiter.join(row) for row in (TITLES, ("u1", "a:b|c", "5"), ("u-2", "<", "6"))]
    found = cells(read(tmp_path, "\n".join(lines), delimiter=delimiter, quote=""))
    assert found == [("u1", "a:b|c", "5"), ("u-2", "<", "6")]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\r\r\n"])
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


QUOTING = st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
ENDS = st.sampled_from(["\n", "\r\n", "\r"])
VALUES = st.text(st.sampled_from('ab,"\n\r é'), max_size=6)


@given(st.lists(st.tuples(VALUES, VALUES, st.integers(0, 99), VALUES), max_size=12), st.data())
def test_quotes_and_ends_of_lines_in_values_are_read_as_python_reads_them_at_any_border_of_blocks(rows, draws):
    """The ends of lines differ between rows. A carriage return and a line feed in a value may become one of them."""
    text = io.StringIO(newline="")
    for row in [("user_id", "item_id", "event_ts", "note"), *rows]:
        line = io.StringIO(newline="")
        csv.writer(line, quoting=draws.draw(QUOTING)).writerow(row)
        text.write(line.getvalue().removesuffix("\r\n") + draws.draw(ENDS))
    wanted = [row[:3] for row in list(csv.reader(io.StringIO(text.getvalue(), newline="")))[1:]]
    size = draws.draw(st.integers(80, 200))  # a row has at most some 60 bytes
    with TemporaryDirectory() as folder, patch.object(delimited, "TEXT_BLOCK_BYTES", size):
        found = read(Path(folder), text.getvalue())

    def lines(rows: list) -> list[str]:
        return [re.sub("\r\n|\r|\n", "|", "~".join(row)) for row in rows]

    assert lines(cells(found)) == lines(wanted)
    assert num_malformed(found) == 0


SOUND = st.sampled_from(["", "x", "5", 'x"', '12" mix', '"x"', '"x, y"', '"a, b, c"', '"a ""b"" c"'])
STRAY = SOUND | st.sampled_from(['"', '"x', '"x" y', '""', '"x""', '"x", "a b"', "1,2"])
COLUMNS = ["user_id", "item_id", "event_ts", "note", "title"]


@given(
    st.permutations(COLUMNS),
    st.lists(st.tuples(SOUND, SOUND, STRAY, st.sampled_from(["item_id", "note", "title"])), max_size=20),
    ENDS,
)
def test_every_line_is_a_row_or_malformed_whatever_quotes_stand_in_one_of_its_values(columns, values, end):
    """A row is never lost without being counted, wherever the column with the quote stands."""
    lines = []
    for number, (item, note, stray, column) in enumerate([("i1", "x", "x", "title"), *values]):
        row = {"user_id": f"u{number}", "event_ts": f"{1_772_323_472 + number}", "title": "x"}
        row |= {"item_id": item, "note": note} | {column: stray}
        lines.append(",".join(row[name] for name in columns))
    with TemporaryDirectory() as folder:
        parts = read(Path(folder), end.join([",".join(columns), *lines, ""]))
    assert len(cells(parts)) + num_malformed(parts) == len(lines)


@pytest.mark.parametrize("end", ["\n", "\r"])
def test_rows_with_times_of_few_digits_are_found_by_their_place(tmp_path, end):
    lines = ["u1,i1,x,7", 'u2,i2,"x,8', "u3,i3,x,9", 'u4,i4,"x,10', 'u5,i5,"1,2"', 'u6,i6,"a, 5\n2,3",11', ""]
    parts = read(tmp_path, end.join(["user_id,item_id,note,event_ts", *lines]))
    assert ([user for user, _, _ in cells(parts)], num_malformed(parts)) == (["u1", "u6"], 4)


@pytest.mark.parametrize(
    "names", ["user_id,item_id,event_ts,note", "event_ts,user_id,item_id,note", "note,event_ts,user_id,item_id"]
)
def test_a_text_of_several_lines_is_not_taken_for_rows(tmp_path, names):
    note = '"Great, really, so good, yes\n\nWould, buy, 5, again\n1, 2, 3, 4\nYes, I, do, say"'
    row = {"user_id": "u1", "item_id": "i1", "event_ts": "1772323472", "note": note}
    line = ",".join(row[name] for name in names.split(","))
    parts = read(tmp_path, f"{names}\n{line}\n{line}\n")
    assert (len(cells(parts)), num_malformed(parts)) == (2, 0)


def test_quoted_rows_of_a_log_with_iso_times_are_found_too(tmp_path):
    notes = ("x", '"y', "z", 'a"', "b")
    rows = [f"u{day},i1,2026-03-0{day}T10:00:00Z,{note}" for day, note in enumerate(notes, 1)]
    parts = read(tmp_path, "\n".join(["user_id,item_id,event_ts,note", *rows]))
    assert ([user for user, _, _ in cells(parts)], num_malformed(parts)) == (["u1", "u5"], 3)
    assert parts[0].malformed == ("\n".join(rows[1:4]).replace('"', ""),)


def test_an_escaped_quote_is_a_part_of_the_value(tmp_path):
    text = 'user_id,item_id,event_ts\n"say \\"x, y\\"",i1,5\nu\\,2,i2,6\n'
    assert cells(read(tmp_path, text, escape="\\")) == [('say "x, y"', "i1", "5"), ("u,2", "i2", "6")]


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ({}, "is longer than 0.001 MiB; if a quote there is part of the text, set csv: {quote: ''} in mine.yaml"),
        ({"quote": ""}, "a row is longer than 0.001 MiB, the most that is read; shorten or remove it"),
    ],
)
def test_a_row_longer_than_a_block_is_refused_with_its_place_and_the_size(tmp_path, monkeypatch, form, words):
    monkeypatch.setattr(delimited, "TEXT_BLOCK_BYTES", 1_000)
    rows = [f"u{number},i1,{number}" for number in range(1_000)]
    rows[600] = f"u,i,{'x' * 3_000}" if form else f'"{rows[600]}'
    with pytest.raises(InputError) as error:
        read(tmp_path, "\n".join([",".join(TITLES), *rows]), **form)
    assert "log.csv: after row 600 a" in str(error.value)
    assert words in str(error.value)


def test_a_process_that_fails_while_arrow_reads_ahead_ends(tmp_path):
    """Arrow's thread reads on when the process ends: Python code in that thread would keep the process for ever."""
    program = f"""
from pathlib import Path
from tests.io.text_logs import read
rows = "u1::i1::5\\n" * 1_000_000
names = ["user_id", "item_id", "event_ts"]
read(Path({str(tmp_path)!r}), rows + "x" * 9_000_000 + rows, delimiter="::", quote="", column_names=names)
"""
    done = subprocess.run([sys.executable, "-c", program], timeout=120, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "after row 1,000,000 a row is longer than 4 MiB" in done.stderr


def test_malformed_lines_are_told_with_the_block_that_they_are_in_and_only_once(tmp_path, monkeypatch):
    """Blocks of some lines; the last has nothing else."""
    monkeypatch.setattr(delimited, "TEXT_BLOCK_BYTES", 64)
    good = [f"user{number},item{number},{number}" for number in range(20)]
    bad = [f"broken{number},x" for number in range(30)]
    lines = [*good[:10], *bad[:20], *good[10:], *bad[20:]]
    parts = read(tmp_path, "\n".join([",".join(TITLES), *lines]))
    assert len(parts) > 5
    assert cells(parts) == [tuple(line.split(",")) for line in good]
    assert sum(part.num_malformed for part in parts) == 30
    assert sum(part.malformed_bytes for part in parts) == sum(map(len, bad))
    assert all(len(part.malformed) == part.num_malformed for part in parts)
    assert [line for part in parts for line in part.malformed] == bad


def test_a_long_malformed_line_is_cut(tmp_path):
    (part,) = read(tmp_path, ",".join(TITLES) + "\nu1,i1,5\n" + "x" * 1_000 + "\n")
    assert part.malformed == ("x" * SHOWN,)
    assert part.malformed_bytes == 1_000


@pytest.mark.parametrize(
    "form",
    [
        {"delimiter": "::"},
        {"delimiter": "::", "quote": "", "escape": "\\"},
        {"delimiter": "¦"},
        {"delimiter": '"'},
        {"quote": "'", "escape": "'"},
        {"quote": "«"},
        {"delimiter": "\n"},
        {"skip_rows": -1},
    ],
)
def test_marks_that_cannot_work_together_are_refused_when_the_source_is_read(form):
    with pytest.raises(ValueError, match=r"works only with|must differ|must be ASCII|greater than or equal"):
        CsvFormat.model_validate(form)
