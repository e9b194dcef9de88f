"""Listing and reading logs: what counts, in which order, and one clear sentence for what cannot be read."""

import gzip
import re
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.config import load_config
from pipeline.data.sources import SourceSpec
from pipeline.errors import InfrastructureError, InputError
from pipeline.io.decoding import Converted, Replacing
from pipeline.io.delimited import TEXT_BLOCK_BYTES
from pipeline.io.inputs import Files, Log, list_items, list_log, list_queries, source_path
from pipeline.io.night import open_night
from pipeline.io.rows import check_columns, read_rows
from pipeline.io.simulated import write_simulated_log
from pipeline.io.storage import open_storage
from pipeline.settings import Settings, SimulateSettings
from tests.io.inputs_on_disk import events, settings_for, write
from tests.io.test_newest import newest

DS = date(2026, 11, 20)
TODAY = date(2026, 11, 21)


def test_every_shipped_source_is_valid():
    names = {path.stem for path in Path("conf/sources").glob("*.yaml")}
    assert {"default", "movielens_1m", "movielens_20m", "amazon_ratings"} <= names
    for name in names:
        assert isinstance(load_config(SourceSpec, source_path(name)), SourceSpec)


def test_a_misspelt_source_names_the_nearest(tmp_path):
    with pytest.raises(InputError, match="did you mean 'movielens_1m'"):
        list_log(settings_for(tmp_path, tmp_path, "movielens1m"))


def test_partitions_up_to_the_day_are_listed_in_order(tmp_path):
    lake = tmp_path / "lake"
    for day in ("2026-11-21", "2026-11-19", "2026-11-20"):
        write(lake / f"ds={day}" / "part-0.parquet", events())
    (lake / "ds=2026-11-20" / "_SUCCESS").touch()
    (lake / "ds=2026-11-20" / ".part-0.parquet.crc").touch()
    settings = settings_for(tmp_path, lake)
    keys = [file.key for file in list_log(settings).until(DS, 3_650).files]
    assert keys == ["ds=2026-11-19/part-0.parquet", "ds=2026-11-20/part-0.parquet"]
    assert newest(settings) == date(2026, 11, 21)
    assert len(list_log(settings).files) == 3


def test_a_log_can_be_one_file_whose_newest_event_gives_the_day(tmp_path):
    path = write(tmp_path / "lake" / "log.parquet", events())
    settings = settings_for(tmp_path, path)
    assert [file.key for file in list_log(settings).files] == ["log.parquet"]
    assert newest(settings) == DS
    assert open_night(settings).ds == DS


def test_moving_a_log_changes_no_id_and_changing_it_does(tmp_path):
    first = write(tmp_path / "a" / "log.parquet", events())
    night = open_night(settings_for(tmp_path, first), DS)
    write(first, events(5))
    assert open_night(settings_for(tmp_path, first), DS).histories != night.histories
    assert open_night(settings_for(tmp_path, first), date(2026, 11, 19)).histories != night.histories


@pytest.mark.parametrize("where", ["missing", "empty", "other"])
def test_an_empty_log_is_refused(tmp_path, where):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "readme.txt").write_text("hello")
    message = "no file there matches '\\*.parquet'" if where == "other" else "nothing there"
    with pytest.raises(InputError, match=f"log.uri .*{where}.*{message}"):
        list_log(settings_for(tmp_path, tmp_path / where))


def test_markers_and_empty_files_are_passed_over_and_lost_data_is_told(tmp_path, caplog):
    write(tmp_path / "lake" / "ds=2026-11-20" / "a.parquet", events())
    for name in ("ds=2026-11-20_$folder$", "_SUCCESS", "ds=2026-11-20/empty"):
        (tmp_path / "lake" / name).touch()
    settings = settings_for(tmp_path, tmp_path / "lake")
    assert [file.key for file in list_log(settings).files] == ["ds=2026-11-20/a.parquet"]
    assert not caplog.records
    (tmp_path / "lake" / "ds=2026-11-20" / "b.parquet").touch()
    assert [file.key for file in list_log(settings).files] == ["ds=2026-11-20/a.parquet"]
    assert "1 files of zero bytes are passed over, for example ds=2026-11-20/b.parquet" in caplog.text


