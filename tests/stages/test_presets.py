"""The source files of public logs, on samples that are laid out as these logs are."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from pipeline.io.inputs import SOURCES
from tests.io.inputs_on_disk import settings_for
from tests.stages.prepared import run

NOON = int(datetime(2025, 3, 4, 12, tzinfo=UTC).timestamp())
USERS, ITEMS = [1, 1, 1, 2, 2], [10, 11, 12, 11, 13]


def csv(name: str, header: str, form: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        rows = [form.format(u=u, i=i, s=NOON + n, n=n % 2) for n, (u, i) in enumerate(zip(USERS, ITEMS, strict=True))]
        (folder / name).write_text("\n".join([header, *rows] if header else rows) + "\n")

    return write


def parquet(name: str, times: list[int], kinds: list[str], user: str, item: str, ts: str, kind: str) -> Callable:
    def write(folder: Path) -> None:
        pl.DataFrame({user: USERS, item: ITEMS, ts: times, kind: kinds}).write_parquet(folder / name)

    return write


PRESETS: dict[str, tuple[Callable[[Path], None], list[float]]] = {
    "movielens_1m": (csv("ratings.dat", "", "{u}::{i}::4::{s}"), [1.0] * 5),
    "movielens_20m": (csv("ratings.csv", "userId,movieId,rating,timestamp", "{u},{i},3.5,{s}"), [1.0] * 5),
    "amazon_ratings": (csv("ratings_Books.csv", "", "{u},{i},5.0,{s}"), [1.0] * 5),
    "amazon_2023": (csv("Books.csv", "user_id,parent_asin,rating,timestamp", "{u},{i},5.0,{s}123"), [1.0] * 5),
    "hm": (
        csv(
            "transactions_train.csv", "t_dat,customer_id,article_id,price,sales_channel_id", "2020-09-20,{u},{i},0.05,2"
        ),
        [1.0] * 5,
    ),
    "kuairand": (
        csv(
            "log_standard_4_08_to_4_21_1k.csv",
            "user_id,video_id,date,hourmin,time_ms,is_click,is_like",
            "{u},{i},20220408,1400,{s}999,{n},0",
        ),
        [0.0, 1.0, 0.0, 1.0, 0.0],
    ),
    "otto": (
        parquet(
            "train.parquet",
            [1_000 * (NOON + n) for n in range(5)],
            ["clicks", "carts", "orders", "clicks", "carts"],
            *("session", "aid", "ts", "type"),
        ),
        [1.0, 3.0, 6.0, 1.0, 3.0],
    ),
    "personalize": (csv("interactions.csv", "USER_ID,ITEM_ID,TIMESTAMP,EVENT_TYPE", "{u},{i},{s},Click"), [1.0] * 5),
    "recbole": (
        csv("ml-100k.inter", "user_id:token\titem_id:token\trating:float\ttimestamp:float", "{u}\t{i}\t4\t{s}"),
        [1.0] * 5,
    ),
    "retailrocket": (
        csv("events.csv", "timestamp,visitorid,event,itemid,transactionid", "{s}123,{u},addtocart,{i},"),
        [4.0] * 5,
    ),
    "yambda": (
        parquet(
            "multi_event.parquet",
            [5, 10, 15, 20, 25],
            ["listen", "like", "dislike", "listen", "unlike"],
            *("uid", "item_id", "timestamp", "event_type"),
        ),
        [1.0, 4.0, 0.0, 1.0, 0.0],
    ),
}


def test_every_source_file_of_a_public_log_is_tried():
    shipped = {path.stem for path in SOURCES.glob("*.yaml")} - {"default", "ratings_parquet"}
    assert shipped == PRESETS.keys()


@pytest.mark.parametrize("preset", PRESETS)
def test_a_public_log_is_read_as_its_source_file_says(tmp_path, preset):
    write, weights = PRESETS[preset]
    (tmp_path / "log").mkdir()
    write(tmp_path / "log")
    settings = settings_for(tmp_path, tmp_path / "log", preset, split={"method": "leave_one_out"})
    buckets, manifest = run(settings)
    assert (manifest.counts["rows_read"], manifest.counts["events"], manifest.counts["users"]) == (5, 5, 2)
    found = {
        str(user): bucket.weights[bucket.offsets[row] : bucket.offsets[row + 1]].tolist()
        for bucket in buckets
        for row, user in enumerate(bucket.user_ids.to_pylist())
    }
    assert found == {"1": weights[:3], "2": weights[3:]}
    times = np.concatenate([bucket.event_ts for bucket in buckets])
    day = {"yambda": 946_684_800, "hm": 1_600_560_000}.get(preset, NOON)
    assert (np.abs(times // 1_000_000 - day) < 86_400).all()
