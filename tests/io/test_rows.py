"""The columns of a log's files: types, roles, folders, and one clear sentence for what cannot be read."""

from dataclasses import replace
from datetime import date

import pyarrow as pa
import pytest

from pipeline.data.ids import read_ids
from pipeline.data.sources import ColumnMap
from pipeline.errors import InputError
from pipeline.io import rows
from pipeline.io.inputs import list_log
from pipeline.io.rows import check_columns, read_rows
from tests.io.inputs_on_disk import NOON, events, settings_for, write

DS = date(2026, 11, 20)
TODAY = date(2026, 11, 21)


def test_folders_with_a_value_in_their_name_are_columns(tmp_path):
    for kind in ("view", "add%20to%20cart", "__HIVE_DEFAULT_PARTITION__"):
        write(tmp_path / "lake" / "ds=2026-11-20" / f"event_type={kind}" / "a.parquet", events(2))
    log = list_log(settings_for(tmp_path, tmp_path / "lake"))
    columns = check_columns(log)
    assert columns.names == ("user_id", "item_id", "event_ts", "event_type")
    found = {
        row["event_type"]
        for file in log.files
        for rows in read_rows(log, file, None, columns.names)
        for row in rows.table.to_pylist()
    }
    assert found == {"view", "add to cart", None}


def test_a_column_of_the_file_wins_over_the_folders(tmp_path):
    path = tmp_path / "lake" / "event_type=view" / "a.parquet"
    write(path, events(1, event_type=pa.array(["click"])))
    log = list_log(settings_for(tmp_path, tmp_path / "lake"))
    (rows,) = read_rows(log, log.files[0], None, ("event_type",))
    assert rows.table["event_type"].to_pylist() == ["click"]


def test_files_that_differ_without_loss_are_one_log(tmp_path):
    """Widths, units, an optional column that came later, a file without a row."""
    write(tmp_path / "lake" / "a.parquet", events(2, user_id=pa.array([1, 2], pa.int16())))
    times = pa.array([NOON] * 2).cast(pa.timestamp("ns"))
    later = {"event_ts": times, "user_id": pa.array([3, 4], pa.uint32()), "event_type": pa.array(["view"] * 2)}
    write(tmp_path / "lake" / "b.parquet", events(2, **later))
    write(tmp_path / "lake" / "c.parquet", pa.table({name: pa.nulls(0) for name in ("user_id", "item_id", "event_ts")}))
    log = list_log(settings_for(tmp_path, tmp_path / "lake"))
    columns = check_columns(log)
    assert columns.names == ("user_id", "item_id", "event_ts", "event_type")
    assert (columns.user_type, columns.item_type) == (pa.int64(), pa.string())
    rows = [
        row
        for file in log.files
        for part in read_rows(log, file, None, columns.names)
        for row in part.table.to_pylist()
    ]
    assert [row["event_type"] for row in rows] == [None, None, "view", "view"]


def test_one_column_may_have_two_roles(tmp_path):
    write(tmp_path / "lake" / "a.parquet", events(2))
    log = list_log(settings_for(tmp_path, tmp_path / "lake"))
    source = log.source.model_copy(update={"columns": ColumnMap(event_id="user_id")})
    (rows,) = read_rows(replace(log, source=source), log.files[0], None, ("user_id", "event_id"))
    assert rows.table.to_pydict() == {"user_id": ["u0", "u1"], "event_id": ["u0", "u1"]}


def test_a_column_that_is_read_and_there_twice_is_refused(tmp_path):
    names = [*events().column_names, "item_id", "x", "x"]
    table = pa.Table.from_arrays([*events().columns, *[pa.array(["other"] * 4)] * 3], names=names)
    write(tmp_path / "lake" / "a.parquet", table)
    with pytest.raises(InputError, match=r"a\.parquet: 2 columns are called 'item_id'"):
        check_columns(list_log(settings_for(tmp_path, tmp_path / "lake")))