def test_a_log_of_nothing_but_empty_files_is_refused(tmp_path):
    (tmp_path / "lake").mkdir()
    (tmp_path / "lake" / "a.parquet").touch()
    for uri in (tmp_path / "lake", tmp_path / "lake" / "a.parquet"):
        with pytest.raises(InputError, match=r"nothing but 1 empty or hidden files there|nothing there"):
            list_log(settings_for(tmp_path, uri))


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("_delta_log/00000000000000000000.json", "a Delta table"),
        ("events/_delta_log/00000000000000000010.checkpoint.parquet", "a Delta table"),
        ("metadata/v1.metadata.json", "an Iceberg table"),
        ("metadata/00001-abc.metadata.json", "an Iceberg table"),
        (".hoodie/hoodie.properties", "a Hudi table"),
    ],
)
def test_a_table_of_another_format_is_refused_by_name(tmp_path, key, what):
    write(tmp_path / "lake" / "a.parquet", events())
    (tmp_path / "lake" / key).parent.mkdir(parents=True)
    (tmp_path / "lake" / key).write_text("{}")
    uri = {"uri": str(tmp_path / "lake")}
    settings = settings_for(tmp_path, tmp_path / "lake", items=uri, queries=uri)
    of_day = {"items": partial(list_items, ds=DS), "queries": partial(list_queries, ds=DS)}
    for name, listed in ({"log": list_log} | of_day).items():
        with pytest.raises(InputError, match=rf"{name}\.uri .*: this is {what} \({re.escape(key)}\)"):
            listed(settings)


def test_a_day_without_a_partition_is_refused(tmp_path):
    write(tmp_path / "lake" / "ds=2026-11-20" / "a.parquet", events())
    with pytest.raises(InputError, match="no partition ds=2026-11-25; the newest is ds=2026-11-20"):
        list_log(settings_for(tmp_path, tmp_path / "lake")).until(date(2026, 11, 25), 3_650)
    write(tmp_path / "lake" / "ds=yesterday" / "a.parquet", events())
    with pytest.raises(InputError, match="ds=yesterday is no day"):
        list_log(settings_for(tmp_path, tmp_path / "lake"))


def test_files_beside_partitions_are_refused(tmp_path):
    write(tmp_path / "lake" / "ds=2026-11-20" / "a.parquet", events())
    write(tmp_path / "lake" / "stray.parquet", events())
    with pytest.raises(InputError, match=r"stray\.parquet: outside the ds= partitions"):
        list_log(settings_for(tmp_path, tmp_path / "lake"))


def test_files_that_differ_in_type_are_refused(tmp_path):
    write(tmp_path / "lake" / "a.parquet", events())
    write(tmp_path / "lake" / "b.parquet", events(user_id=pa.array([1, 2, 3, 4])))
    with pytest.raises(InputError, match=r"b\.parquet: column 'user_id' is int64, but string in a\.parquet"):
        check_columns(list_log(settings_for(tmp_path, tmp_path / "lake")))


def test_a_truncated_parquet_file_is_named(tmp_path):
    path = write(tmp_path / "lake" / "a.parquet", events(1_000))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(InputError, match=r"a\.parquet: damaged or cut short"):
        check_columns(list_log(settings_for(tmp_path, tmp_path / "lake")))


def test_flipped_bits_in_a_page_with_a_checksum_are_found(tmp_path):
    path = write(tmp_path / "lake" / "a.parquet", events(1_000), write_page_checksum=True)
    data = bytearray(path.read_bytes())
    data[200] ^= 0xFF
    path.write_bytes(bytes(data))
    log = list_log(settings_for(tmp_path, tmp_path / "lake"))
    with pytest.raises(InputError, match=r"a\.parquet: damaged or cut short"):
        list(read_rows(log, log.files[0], None, ("user_id", "item_id", "event_ts")))


def read_all(tmp_path: Path, source: str, uri: Path, names=("user_id", "item_id", "event_ts")):
    log = list_log(settings_for(tmp_path, uri, source))
    check_columns(log)
    (file,) = log.files
    return list(read_rows(log, file, None, names))


def test_movielens_1m_is_read_from_its_folder(tmp_path):
    folder = tmp_path / "ml-1m"
    folder.mkdir()
    (folder / "movies.dat").write_bytes("1::Toy Story (1995)::Animation\n2::L\xe9on::Crime\n".encode("latin-1"))
    (folder / "users.dat").write_text("1::F::1::10::48067\n")
    (folder / "ratings.dat").write_text("1::1193::5::978300760\n1::661::3::978302109\n")
    (rows,) = read_all(tmp_path, "movielens_1m", folder)
    assert rows.table.to_pydict() == {
        "user_id": [b"1", b"1"],
        "item_id": [b"1193", b"661"],
        "event_ts": [b"978300760", b"978302109"],
    }
    assert newest(settings_for(tmp_path, folder, "movielens_1m")) == date(2000, 12, 31)


