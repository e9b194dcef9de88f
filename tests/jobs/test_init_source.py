"""A source file for a log that nobody has described: samples laid out as the public logs are, read back by what was
guessed; and logs that cannot be guessed."""

import gzip
import json
from datetime import UTC, date, datetime
from pathlib import Path

import polars as pl
import pytest

from pipeline.config import load_config
from pipeline.data.sources import SourceSpec
from pipeline.errors import InputError
from pipeline.stages.init_source import Draft, draft_source
from tests.jobs.nightly import run_job

NOON = datetime(2025, 3, 4, 12, tzinfo=UTC)
SECONDS = int(NOON.timestamp())
NUM_ROWS = 40


def draft(folder: Path, name: str, text: str | bytes) -> Draft:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return draft_source(str(path))


def spec_of(draft: Draft, folder: Path) -> SourceSpec:
    path = folder / "drafted.yaml"
    path.write_text(draft.text)
    return load_config(SourceSpec, path)


def lines(form: str, header: str = "") -> str:
    rows = [form.format(u=n % 7, i=100 + n % 31, s=SECONDS + 60 * n, n=n) for n in range(NUM_ROWS)]
    return "\n".join(([header] if header else []) + rows) + "\n"


LAYOUTS: dict[str, tuple[str, str, dict[str, str], str, str]] = {
    # file, text, columns, key of the time, its value
    "MovieLens-1M": (
        "ratings.dat",
        lines("{u}::{i}::4::{s}"),
        {"user_id": "column_1", "item_id": "column_2", "event_ts": "column_4"},
        "time_unit",
        "s",
    ),
    "MovieLens-20M": (
        "ratings.csv",
        lines("{u},{i},3.5,{s}", "userId,movieId,rating,timestamp"),
        {"user_id": "userId", "item_id": "movieId", "event_ts": "timestamp", "event_value": "rating"},
        "time_unit",
        "s",
    ),
    "Amazon 2023": (
        "Books.csv",
        lines("U{u},B{i},5.0,{s}000", "user_id,parent_asin,rating,timestamp"),
        {"user_id": "user_id", "item_id": "parent_asin", "event_ts": "timestamp", "event_value": "rating"},
        "time_unit",
        "ms",
    ),
    "RetailRocket": (
        "events.csv",
        lines("{s}123,{u},view,{i},", "timestamp,visitorid,event,itemid,transactionid"),
        {"user_id": "visitorid", "item_id": "itemid", "event_ts": "timestamp", "event_type": "event"},
        "time_unit",
        "ms",
    ),
    "H&M": (
        "transactions_train.csv",
        lines("ab{u},06{i},0.05,2", "customer_id,article_id,price,sales_channel_id")
        .replace("customer_id", "t_dat,customer_id")
        .replace("ab", "2018-09-20,ab"),
        {"user_id": "customer_id", "item_id": "article_id", "event_ts": "t_dat"},
        "time_unit",
        "timestamp",
    ),
    "Personalize": (
        "interactions.csv",
        lines("u{u},i{i},{s},Click", "USER_ID,ITEM_ID,TIMESTAMP,EVENT_TYPE"),
        {"user_id": "USER_ID", "item_id": "ITEM_ID", "event_ts": "TIMESTAMP", "event_type": "EVENT_TYPE"},
        "time_unit",
        "s",
    ),
    "RecBole": (
        "ml.inter",
        lines("{u}\t{i}\t4\t{s}.0", "user_id:token\titem_id:token\trating:float\ttimestamp:float"),
        {
            "user_id": "user_id:token",
            "item_id": "item_id:token",
            "event_ts": "timestamp:float",
            "event_value": "rating:float",
        },
        "time_unit",
        "s",
    ),
    "KuaiRand": (
        "log_standard.csv",
        lines("{u},{i},20220408,1400,{s}000,1,0", "user_id,video_id,date,hourmin,time_ms,is_click,is_like"),
        {"user_id": "user_id", "item_id": "video_id", "event_ts": "time_ms"},
        "time_unit",
        "ms",
    ),
    "a shop in Germany": (
        "verkauf.csv",
        lines("K{u};A{i};04.03.2025 12:{n:02d}", "customer;article;sold_at"),
        {"user_id": "customer", "item_id": "article", "event_ts": "sold_at"},
        "time_format",
        "%d.%m.%Y %H:%M",
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_public_logs_are_recognised_and_their_rows_come_out(layout, tmp_path):
    name, text, columns, key, value = LAYOUTS[layout]
    drafted = draft(tmp_path, name, text)
    spec = spec_of(drafted, tmp_path)
    found = {ours: theirs for ours, theirs in spec.columns.named.items() if ours in columns}
    assert found == columns
    assert getattr(spec, key) == value
    assert len(drafted.rows) == 10
    row = drafted.rows[0]
    assert (str(row["user_id"])[-1], str(row["item_id"])[-3:]) == ("0", "100")
    assert row["event_ts"].date() in (NOON.date(), date(2018, 9, 20))


def test_a_compressed_file_and_a_folder_are_looked_into(tmp_path):
    (tmp_path / "log").mkdir()
    _, text, columns, *_ = LAYOUTS["MovieLens-20M"]
    (tmp_path / "log" / "a.csv.gz").write_bytes(gzip.compress(text.encode()))
    spec = spec_of(draft_source(str(tmp_path / "log")), tmp_path)
    assert spec.columns.named.items() >= columns.items()
    assert spec.files == "*.csv.gz"


@pytest.mark.parametrize(
    ("times", "unit"),
    [
        (pl.Series([NOON] * NUM_ROWS), "timestamp"),
        (pl.Series([NOON.date()] * NUM_ROWS), "timestamp"),
        (pl.Series([SECONDS] * NUM_ROWS), "s"),
        (pl.Series([SECONDS * 1_000] * NUM_ROWS), "ms"),
        (pl.Series([SECONDS * 1_000_000] * NUM_ROWS), "us"),
        (pl.Series([SECONDS * 10**9] * NUM_ROWS), "ns"),
        (pl.Series(range(0, 5 * NUM_ROWS, 5)), "relative_s"),  # as in Yambda
    ],
)
def test_the_unit_of_the_times_is_seen_by_their_size(tmp_path, times, unit):
    frame = pl.DataFrame({"uid": range(NUM_ROWS), "item_id": range(NUM_ROWS), "timestamp": times})
    frame.write_parquet(tmp_path / "log.parquet")
    drafted = draft_source(str(tmp_path / "log.parquet"))
    assert spec_of(drafted, tmp_path).time_unit == unit
    assert bool(drafted.unsure) == (unit == "relative_s")


def test_event_types_get_weights_by_their_names_and_ids_are_no_types(tmp_path):
    kinds = ["view", "addtocart", "transaction", "dislike", "something"]
    frame = pl.DataFrame(
        {
            "session": range(NUM_ROWS),
            "aid": range(NUM_ROWS),
            "ts": [SECONDS] * NUM_ROWS,
            "type": [kinds[number % 5] for number in range(NUM_ROWS)],
        }
    )
    frame.write_parquet(tmp_path / "log.parquet")
    spec = spec_of(draft_source(str(tmp_path / "log.parquet")), tmp_path)
    assert spec.event_weights == {"view": 1, "addtocart": 4, "transaction": 8, "dislike": 0, "something": 1}
    many = frame.with_columns(pl.Series("type", [f"t{number}" for number in range(NUM_ROWS)]))
    pl.concat([many, many.with_columns(pl.col("type") + "x")]).write_parquet(tmp_path / "log.parquet")
    assert not spec_of(draft_source(str(tmp_path / "log.parquet")), tmp_path).columns.event_type


def test_a_number_that_several_events_share_is_no_event_id(tmp_path):
    """An order of three items: rows with the id of another event would be left out."""
    text = lines("{u},{i},{s},{u}", "user_id,item_id,ts,order_id")
    assert not spec_of(draft(tmp_path, "log.csv", text), tmp_path).columns.event_id
    text = lines("{u},{i},{s},e{n}", "user_id,item_id,ts,event_id")
    assert spec_of(draft(tmp_path, "log.csv", text), tmp_path).columns.event_id == "event_id"


def test_a_day_and_a_month_that_could_be_exchanged_are_said_to_be_unsure(tmp_path):
    drafted = draft(tmp_path, "log.csv", lines("{u},{i},03/04/2025", "user,item,date"))
    assert any("time_format" in sentence and "would fit too" in sentence for sentence in drafted.unsure)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("empty.csv", "user_id,item_id,timestamp\n", "there is no row in it"),
        ("long.csv", "user,item,ts\n" + f'"{"x" * 200_000}",2,3\n' * 2, "cuts its lines into three columns or more"),
        ("prose.txt", "this is no log\nof anything\nat all, really\n", "cuts its lines into three columns or more"),
        ("items.csv", lines("{i},a title,4.5", "item_id,title,price"), "no column can be the time of an event"),
        ("floats.csv", lines("0.5,{i}.25,{s}", "x,y,timestamp"), "no column can be the user"),
    ],
)
def test_what_is_no_log_is_refused_in_one_sentence(tmp_path, name, text, said):
    with pytest.raises(InputError, match=name) as error:
        draft(tmp_path, name, text)
    assert said in str(error.value)


