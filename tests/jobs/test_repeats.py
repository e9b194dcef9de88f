"""Letting back what a user has seen, as for groceries: whole nights on a log of people who come back for the same few
items."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.io.publication.reader import read_latest
from tests.jobs.nightly import Ended, run_job

LAST_DAY = datetime(2026, 11, 20, 12, tzinfo=UTC)
NUM_USERS, NUM_ITEMS, NUM_DAYS = 40, 24, 9
KEYS = {
    "cluster.mode": "local",
    "train.num_negatives": 8,
    "train.max_epochs": 4,
    "search.k": 10,
    "evaluate.cutoffs": "[3]",
    "output.num_buckets": 2,
}


def items_of(user: int) -> list[int]:
    """What a user looks at on every day; the first two are also bought."""
    return [(7 * user + step) % NUM_ITEMS for step in range(4)]


def write_log(folder: Path) -> None:
    events = [
        (f"u{user:02d}", f"i{item:02d}", LAST_DAY - timedelta(days=day, minutes=60 - 2 * place - is_bought), kind)
        for user in range(NUM_USERS)
        for day in range(NUM_DAYS)
        for place, item in enumerate(items_of(user))
        for is_bought, kind in enumerate(("view", "purchase")[: 1 + (place < 2)])
    ]
    names = ("user_id", "item_id", "event_ts", "event_type")
    columns = dict(zip(names, map(pa.array, zip(*events, strict=True)), strict=True))
    columns["event_ts"] = columns["event_ts"].cast(pa.timestamp("us", tz="UTC"))
    pq.write_table(pa.table(columns), folder / "events.parquet")


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lake")
    write_log(folder)
    return folder


def night(lake: Path, root: Path, **prepare: object) -> Ended:
    keys = (
        KEYS
        | {"log.uri": lake, "log.source": "default"}
        | {f"prepare.{name}": value for name, value in prepare.items()}
    )
    return run_job("nightly_candidates", str(root), **keys)


def shown(root: Path) -> dict[str, set[str]]:
    lists: dict[str, set[str]] = {}
    for row in read_latest(str(root), "candidates").to_pylist():
        lists.setdefault(row["user_id"], set()).add(row["item_id"])
    return lists


def test_a_night_that_lets_everything_back_finds_what_people_come_back_for(lake, tmp_path):
    ended = night(lake, tmp_path, seen_event_types="[]")
    assert ended.code == 0, ended.stderr[-4_000:]
    (metrics,) = tmp_path.glob("evaluations/*/metrics-*.json")
    found = json.loads(metrics.read_text())
    assert (found["queries"], found["only_repeats"]) == (NUM_USERS, 0)
    assert "to be found are the items of those events, seen before or not" in found["protocol"]
    assert found["model"]["hr@3"]["mean"] > 0.9
    assert found["counts"]["hr@3"]["mean"] > 0.9
    for user, items in shown(tmp_path).items():
        assert items >= {f"i{item:02d}" for item in items_of(int(user[1:]))}


def test_only_what_was_bought_is_not_shown_again(lake, tmp_path):
    ended = night(lake, tmp_path, seen_event_types="[purchase]")
    assert ended.code == 0, ended.stderr[-4_000:]
    lists = shown(tmp_path)
    assert len(lists) == NUM_USERS
    for user, items in lists.items():
        own = [f"i{item:02d}" for item in items_of(int(user[1:]))]
        assert not items & set(own[:2])
        assert items & set(own[2:])
    (metrics,) = tmp_path.glob("evaluations/*/metrics-*.json")
    protocol = json.loads(metrics.read_text())["protocol"]
    assert (
        "to be found are the items of those events that the user has not seen before in events of purchase" in protocol
    )


def test_by_default_there_is_nothing_to_find_where_people_only_come_back(lake, tmp_path):
    ended = night(lake, tmp_path)
    assert ended.code == 20
    assert "nobody has a test event on an item that may be shown to them" in ended.stderr
    assert "prepare.seen_event_types" in ended.stderr


def test_a_type_that_the_log_does_not_have_is_refused(lake, tmp_path):
    ended = night(lake, tmp_path, seen_event_types="[purchase, bougth]")
    assert ended.code == 20
    assert "no event is of the type 'bougth' (prepare.seen_event_types), so none would hide its item" in ended.stderr
