"""Rules given with a call: each group's mask against brute force, on every backend and for every method."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.data.lists import Lists
from pipeline.native.loader import native_kernels
from pipeline.retrieval.backends import open_index
from pipeline.retrieval.brute_force import brute_force as oracle
from pipeline.retrieval.filters import Eligibility, Rules
from pipeline.retrieval.search import search_shard
from pipeline.retrieval.topk import TopK
from pipeline.settings import SearchSettings
from tests.retrieval.worlds import World, all_scores, as_lists, brute_force, make_world

K = 6
BACKENDS = ["torch", *(["native"] if native_kernels().functions else [])]
METHODS = ["exact", "exact_two_stage", "topk_avg", "topk_per_embd", "comb_topk"]


def ask(backend: str, method: str = "exact", num_kept: int = 400, max_escalated: int = 0) -> SearchSettings:
    return SearchSettings(
        k=K,
        backend=backend,
        method=method,
        num_preselected=num_kept,
        num_per_embd=num_kept,
        table_dtype="float32",
        max_escalated=max_escalated,
    )


def search(world: World, rules: Rules, config: SearchSettings, num_shards: int = 2) -> TopK:
    found = None
    for shard in world.shards(num_shards):
        found = search_shard(open_index(world.mol, shard, config), world.queries, rules, config, found)
    assert found is not None
    return found


def some_groups(num_queries: int, num_items: int, seed: int) -> Eligibility:
    """Four groups; the first may be shown everything, the last hardly anything."""
    rng = np.random.default_rng(seed)
    shares = np.array([1.0, 0.5, 0.2, 0.02])
    masks = torch.from_numpy(rng.random((4, num_items)) < shares[:, None])
    return Eligibility(masks, rng.integers(0, 4, num_queries))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=15)
@given(st.integers(0, 10_000), st.integers(1, 120))
def test_each_group_is_shown_the_best_of_what_it_may_be_shown(backend, method, seed, num_items):
    world = make_world(num_queries=9, num_items=num_items, seed=seed)
    eligibility = some_groups(9, num_items, seed)
    found = search(world, Rules(world.excluded, eligibility), ask(backend, method))
    is_eligible_BN = eligibility.is_eligible_GN[torch.from_numpy(eligibility.group_of_B)]
    assert as_lists(found) == brute_force(all_scores(world).masked_fill(~is_eligible_BN, -torch.inf), K)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
def test_a_rule_is_the_same_as_removing_the_items_from_the_corpus(backend, method):
    """Also where few candidates are kept: an ineligible item takes no place of stage 1 either."""
    world = make_world(num_queries=8, num_items=300)
    left = torch.rand(300, generator=torch.Generator().manual_seed(1)).argsort()[:120].sort().values
    is_eligible = torch.zeros(1, 300, dtype=torch.bool).index_fill(1, left, True)
    config = ask(backend, method, num_kept=10)
    by_rule = search(world, Rules(world.excluded, Eligibility(is_eligible, np.zeros(8, dtype=np.int64))), config, 1)
    new_row = {int(row): new for new, row in enumerate(left)}
    excluded = Lists.of([[new_row[row] for row in world.excluded[q].tolist() if row in new_row] for q in range(8)])
    smaller = search(replace(world, items=world.items.take(left)), Rules(excluded), config, 1)
    assert as_lists(by_rule) == [[(score, int(left[row])) for score, row in rows] for rows in as_lists(smaller)]
    assert torch.equal(by_rule.bounds_B, smaller.bounds_B)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
def test_the_groups_of_others_do_not_change_a_bit(backend, method):
    world = make_world(num_queries=12, num_items=200)
    rules = Rules(world.excluded, some_groups(12, 200, seed=3))
    config = ask(backend, method, num_kept=10, max_escalated=20)
    together = search(world, rules, config)
    for query in range(12):
        alone = replace(world, queries=world.queries.take(slice(query, query + 1)))
        found = search(alone, rules.take(np.array([query])), config)
        assert torch.equal(found.rows_BK[0], together.rows_BK[query])
        assert torch.equal(found.scores_BK[0], together.scores_BK[query])


def test_a_mask_that_allows_everything_is_no_rule():
    world = make_world(num_queries=5, num_items=150)
    everything = Eligibility(torch.ones(1, 150, dtype=torch.bool), np.zeros(5, dtype=np.int64))
    for backend in BACKENDS:
        config = ask(backend, "topk_avg", 10)
        found, plain = search(world, Rules(world.excluded, everything), config), search(world, world.rules, config)
        assert torch.equal(found.rows_BK, plain.rows_BK)
        assert torch.equal(found.bounds_B, plain.bounds_B)


def test_the_oracle_knows_the_groups():
    world = make_world(num_queries=7, num_items=80)
    rules = Rules(world.excluded, some_groups(7, 80, seed=5))
    scores, rows = oracle(world.mol, world.queries, world.shards(3), rules, K)
    found = search(world, rules, ask("torch"))
    assert rows.tolist() == found.rows_BK.tolist()
    assert scores.tolist() == found.scores_BK.tolist()