def test_the_job_writes_the_file_once_and_a_night_can_be_prepared_with_it(tmp_path):
    name, text, *_ = LAYOUTS["RetailRocket"]
    (tmp_path / name).write_text(text)
    ask = ["--from", str(tmp_path / name), "--name", "shop"]
    ended = run_job("init_source", "", folder=tmp_path, arguments=ask, has_configuration=False)
    assert ended.code == 0, ended.stderr
    assert ended.last_line["path"] == "conf/sources/shop.yaml"
    assert len(ended.last_line["rows"]) == 10
    again = run_job("init_source", "", folder=tmp_path, arguments=ask, has_configuration=False)
    assert again.code == 20
    assert "conf/sources/shop.yaml: there already" in again.stderr
    keys = {"log.uri": tmp_path / name, "log.source": "shop", "split.method": "leave_one_out", "cluster.mode": "local"}
    prepared = run_job("prepare", str(tmp_path / "root"), folder=tmp_path, **keys)
    assert prepared.code == 0, prepared.stderr
    assert prepared.last_line["rows_read"] == NUM_ROWS
    assert json.loads(prepared.stdout)["users"] == 7


def test_the_index_that_pandas_writes_without_a_name_is_no_column(tmp_path):
    spec = spec_of(draft(tmp_path, "log.csv", lines("{n},K{u},A{i},{s}", ",who,what,ts")), tmp_path)
    assert (spec.columns.user_id, spec.columns.item_id) == ("who", "what")
