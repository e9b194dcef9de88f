"""Heads of text files: where the rows begin, and a sentence for each way in which a source can be wrong about them."""

import pytest

from pipeline.errors import InputError
from pipeline.io import heads
from pipeline.io.heads import text_header
from tests.io.text_logs import cells, log_of, num_malformed, read

HEADER = "user_id,item_id,event_ts"
ROWS = "u1,i1,5\nu2,i2,6\n"
READ = [("u1", "i1", "5"), ("u2", "i2", "6")]
NAMED = ("user_id", "item_id", "event_ts")


@pytest.mark.parametrize(
    ("data", "form"),
    [
        (f"{HEADER}\n{ROWS}", {}),
        (f"\n\r\n{HEADER}\n\n{ROWS}\n\n", {}),
        (f"exported\n\n{HEADER}\n{ROWS}", {"skip_rows": 1}),
        (f'a "quote\n{HEADER}\n{ROWS}', {"skip_rows": 1}),
        (f"sep=,\r\n{HEADER}\r\n{ROWS}", {"skip_rows": 1}),
        (f"# by us\n# 2026\n{HEADER}\n{ROWS}", {"comment": "#"}),
        (f"x\n// by us\n{HEADER}\n{ROWS}", {"comment": "//", "skip_rows": 1}),
        (f"\ufeff# by us\n{HEADER}\n{ROWS}", {"comment": "#"}),
        (f"\ufeff{ROWS}", {"column_names": NAMED}),
        (f"a,b,c\n{ROWS}", {"column_names": NAMED, "skip_rows": 1}),
        ('"user_id",item_id,"a\n ""name""",event_ts\nu1,i1,x,5\nu2,i2,x,6\n', {}),
        (f"{HEADER},\n{ROWS}", {}),
        (f"{HEADER}\n{ROWS}".replace("\n", ",\n"), {}),
        (f"{HEADER}\nu1,i1,5,\nu2,i2,6,\n", {}),
        ("u1,i1,5,\nu2,i2,6,\n", {"column_names": NAMED}),
        (f"note,{HEADER},note\nx,u1,i1,5,y\nx,u2,i2,6,y\n", {}),
        (f"{HEADER};x\n".replace(",", ";") + "u1;i1;5;1,5\nu2;i2;6;2,5\n", {"delimiter": ";"}),
        (f"{HEADER},nul\nu1,i1,5,\0\nu2,i2,6,\0\0\n", {}),
    ],
)
def test_the_rows_begin_after_the_head_whatever_stands_before_it(tmp_path, data, form):
    assert cells(read(tmp_path, data, **form)) == READ


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\r"])
def test_a_header_alone_is_a_file_without_rows(tmp_path, end):
    assert cells(read(tmp_path, HEADER + end)) == []


@pytest.mark.parametrize("num_columns", [4_000, 150_000])
def test_a_header_may_be_long(tmp_path, num_columns):
    """150,000 columns: 3 MB of names, and a block of 4 MiB does not hold the header and a row."""
    names = ",".join(f"feature_number_{number:06d}" for number in range(num_columns))
    text = f"user_id,item_id,{names},event_ts\n" + "".join(
        f"{row}{',' * num_columns},5\n" for row in ("u1,i1", "u2,i2")
    )
    assert cells(read(tmp_path, text)) == [("u1", "i1", "5"), ("u2", "i2", "5")]


def test_a_header_without_an_end_is_refused_with_the_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(heads, "HEAD_SIZES", (64, 1 << 20))
    with pytest.raises(InputError, match=r"the first line does not end within 1 MiB; is csv\.delimiter right"):
        read(tmp_path, "column," * 200_000)
    with pytest.raises(InputError, match=r"the first line cannot be cut into columns .*csv: \{quote: ''\}"):
        read(tmp_path, f'"{HEADER}\n' + ROWS * 100_000)