def test_movielens_20m_and_amazon_are_read(tmp_path):
    (tmp_path / "ratings.csv").write_text(
        'userId,movieId,rating,timestamp\n1,2,3.5,1112486027\n1,"29",3.5,1112484676\n'
    )
    (rows,) = read_all(tmp_path, "movielens_20m", tmp_path / "ratings.csv")
    assert rows.table["item_id"].to_pylist() == [b"2", b"29"]
    (tmp_path / "ratings_Books.csv").write_text("AH2L9G3DQHHAJ,0000000116,4.0,1019865600\n")
    (rows,) = read_all(tmp_path, "amazon_ratings", tmp_path / "ratings_Books.csv")
    assert rows.table.to_pylist() == [
        {"user_id": b"AH2L9G3DQHHAJ", "item_id": b"0000000116", "event_ts": b"1019865600"}
    ]
    with gzip.open(tmp_path / "ratings_Toys.csv.gz", "wt") as file:
        file.write("A,B,4.0,1019865600\n")
    (rows,) = read_all(tmp_path, "amazon_ratings", tmp_path / "ratings_Toys.csv.gz")
    assert rows.table["user_id"].to_pylist() == [b"A"]


def test_malformed_lines_are_counted_and_kept_out(tmp_path):
    text = "userId,movieId,rating,timestamp\n1,2,3.5,1112486027\n1,2\n1,2,3,4,5\n2,3,4.0,1112486028\n"
    (tmp_path / "ratings.csv").write_text(text)
    (rows,) = read_all(tmp_path, "movielens_20m", tmp_path / "ratings.csv")
    assert rows.table["user_id"].to_pylist() == [b"1", b"2"]
    assert rows.num_malformed == 2
    assert rows.malformed[0] == "1,2"


def test_a_file_with_other_columns_than_its_source_says_is_refused(tmp_path):
    (tmp_path / "ratings_Books.csv").write_text("A,B,4.0\n")
    with pytest.raises(InputError, match=r"the first line has 3 columns, but .*amazon_ratings\.yaml names 4"):
        check_columns(list_log(settings_for(tmp_path, tmp_path, "amazon_ratings")))
    (tmp_path / "ratings.csv").write_text("user,movieId,rating,timestamp\n")
    with pytest.raises(InputError, match="no column 'userId'"):
        check_columns(list_log(settings_for(tmp_path, tmp_path, "movielens_20m")))


def test_a_long_text_file_comes_in_parts(tmp_path):
    lines = [f"{i % 977}::{i}::5::978300760" for i in range(400_000)]
    (tmp_path / "ratings.dat").write_text("\n".join(lines))
    parts = read_all(tmp_path, "movielens_1m", tmp_path / "ratings.dat")
    assert len(parts) > 1
    assert max(part.table.nbytes for part in parts) < 3 * TEXT_BLOCK_BYTES
    found = pa.concat_tables(part.table for part in parts)["item_id"].to_pylist()
    assert found == [str(i).encode() for i in range(400_000)]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64])
def test_a_delimiter_cut_by_a_read_is_still_replaced(size):
    data = b"a::b:c::::d:\n:"
    stream = Converted(pa.BufferReader(data), Replacing(b"::", b"|"))
    parts = iter(lambda: stream.read(size), b"")
    assert b"".join(parts) == data.replace(b"::", b"|")


@pytest.mark.s3
def test_a_log_on_s3_is_read_like_a_folder(s3_uri, tmp_path):
    storage = open_storage(s3_uri)
    data = write(tmp_path / "a.parquet", events()).read_bytes()
    storage.create("lake/ds=2026-11-20/a.parquet", data)
    settings = settings_for(tmp_path, f"{s3_uri}/lake")
    assert newest(settings) == DS
    log = list_log(settings).until(DS, 3_650)
    (rows,) = read_rows(log, log.files[0], (0,), ("item_id",))
    assert rows.table["item_id"].to_pylist() == ["i0", "i1", "i0", "i1"]
    one_file = list_log(settings_for(tmp_path, f"{s3_uri}/lake/ds=2026-11-20/a.parquet"))
    assert [file.key for file in one_file.files] == ["a.parquet"]


def test_the_newest_snapshot_of_the_catalogue_counts(tmp_path):
    items = pa.table({"item_id": ["i0"]})
    for day in ("2026-11-18", "2026-11-19", "2026-11-21"):
        write(tmp_path / "items" / f"ds={day}" / "a.parquet", items)
    settings = settings_for(tmp_path, tmp_path, items={"uri": str(tmp_path / "items")})
    assert [file.key for file in list_items(settings, DS).files] == ["ds=2026-11-19/a.parquet"]
    assert [file.key for file in list_items(settings, date(2026, 11, 18)).files] == ["ds=2026-11-18/a.parquet"]
    with pytest.raises(InputError, match="oldest partition is ds=2026-11-18, after the day to serve"):
        list_items(settings, date(2026, 11, 1))


def test_what_others_have_hidden_is_no_part_of_a_log(tmp_path):
    for name in ("a", ".half", "_old", "_temporary/0/part", "ds=1/.spark/part"):
        write(tmp_path / "lake" / f"{name}.parquet", events())
    assert [file.key for file in list_log(settings_for(tmp_path, tmp_path / "lake")).files] == ["a.parquet"]


