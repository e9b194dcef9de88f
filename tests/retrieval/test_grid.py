"""How searches are tried in turn: what is asked of each method, when to stop, and what is the cheapest."""

from collections.abc import Iterable, Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.lists import Lists
from pipeline.retrieval import tuning
from pipeline.retrieval.filters import Rules
from pipeline.retrieval.tuning import METHODS, Judge, SampleQueries, Trial, cheapest, grid, make_trial, try_in_turn
from pipeline.settings import SearchMethod, SearchSettings
from tests.retrieval.worlds import make_world

WORLD = make_world(num_queries=6, num_items=20)
SAMPLE = SampleQueries(WORLD.queries, WORLD.rules, None)
NUM_PAIRS = WORLD.queries.gate_BP.shape[1]


def trial(recall_low: float, milliseconds: float, method: SearchMethod = "topk_avg") -> Trial:
    return make_trial(SearchSettings(method=method), 1.0, recall_low, milliseconds / 1e3)


@pytest.mark.parametrize("method", METHODS)
@given(k=st.integers(1, 200), num_items=st.integers(200, 50_000))
def test_a_grid_only_rises_is_valid_and_ends_at_a_share_of_the_shard(method, k, num_items):
    base = SearchSettings(k=k, num_preselected=max(k, 1_000), max_escalated=7)
    configs = list(grid(method, base, SAMPLE, num_items))
    for config in configs:
        SearchSettings.model_validate(config.model_dump())  # as if a person had written it
        assert (config.method, config.k, config.max_escalated) == (method, k, 0)
    most = max(k, num_items // 4)
    if method in ("topk_avg", "topk_low_rank"):
        kept = [config.num_preselected for config in configs]
        assert kept == sorted(kept)
        assert all(k <= number <= most for number in kept)
        assert bool(kept) == (1.25 * k <= most)
    else:
        per_embd = [config.num_per_embd for config in configs]
        assert per_embd == sorted(per_embd)
        assert all(number >= 1 and number * NUM_PAIRS <= 4 * most for number in per_embd)
        assert all(k <= config.num_preselected <= num_items for config in configs)


def test_a_grid_by_hand():
    """Ten wanted of 404 items: 12.5 candidates at first, times the square root of two, up to a hundred and one."""
    configs = grid("topk_avg", SearchSettings(k=10), SAMPLE, 404)
    assert [config.num_preselected for config in configs] == [12, 17, 25, 35, 50, 70, 100]


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0.1, 9)), max_size=9), st.floats(0.01, 1))
def test_the_cheapest_is_the_fastest_of_those_that_reach_the_target(tried, target):
    trials = [trial(1.0, 5.0, "exact"), *(trial(low, milliseconds) for low, milliseconds in tried)]
    chosen = cheapest(trials, target)
    assert chosen.recall_low >= target
    assert chosen.milliseconds_per_query == min(t.milliseconds_per_query for t in trials if t.recall_low >= target)


class Scripted(Judge):
    """Gives the trials that it was told."""

    def script(self, trials: Iterable[Trial]) -> None:
        object.__setattr__(self, "_script", iter(trials))

    def trial(self, index: object, settings: SearchSettings) -> Trial:
        return next(self._script)


def tried(trials: list[Trial], earlier: list[Trial], seconds_left: float = 60.0) -> int:
    """How many of the trials are made."""
    judge = Scripted(SAMPLE, np.empty((0, 0), dtype=np.int64), earlier[0])
    judge.script(trials)
    configs: Iterator[SearchSettings] = iter([SearchSettings(target_recall=0.9)] * len(trials))
    deadline = tuning.time.monotonic() + seconds_left
    made = try_in_turn(None, configs, judge, earlier, deadline)
    assert made == trials[: len(made)]
    return len(made)


def test_a_method_is_tried_until_it_reaches_the_target_or_costs_more_than_what_does():
    exact = trial(1.0, 4.0, "exact")
    rising = [trial(0.5, 1.0), trial(0.89, 2.0), trial(0.9, 3.0), trial(0.99, 3.5)]
    assert tried(rising, [exact]) == 3, "the third reaches it"
    assert tried(rising, [exact, trial(0.95, 1.5)]) == 2, "the second costs more than one that does"
    assert tried([trial(0.5, 1.0), trial(0.6, 4.5), trial(0.9, 5.0)], [exact]) == 2, "or than exact search"
    assert tried(rising, [exact], seconds_left=-1.0) == 0, "and not at all when time is up"


def test_the_first_of_a_sample_are_its_first_queries_with_their_own_rules():
    first = SAMPLE.first(2)
    assert (len(SAMPLE), len(first)) == (6, 2)
    assert torch.equal(first.queries.gate_BP, WORLD.queries.gate_BP[:2])
    assert [first.rules.excluded[query].tolist() for query in range(2)] == [
        WORLD.excluded[query].tolist() for query in range(2)
    ]
    assert len(SampleQueries(WORLD.queries.take(slice(0, 0)), Rules(Lists.of([])), None)) == 0
