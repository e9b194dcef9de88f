"""Items that nobody has met yet: a night with content gives them to the users who like such items."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest

from pipeline.errors import InputError
from pipeline.io.publication.reader import read_latest
from tests.jobs.lakes import run_here

LAST_DAY = datetime(2026, 11, 20, 12, tzinfo=UTC)
NUM_CLUSTERS, NUM_MET, NUM_NEW, NUM_USERS = 4, 12, 3, 80
KEYS = {
    "cluster.mode": "local",
    "split.method": "leave_one_out",
    "search.method": "exact",
    "search.k": NUM_NEW,
    "evaluate.cutoffs": "[3]",
    "output.num_buckets": 2,
    "memory.enabled": False,
    "gates.min_lift_over_popularity": 0,
    "train.max_epochs": 8,
    "train.num_negatives": 16,
    "train.learning_rate": 0.01,
    "train.batch_positions": 64,
    "rules.show_if.new": '"item.is_new"',
}


@pytest.fixture(scope="module")
def lake(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Users of four tastes, who each look at ten of the twelve items of theirs; three more of each came in today."""
    folder = tmp_path_factory.mktemp("lake")
    events = [
        {
            "user_id": f"u{user:02d}",
            "item_id": f"i{user % NUM_CLUSTERS}-{(user // NUM_CLUSTERS + 5 * step) % NUM_MET:02d}",
            "event_ts": LAST_DAY - timedelta(days=9 - step, minutes=user),
        }
        for user in range(NUM_USERS)
        for step in range(10)
    ]
    items = [
        {"item_id": f"i{cluster}-{item:02d}", "tags": [f"t{cluster}", f"n{item % 3}"], "is_new": item >= NUM_MET}
        for cluster in range(NUM_CLUSTERS)
        for item in range(NUM_MET + NUM_NEW)
    ]
    for name, rows in (("log", events), ("items", items)):
        pl.DataFrame(rows).write_parquet(folder / f"{name}.parquet")
    return folder


def run_night(lake: Path, root: Path, **keys: object) -> None:
    tables = {"log.uri": lake / "log.parquet", "log.source": "default", "items.uri": lake / "items.parquet"}
    run_here(root, **(KEYS | tables | keys))


def share_of_own_taste(root: Path) -> float:
    """The share of the new items in the lists that are of their user's taste."""
    rows = read_latest(str(root), "candidates").to_pylist()
    assert len(rows) == NUM_USERS * NUM_NEW
    assert all(int(row["item_id"].split("-")[1]) >= NUM_MET for row in rows)
    return sum(int(row["user_id"][1:]) % NUM_CLUSTERS == int(row["item_id"][1]) for row in rows) / len(rows)


def test_new_items_go_to_those_who_like_such_items(lake, tmp_path):
    run_night(lake, tmp_path / "content", **{"model.content.values": '["tags"]'})
    assert share_of_own_taste(tmp_path / "content") > 0.9
    run_night(lake, tmp_path / "rows")
    assert share_of_own_taste(tmp_path / "rows") < 0.6, "without features a new item is like any other"


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"model.content.values": '["tag"]'}, "model.content: the catalogue has no column 'tag'; did you mean 'tags'?"),
        ({"model.content.words": '["tags"]'}, "model.content.words: the column item.tags has values of the type List"),
    ],
)
def test_a_column_that_cannot_be_read_so_is_refused_before_training(lake, tmp_path, keys, said):
    with pytest.raises(InputError) as error:
        run_night(lake, tmp_path, **keys)
    assert said in str(error.value)
    assert not (tmp_path / "models").exists()