def lake_of(tmp_path: Path) -> tuple[Path, Log]:
    path = write(tmp_path / "lake" / "a.parquet", events(1_000))
    return path, list_log(settings_for(tmp_path, tmp_path / "lake"))


def read_first(log: Files) -> bytes:
    with log.open(log.files[0]) as source:
        return source.read()


def test_a_file_that_is_as_it_was_listed_is_read(tmp_path):
    path, log = lake_of(tmp_path)
    assert read_first(log) == path.read_bytes()


def test_a_file_that_changed_since_it_was_listed_ends_the_run_with_its_name(tmp_path):
    """Grown, replaced by one of the same size, or removed: a retry lists again."""
    path, log = lake_of(tmp_path)
    data = path.read_bytes()
    for new, how in ((data + b"x", "changed"), (bytes(reversed(data)), "changed"), (None, "removed")):
        path.unlink()
        if new is not None:
            path.write_bytes(new)
        with pytest.raises(
            InfrastructureError, match=rf"lake/a\.parquet: {how} since tonight's inputs were listed.*run"
        ):
            read_first(log)
        path.write_bytes(data)


def test_nothing_is_made_of_a_file_that_is_known_to_be_another(tmp_path):
    path, log = lake_of(tmp_path)
    path.write_bytes(b"something else")
    entered = False
    with pytest.raises(InfrastructureError, match="changed since"), log.open(log.files[0]):
        entered = True
    assert not entered


def test_a_file_of_ours_is_known_by_its_size_alone(tmp_path):
    """Its listed etag is a hash, which no store gives: the store's own differs from store to store."""
    path, log = lake_of(tmp_path)
    ours = Files(log.uri, (replace(log.files[0], etag="a hash"),), is_immutable=True)
    assert read_first(ours) == path.read_bytes()
    path.write_bytes(b"cut")
    with pytest.raises(InfrastructureError, match="changed since"):
        read_first(ours)


def test_a_file_that_changes_while_it_is_read_is_not_taken_for_damaged(tmp_path):
    path, log = lake_of(tmp_path)

    def read(error: Exception | None) -> None:
        with log.open(log.files[0]):
            path.write_bytes(b"half of something else")
            if error:
                raise error

    with pytest.raises(InfrastructureError, match="changed since"):
        read(InputError("a.parquet: damaged or cut short"))
    path, log = lake_of(tmp_path)
    with pytest.raises(InfrastructureError, match="changed since"):
        read(None)


def test_a_late_file_belongs_to_another_night(tmp_path):
    write(tmp_path / "lake" / "ds=2026-11-20" / "a.parquet", events())
    settings = settings_for(tmp_path, tmp_path / "lake")
    night = open_night(settings, DS)
    write(tmp_path / "lake" / "ds=2026-11-20" / "late.parquet", events())
    assert [file.key for file in night.inputs.log.files] == ["ds=2026-11-20/a.parquet"]
    assert open_night(settings, DS).histories != night.histories


SIMULATE = SimulateSettings(num_users=20, num_items=15, num_events=200, num_days=3)


def test_a_simulated_log_has_the_same_name_in_every_store(storage, tmp_path):
    assert write_simulated_log(storage, SIMULATE)[1] is False
    assert write_simulated_log(storage, SIMULATE)[1] is True
    settings = Settings.model_validate(
        {"root": storage.uri, "simulate": SIMULATE, "train": {"num_negatives": 5}, "search": {"k": 5}}
    )
    log = list_log(settings)
    assert len(log.files) == 3
    assert newest(settings) == DS
    assert re.fullmatch(r"items-\w{16}\.parquet", list_items(settings, DS).files[0].key)
    elsewhere = open_storage(str(tmp_path / "elsewhere"))
    write_simulated_log(elsewhere, SIMULATE)
    other = settings.model_copy(update={"root": elsewhere.uri})
    mine, theirs = open_night(settings), open_night(other)
    assert (mine.histories, mine.run) == (theirs.histories, theirs.run)


def test_a_simulated_log_that_is_not_there_says_what_to_run(tmp_path):
    settings = Settings(root=str(tmp_path))
    with pytest.raises(InputError, match=r"run jobs/simulate_log\.py first"):
        list_log(settings)


def test_sources_beside_our_code_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config(SourceSpec, source_path("movielens_1m")).csv.delimiter == "::"
    (tmp_path / "conf" / "sources").mkdir(parents=True)
    (tmp_path / "conf" / "sources" / "mine.yaml").write_text("format: csv\n")
    assert source_path("mine").read_text() == "format: csv\n"
    assert source_path("default").is_file()
