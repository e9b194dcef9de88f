"""Users whose query no search can do: everybody else gets the same list as without them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import InputError
from pipeline.io.checkpoint import load_model
from pipeline.io.histories import read_bucket
from pipeline.stages import encode, poison, search
from pipeline.stages.encode import encode_queries
from pipeline.stages.poison import FAILED, around_failures
from pipeline.stages.queries import TonightsUsers
from tests.stages.worlds import RecordingRunner, World, make_world, read_table, retrieve

POISON = ["u00004", "u00017", "u00018"]
REASON = "the computation failed: ZeroDivisionError: a number too odd"


@given(st.integers(0, 40), st.sets(st.integers(0, 39), max_size=6))
def test_all_rows_but_those_that_fail_are_done_once_and_in_order(num_rows: int, bad: set[int]) -> None:
    def work(rows: np.ndarray) -> list[int]:
        if bad & set(rows.tolist()):
            raise ZeroDivisionError("a number too odd\nand a second line")
        return rows.tolist()

    parts, failed = around_failures(work, num_rows)
    assert failed == dict.fromkeys(sorted(row for row in bad if row < num_rows), REASON)
    assert [row for _, done in parts for row in done] == [row for row in range(num_rows) if row not in bad]
    assert all(rows.tolist() == done for rows, done in parts)


@pytest.mark.parametrize("error", [InputError("a file is gone"), MemoryError(), torch.OutOfMemoryError()])
def test_a_fault_that_is_not_of_single_rows_is_raised_at_once(error: Exception) -> None:
    calls = []

    def work(rows: np.ndarray) -> None:
        calls.append(len(rows))
        raise error

    with pytest.raises(type(error)):
        around_failures(work, 8)
    assert calls == [8]


def test_where_too_many_rows_fail_the_fault_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(poison, "MAX_FAILED", 10)
    calls = []

    def work(rows: np.ndarray) -> None:
        calls.append(len(rows))
        if rows[-1] >= first_bad:
            raise ZeroDivisionError("too many of them")

    first_bad = 0
    assert len(around_failures(work, 8)[1]) == 8
    calls.clear()
    with pytest.raises(ZeroDivisionError, match="too many of them"):
        around_failures(work, 1_000)
    assert len(calls) < 40, "where not one row can be done, few are tried alone"
    first_bad = 990
    assert len(around_failures(work, 1_000)[1]) == 10
    with pytest.raises(ZeroDivisionError, match="too many of them"):
        around_failures(work, 1_001)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path, overrides=["corpus.num_shards=2"])


def queries_of(world: World, user_ids: list[str]) -> set[float]:
    """The first number of each of these users' queries."""
    model, users = load_model(world.storage, world.night.checkpoint), TonightsUsers.of(world.night, 3)
    found = set()
    for unit in range(3):
        batch = encode_queries(model, read_bucket(world.storage, world.night.histories, unit), users, unit)
        firsts = batch.queries.components_BQD[:, 0, 0].tolist()
        pairs = zip(batch.searched_user_ids.to_pylist(), firsts, strict=True)
        found |= {first for user, first in pairs if user in user_ids}
    return found


def failing(real: Callable, bad: set[float], shards: set[int]) -> Callable:
    """`search_shard` that fails for these queries, in shards that begin with these rows."""

    def search_shard(index, queries, *rest):
        if index.first_row in shards and bad & set(queries.components_BQD[:, 0, 0].tolist()):
            raise ZeroDivisionError("a number too odd")
        return real(index, queries, *rest)

    return search_shard


def assert_others_are_served(world: World, lists: pa.Table, expected: pa.Table) -> None:
    is_other = ~pl.from_arrow(expected)["user_id"].is_in(POISON)
    own = ["surface"]  # tells the runs of a world apart
    assert pl.from_arrow(lists).drop(own).equals(pl.from_arrow(expected).filter(is_other).drop(own))
    users = {row["user_id"]: row for row in read_table(world, "users").to_pylist()}
    assert len(users) == 40
    for user, row in users.items():
        is_bad = user in POISON
        assert (row["status"], row["reason"]) == (("error", REASON) if is_bad else ("ok", "")), user
        assert row["num_returned"] == (0 if is_bad else 10)
        assert not (is_bad and row["is_proven"])


@pytest.mark.parametrize("shards_at_once", [1, 2])
@pytest.mark.parametrize("shards", [{0}, {60}, {0, 60}])
def test_a_search_goes_on_without_users_whose_query_fails(world, monkeypatch, shards_at_once, shards):
    expected = retrieve(world.with_settings("output.surface=whole"))
    bad = queries_of(world, POISON)
    assert len(bad) == len(POISON)
    monkeypatch.setattr(search, "search_shard", failing(search.search_shard, bad, shards))
    lists = retrieve(world, RecordingRunner(world.settings, shards_at_once))
    assert_others_are_served(world, lists, expected)


def test_users_whose_history_cannot_be_encoded_are_left_out(world, monkeypatch):
    expected = retrieve(world.with_settings("output.surface=whole"))
    bad, real = queries_of(world, POISON), encode.encode_sequences

    def encode_sequences(model, histories, keys):
        queries = real(model, histories, keys)
        if bad & set(queries.components_BQD[:, 0, 0].tolist()):
            raise ZeroDivisionError("a number too odd")
        return queries

    monkeypatch.setattr(encode, "encode_sequences", encode_sequences)
    assert_others_are_served(world, retrieve(world), expected)


def test_rules_for_lists_go_on_without_them_too(world, monkeypatch):
    rule = "rules.at_most.item_id=1"  # changes no list, but the search goes in rounds
    expected = retrieve(world.with_settings("output.surface=whole"))
    ruled = world.with_settings(rule)
    assert (
        retrieve(ruled.with_settings("output.surface=ruled"))
        .drop_columns("surface")
        .equals(expected.drop_columns("surface"))
    )
    monkeypatch.setattr(search, "search_shard", failing(search.search_shard, queries_of(world, POISON), {0}))
    assert_others_are_served(ruled, retrieve(ruled, RecordingRunner(ruled.settings, 1)), expected)


def test_the_reason_begins_with_what_the_status_is_known_by():
    assert REASON.startswith(FAILED)