def test_a_file_without_text_has_no_rows_where_no_header_is_expected(tmp_path):
    assert read(tmp_path, "\n", column_names=NAMED) == []
    with pytest.raises(InputError, match=r"log\.csv: there is no text in it, not even a header"):
        read(tmp_path, "\n")


@pytest.mark.parametrize(
    ("data", "form", "words"),
    [
        (
            f"# by us\n\n{HEADER}\n{ROWS}",
            {},
            "no column 'user_id' in the first line, but line 3 looks like the header: "
            "set csv: {skip_rows: 2} in mine.yaml",
        ),
        (f"{HEADER}\n{ROWS}".replace(",", ";"), {}, "no column 'user_id'; set csv: {delimiter: ';'} in mine.yaml"),
        (f"{HEADER}\n".replace(",", "\t"), {}, "set csv: {delimiter: '\\t'} in mine.yaml"),
        (ROWS, {}, "looks like a row, not like a header; give the names of the columns in order as csv.column_names"),
        (f"user_id,item,rating,event_ts\n{ROWS}".replace("5", "5,5").replace("6", "6,6"), {}, "no column 'item_id'"),
        (
            f"user_id,item,event_ts\n{ROWS}",
            {"column_names": NAMED},
            "the first line looks like a header, with 'event_ts' as the time, but mine.yaml has csv.column_names",
        ),
        (f"a,b,c\n{ROWS}", {"column_names": NAMED}, "remove them, or set csv: {skip_rows: 1}"),
        (
            f"{HEADER}\n'u1','i1','5'\n",
            {},
            'of the first row are in quotes ("\'u1\'"); set csv: {quote: "\'"} in mine.yaml',
        ),
        ("'user_id','item_id','event_ts'\n", {}, "the values of the first line are in quotes"),
        ('"u1","i1","5"\n', {"quote": "", "column_names": NAMED}, "set csv: {quote: '\"'}"),
        (
            '"u1"::"i1"::"5"\n',
            {"quote": "", "delimiter": "::", "column_names": NAMED},
            "with such a delimiter they cannot be read; write the file without them",
        ),
        (f"{HEADER},item_id\nu1,i1,5,i2\n", {}, "2 columns are called 'item_id'"),
        (f"{HEADER}\nu1,i1,x,5\n", {}, "the header has 3 columns, but the first row has 4: 'u1,i1,x,5'"),
        ("u1,5\n", {"column_names": NAMED}, "the first line has 2 columns, but mine.yaml names 3 (user_id, item_id,"),
    ],
)
def test_a_source_that_is_wrong_about_the_head_is_refused_with_the_way_out(tmp_path, data, form, words):
    with pytest.raises(InputError) as error:
        read(tmp_path, data, **form)
    assert words in str(error.value)
    assert "log.csv" in str(error.value)


def test_columns_with_the_same_name_do_no_harm_where_nobody_reads_them(tmp_path):
    assert cells(read(tmp_path, f"x,{HEADER},x\n1,u1,i1,5,2\n")) == [("u1", "i1", "5")]


def test_one_row_with_other_columns_among_the_first_is_only_malformed(tmp_path):
    parts = read(tmp_path, f"{HEADER}\nu1,i1\n{ROWS}")
    assert (cells(parts), num_malformed(parts)) == (READ, 1)


def test_a_long_list_of_columns_is_cut_and_has_no_control_characters(tmp_path):
    names = ",".join(["a\x1b[31m", *(f"c{number}" for number in range(4_000))])
    with pytest.raises(InputError) as error:
        read(tmp_path, f"{names}\n")
    assert "the file has 'a\\x1b[31m', c0, c1" in str(error.value)
    assert "and 3,981 more" in str(error.value)
    assert len(str(error.value)) < 600


def test_names_in_any_script_are_found(tmp_path):
    log = log_of(tmp_path, "user_id,item_id,event_ts,prénom,名前\n")
    assert text_header(log, log.files[0]) == [*NAMED, "prénom", "名前"]
