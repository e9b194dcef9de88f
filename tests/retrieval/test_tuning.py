"""The choice of a search against its own judge."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from pipeline.data.lists import Lists
from pipeline.evaluation.metrics import overlap_at_k
from pipeline.retrieval import tuning
from pipeline.retrieval.bonuses import Bonuses
from pipeline.retrieval.brute_force import brute_force
from pipeline.retrieval.index import ShardIndex
from pipeline.retrieval.low_rank_fit import fit_low_rank
from pipeline.retrieval.search import search_shard
from pipeline.retrieval.shard import make_shard
from pipeline.retrieval.tuning import SampleQueries, tune
from pipeline.settings import SearchSettings, TableDtype
from tests.retrieval.worlds import World, make_world, open_index

pytestmark = pytest.mark.usefixtures("backend")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(tuning, "TIMING_SECONDS", 0.01)


def low_rank_world() -> tuple[World, World, torch.Tensor, tuning.QueryMap]:
    """Queries to tune on, others to check with, the low-rank table and its map."""
    world = make_world(num_queries=500, num_items=3_000)
    sample = world.queries.take(slice(200, None))
    scores = world.mol(sample, world.items).detach()
    fit = fit_low_rank(sample, scores, [32])
    table = fit.low_rank.item_vectors(scores[fit.low_rank.at_A])

    def part(low: int, high: int) -> World:
        return replace(world, queries=world.queries.take(slice(low, high)), excluded=world.excluded.narrow(low, high))

    return part(0, 100), part(100, 200), table, fit.query_map


def opener(world: World, table: torch.Tensor) -> Callable[[TableDtype], ShardIndex]:
    return lambda dtype: open_index(world.mol, make_shard(0, world.items, table), SearchSettings(table_dtype=dtype))


def sample_of(world: World, query_map: tuning.QueryMap) -> SampleQueries:
    return SampleQueries(world.queries, world.rules, query_map)


@pytest.mark.parametrize("target", [0.5, 0.9])
def test_what_is_chosen_keeps_its_promise_on_other_queries(target):
    asked, others, table, query_map = low_rank_world()
    settings = SearchSettings(k=10, method="tuned", target_recall=target)
    choice = tune(opener(asked, table), sample_of(asked, query_map), settings, max_seconds=60)
    assert choice.chosen.recall_low >= target
    assert choice.num_queries == 100
    assert all(
        trial.milliseconds_per_query >= choice.chosen.milliseconds_per_query
        for trial in choice.trials
        if trial.recall_low >= target
    )
    index = opener(asked, table)(choice.chosen.table_dtype)
    found, exact = (
        search_shard(index, others.queries, others.rules, settings.model_copy(update=u), query_map=query_map)
        for u in (choice.chosen.settings, {"method": "exact"})
    )
    assert overlap_at_k(found.rows_BK.numpy(), exact.rows_BK.numpy(), 10).mean() > target - 0.05
    assert choice.chosen.method in choice.reason or "recall@10" in choice.reason


def test_exact_search_is_chosen_where_nothing_else_is_good_enough(monkeypatch):
    asked, _, table, query_map = low_rank_world()
    monkeypatch.setattr(tuning, "MAX_SHARE", 0.01)
    settings = SearchSettings(k=10, method="tuned", target_recall=1.0)
    choice = tune(opener(asked, table), sample_of(asked, query_map), settings, max_seconds=60)
    assert choice.chosen.method == "exact"
    assert "nothing that was tried reaches recall 1.0" in choice.reason


def test_narrower_tables_are_tried_with_what_is_chosen(monkeypatch):
    def as_if(sample, index, config) -> float:
        return 1e-6 if config.method == "topk_low_rank" else 1.0

    monkeypatch.setattr(SampleQueries, "seconds", as_if)  # on a busy machine another method may win
    asked, _, table, query_map = low_rank_world()
    settings = SearchSettings(k=10, method="tuned", target_recall=0.6)
    opened = []

    def open_with(dtype: TableDtype) -> ShardIndex:
        opened.append(dtype)
        return opener(asked, table)(dtype)

    choice = tune(open_with, sample_of(asked, query_map), settings, max_seconds=60)
    tried = [trial for trial in choice.trials if trial.table_dtype == "int8"]
    if "int8" in opener(asked, table)("bfloat16").table_dtypes:
        assert opened == ["bfloat16", "int8"]
        assert tried
    else:
        assert opened == ["bfloat16"]
        assert not tried


def test_little_time_means_fewer_queries_and_no_trial():
    asked, _, table, query_map = low_rank_world()
    settings = SearchSettings(k=10, method="tuned")
    choice = tune(opener(asked, table), sample_of(asked, query_map), settings, max_seconds=1e-6)
    assert choice.num_queries == 8
    assert [trial.method for trial in choice.trials] == ["exact"]


@pytest.mark.parametrize("has_bonuses", [False, True])
def test_a_trials_lower_bound_is_the_recall_less_two_standard_errors_or_by_the_rule_of_three(monkeypatch, has_bonuses):
    """Each trial is run again, by its settings, and its recall's bound is worked out by Python."""
    monkeypatch.setattr(SampleQueries, "seconds", lambda *_: 1e-6)  # no method is too slow: all are tried to the end
    monkeypatch.setattr(tuning, "MAX_SHARE", 1.0)
    world = make_world(num_queries=30, num_items=60)
    config = SearchSettings(k=8, method="tuned", target_recall=1.0)
    index = open_index(world.mol, world.shards(1)[0], config)
    some = Bonuses(Lists.of([[7, 21]] * 30), np.full(60, 50, np.float32), 60)
    rules = replace(world.rules, bonuses=some if has_bonuses else None)
    choice = tune(lambda _: index, SampleQueries(world.queries, rules, None), config, max_seconds=60)
    expected_scores, exact_BK = brute_force(world.mol, world.queries, world.shards(1), rules, 8)
    assert (expected_scores[:, 0] > 20).any() == has_bonuses
    assert {trial.recall == 1 for trial in choice.trials[1:]} == {True, False}
    for trial in choice.trials[1:]:
        again = config.model_copy(update=trial.settings)
        found = search_shard(index, world.queries, rules, again)
        recalls = overlap_at_k(found.rows_BK.numpy(), exact_BK, 8).tolist()
        mean = sum(recalls) / 30
        deviation = math.sqrt(sum((recall - mean) ** 2 for recall in recalls) / 29)
        margin = 1.959964 * deviation / math.sqrt(30) if mean < 1 else 3 / (30 * 8)
        assert trial.recall == pytest.approx(mean)
        assert trial.recall_low == pytest.approx(mean - margin)
