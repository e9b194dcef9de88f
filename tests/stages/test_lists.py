"""The rounds of a search under rules for lists: how deep they look, and what an interrupted one keeps."""

from itertools import pairwise
from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import InfrastructureError, InputError
from pipeline.io.histories import read_items
from pipeline.settings import RulesSettings
from pipeline.stages.candidates import CandidateSink
from pipeline.stages.embed import embed_corpora
from pipeline.stages.lists import depths, search_units
from tests.stages.worlds import RecordingRunner, World, make_world, read_table, replace_items, retrieve, search_of

FEW = RulesSettings(at_most={"kind": 1})


@given(st.integers(1, 50), st.integers(50, 5_000), st.integers(50, 3_000))
def test_each_round_looks_deeper_down_to_the_last_item_that_may_be_looked_at(k, num_items, max_depth):
    found = depths(FEW.model_copy(update={"max_depth": max_depth}), k, num_items)
    assert list(found) == sorted(set(found))
    assert found[0] == min(2 * k, max_depth, num_items)
    assert found[-1] == min(max_depth, num_items)
    assert all(after <= 4 * before for before, after in pairwise(found))
    assert depths(RulesSettings(min_score=0.0), k, num_items) == (k,), "it only cuts lists short"


def ruled(root: Path) -> World:
    """Forty items of each of three kinds, of which a list may have four: eight items need no third kind's."""
    world = make_world(root, overrides=["rules.at_most.kind=4", "search.k=12", "rules.max_depth=120"])
    items = read_items(world.storage, world.night.histories)
    kinds = pa.array([row % 3 if row < 100 else row % 2 for row in range(items.num_rows)])
    replace_items(world.night, items.append_column("kind", kinds))
    return world


class FailingSink(CandidateSink):
    def write(self, unit, batch, result):
        raise OSError("the store is gone")


def searches(runner: RecordingRunner) -> list[tuple[str, list[int]]]:
    return [(stages.rpartition("+")[2], units) for stages, units in runner.ran if stages.startswith("QueryEncoder")]


@pytest.mark.parametrize("shards_at_once", [1, 3])
def test_a_search_that_ends_too_soon_keeps_the_rounds_that_are_done(tmp_path: Path, shards_at_once: int) -> None:
    expected = retrieve(ruled(tmp_path / "whole"))
    per_kind = pl.from_arrow(expected).with_columns(row=pl.col("item_id").str.slice(1).cast(pl.Int64))
    kind = pl.when(pl.col("row") < 100).then(pl.col("row") % 3).otherwise(pl.col("row") % 2)
    assert per_kind.group_by("user_id", kind.alias("kind")).len()["len"].max() == 4
    world = ruled(tmp_path / "killed")
    runner = RecordingRunner(world.settings, shards_at_once)
    embed_corpora(runner, world.night, world.settings)
    search = search_of(world)
    with pytest.raises(OSError, match="the store is gone"):
        search_units(runner, search, range(3), FailingSink)
    first = searches(runner)
    assert first[0][1] == [0, 1, 2]
    assert first[-1] == ("ListWriter", [0, 1, 2])
    assert sum(end == "ListChooser" for end, _ in first) >= 2, "some lists need another round"
    runner.ran.clear()
    search_units(runner, search, range(3), CandidateSink)
    assert searches(runner) == [("ListWriter", [0, 1, 2])]
    assert read_table(world, "candidates").equals(expected)
    assert not world.storage.list(f"{search.scratch}/")


def test_lists_of_a_round_that_are_gone_are_an_error_that_a_retry_heals(tmp_path: Path) -> None:
    world = ruled(tmp_path)
    runner = RecordingRunner(world.settings)
    embed_corpora(runner, world.night, world.settings)
    search = search_of(world)

    class Thief(CandidateSink):
        def write(self, unit, batch, result):
            for info in world.storage.list(f"{search.scratch}/"):
                world.storage.delete(info.key)
            super().write(unit, batch, result)

    with pytest.raises(InfrastructureError, match=r"gone or damaged; has another process finished this search"):
        search_units(runner, search, range(3), Thief)
    search_units(runner, search, range(3), CandidateSink)
    assert len(read_table(world, "users")) == 40


def test_units_without_users_and_a_column_without_a_value_change_nothing(tmp_path: Path) -> None:
    world = make_world(tmp_path, num_users=3, overrides=["rules.at_most.kind=1", "output.num_buckets=9"])
    items = read_items(world.storage, world.night.histories)
    replace_items(world.night, items.append_column("kind", pa.nulls(items.num_rows, pa.string())))
    plain = retrieve(make_world(tmp_path / "plain", num_users=3, overrides=["output.num_buckets=9"]))
    assert retrieve(world).equals(plain)


def test_a_corpus_of_one_item_and_one_that_is_smaller_than_k(tmp_path: Path) -> None:
    world = make_world(tmp_path, num_users=4, num_items=1, overrides=["rules.at_most.item_id=1", "search.k=1"])
    retrieve(world)
    users = {row["status"] for row in read_table(world, "users").to_pylist()}
    assert users == {"short"}, "everybody has seen it"
    small = make_world(tmp_path / "small", num_users=4, num_items=5, overrides=["rules.at_most.item_id=1"])
    with pytest.raises(InputError, match=r"search.k is 10, but the corpus has 5 items"):
        retrieve(small)
