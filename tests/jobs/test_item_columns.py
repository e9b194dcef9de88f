"""Columns of the catalogue beside the published items, in both layouts."""

from datetime import date, timedelta
from pathlib import Path

import pytest

from pipeline.errors import InputError
from pipeline.io.publication.reader import read_latest
from tests.jobs.lakes import run_here, tables_of, write_lake

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
    write_lake(folder, ITEMS, NUM_USERS, num_new=2, num_steps=7)
    return folder


def test_each_item_has_its_columns_of_the_catalogue_in_both_layouts(lake, tmp_path):
    names = '["available_until", "tags", "price"]'
    expected = {item["item_id"]: item for item in ITEMS}
    for layout in ("long", "nested"):
        keys = {"output.layout": layout, "name": layout, "output.item_columns": names}
        run_here(tmp_path, **(KEYS | tables_of(lake) | keys))
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
    with pytest.raises(InputError) as error:
        run_here(tmp_path, **KEYS, **tables_of(lake), **{"output.item_columns": names})
    assert str(error.value) == said
    assert not (tmp_path / "models").exists()