@pytest.mark.parametrize(
    ("column", "values", "says"),
    [
        ("event_type", pa.array([["a"]]), "'event_type' is list<.*; it must be text, an integer or a boolean"),
        ("event_id", pa.array([{"a": 1}]), "'event_id' is struct<.*; it must be text, an integer or a boolean"),
        ("event_value", pa.array([["a"]]), "'event_value' is list<.*; a value must be a number or text"),
        ("event_ts", pa.array([True]), "'event_ts' is bool; a time must be"),
        ("user_id", pa.array([1.5]), "'user_id' is double; an id must be"),
    ],
)
def test_types_are_checked_at_the_head(tmp_path, column, values, says):
    write(tmp_path / "lake" / "a.parquet", events(1, **{column: values}))
    with pytest.raises(InputError, match=rf"a\.parquet: column {says}"):
        check_columns(list_log(settings_for(tmp_path, tmp_path / "lake")))


def test_columns_of_arrows_own_types_refuse_no_log(tmp_path):
    table = events(1, note=pa.array([bytes(16)], pa.uuid()), user_id=pa.array([bytes(16)], pa.uuid()))
    write(tmp_path / "lake" / "a.parquet", table.append_column("payload", pa.array(["{}"], pa.json_())))
    log = list_log(settings_for(tmp_path, tmp_path / "lake"))
    assert check_columns(log).user_type == pa.string()


def test_extra_columns_and_row_groups_are_noted(tmp_path):
    table = events(7, note=pa.array(["x"] * 7), surface=pa.array(["home"] * 7))
    write(tmp_path / "lake" / "a.parquet", table, row_group_size=3)
    columns = check_columns(list_log(settings_for(tmp_path, tmp_path / "lake")))
    assert columns.extra == ("note", "surface")
    assert columns.group_rows == ((3, 3, 1),)
    assert (columns.user_type, columns.item_type) == (pa.string(), pa.string())


def test_a_missing_column_is_named_with_the_nearest_one(tmp_path):
    table = events().rename_columns(["userid", "item_id", "event_ts"])
    write(tmp_path / "lake" / "a.parquet", table)
    with pytest.raises(InputError) as error:
        check_columns(list_log(settings_for(tmp_path, tmp_path / "lake")))
    message = str(error.value)
    assert "a.parquet: no column 'user_id'" in message
    assert "default.yaml" in message
    assert "userid, item_id, event_ts" in message
    assert "did you mean 'userid'" in message


def test_long_rows_are_read_a_few_at_a_time(tmp_path, monkeypatch):
    """A small file may unfold into a large table."""
    monkeypatch.setattr(rows, "BATCH_BYTES", 1 << 20)
    text = pa.DictionaryArray.from_arrays(pa.array([0] * 2_000, pa.int32()), pa.array(["x" * 2_000]))
    for name, column in (("dictionary", text), ("plain", text.cast(pa.string()))):
        path = write(tmp_path / "lake" / f"{name}.parquet", events(2_000, user_id=column))
        log = list_log(settings_for(tmp_path, path))
        sizes = [part.table.num_rows for part in read_rows(log, log.files[0], None, ("user_id",))]
        assert sum(sizes) == 2_000
        assert 256 <= max(sizes) <= 600


def test_a_text_that_is_no_utf8_spoils_its_row_and_not_the_log(tmp_path):
    """Whoever wrote the file called bytes text; they are the greatest value in its statistics too."""
    raw = pa.array([b"u1", b"u2", b"u\xff", b"u3"])
    users = pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())
    path = write(tmp_path / "lake" / "a.parquet", events(user_id=users))
    log = list_log(settings_for(tmp_path, path))
    (read,) = read_rows(log, log.files[0], None, ("user_id",))
    assert read_ids(read.table["user_id"].combine_chunks(), pa.string())[2].tolist() == [False, False, True, False]
