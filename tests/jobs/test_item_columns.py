"""Columns of the catalogue beside the published items, in both layouts."""

from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest

from pipeline.io.publication.reader import read_latest
from tests.jobs.nightly import Ended, run_job

LAST_DAY = datetime(2026, 11, 20, 12, tzinfo=UTC)
NUM_USERS, NUM_ITEMS, K = 30, 40, 5
KEYS = {
    "cluster.mode": "local",
    "train.num_negatives": 8,
    "train.max_epochs": 1,
    "split.method": "leave_one_out",
    "search.k": K,
    "evaluate.cutoffs": "[3]",
    "output.num_buckets": 2,
    "queries.cold_users": "fallback",
    "gates.min_lift_over_popularity": 0,
}
ITEMS = [
    {
        "item_id": f"i{item:02d}",
        "available_until": date(2026, 12, 1) + timedelta(days=item) if item % 3 else None,
        "tags": [f"t{item % 4}", "all"] if item % 5 else [],
        "price": item / 4,
    }
    for item in range(NUM_ITEMS)
]


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lake")
    events = [
        {
            "user_id": f"u{user:02d}",
            "item_id": f"i{(user + 5 * step) % NUM_ITEMS:02d}",
            "event_ts": LAST_DAY - timedelta(days=6 - step, minutes=user),
        }
        for user in range(NUM_USERS)
        for step in range(7)
    ]
    queries = [{"user_id": f"u{user:02d}"} for user in range(NUM_USERS + 2)]
    for name, rows in (("log", events), ("items", ITEMS), ("queries", queries)):
        pl.DataFrame(rows).write_parquet(folder / f"{name}.parquet")
    return folder


def run_night(lake: Path, root: Path, **keys: object) -> Ended:
    tables = {f"{name}.uri": lake / f"{name}.parquet" for name in ("log", "items", "queries")}
    return run_job("nightly_candidates", str(root), **(KEYS | tables | {"log.source": "default"} | keys))


def test_each_item_has_its_columns_of_the_catalogue_in_both_layouts(lake, tmp_path):
    names = '["available_until", "tags", "price"]'
    expected = {item["item_id"]: item for item in ITEMS}
    for layout in ("long", "nested"):
        keys = {"output.layout": layout, "name": layout, "output.item_columns": names}
        ended = run_night(lake, tmp_path, **keys)
        assert ended.code == 0, ended.stderr[-4_000:]
    rows = read_latest(str(tmp_path), "long").to_pylist()
    assert len(rows) == (NUM_USERS + 2) * K
    for row in rows:
        own = expected[row["item_id"]]
        assert {name: row[name] for name in ("available_until", "tags", "price")} == {
            name: own[name] for name in ("available_until", "tags", "price")
        }
    lists = {row["user_id"]: row for row in read_latest(str(tmp_path), "nested").to_pylist()}
    for user in {row["user_id"] for row in rows}:
        own = [row for row in rows if row["user_id"] == user]
        assert lists[user]["item_ids"] == [row["item_id"] for row in own]
        for name in ("available_until", "tags", "price"):
            assert lists[user][name] == [row[name] for row in own]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ('["prise"]', "output.item_columns: the catalogue has no column 'prise'; did you mean 'price'?"),
        ('["item_id"]', "output.item_columns: the published table has a column 'item_id' of its own; rename it"),
    ],
)
def test_a_column_that_cannot_be_published_is_refused_before_training(lake, tmp_path, names, said):
    ended = run_night(lake, tmp_path, **{"output.item_columns": names})
    assert (ended.code, ended.last_line["error"]) == (20, said)
    assert not (tmp_path / "models").exists()
