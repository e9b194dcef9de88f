"""Popularity, and the oracle that exact search is held against."""

import numpy as np
import pytest
import torch

from pipeline.data.lists import Lists
from pipeline.evaluation.popularity import rank_by_popularity
from pipeline.retrieval.backends import open_index
from pipeline.retrieval.brute_force import brute_force
from pipeline.retrieval.filters import Eligibility, Rules
from pipeline.retrieval.search import search_shard
from pipeline.settings import SearchSettings
from tests.retrieval.worlds import make_world


@pytest.mark.parametrize("share_eligible", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("k", [1, 4, 60])
def test_popularity_equals_a_sorted_list_without_what_each_has_seen_or_may_not_be_shown(k, share_eligible):
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 5, 50)  # many ties
    seen = [rng.choice(50, size, replace=False) for size in (0, 3, 30, 50)]
    is_eligible_N = rng.random(50) < share_eligible
    found = rank_by_popularity(counts, Lists.of(seen), k, is_eligible_N)
    by_popularity = [row for row in sorted(range(50), key=lambda row: (-counts[row], row)) if is_eligible_N[row]]
    for query, hidden in enumerate(seen):
        expected = [row for row in by_popularity if row not in set(hidden.tolist())][:k]
        assert found[query].tolist() == expected + [-1] * (k - len(expected))


def test_popularity_of_nobody_is_empty():
    assert rank_by_popularity(np.array([3, 1]), Lists.of([]), 2, np.array([True, False])).shape == (0, 2)


@pytest.mark.parametrize("num_shards", [1, 4])
def test_brute_force_agrees_with_exact_search_to_the_last_bit(num_shards):
    world = make_world(num_queries=6, num_items=90)
    scores, rows = brute_force(world.mol, world.queries, world.shards(num_shards), world.rules, k=12)
    settings, found = SearchSettings(k=12, method="exact"), None
    for shard in world.shards(num_shards):
        index = open_index(world.mol, shard, settings)
        found = search_shard(index, world.queries, world.rules, settings, found)
    assert found is not None
    assert rows.tolist() == found.rows_BK.tolist()
    assert scores.tolist() == found.scores_BK.tolist()


def test_brute_force_pads_where_few_items_are_left_and_hides_the_ineligible():
    world = make_world(num_queries=2, num_items=10, max_excluded=0)
    (shard,) = world.shards(1)
    eligible = Eligibility((torch.arange(10) != 3)[None], np.array([0, 0]))
    rules = Rules(Lists.of([np.arange(8), []]), eligible)
    scores, rows = brute_force(world.mol, world.queries, [shard], rules, k=12)
    assert sorted(rows[0][:2]) == [8, 9]
    assert rows[0][2:].tolist() == [-1] * 10
    assert np.isneginf(scores[0][2:]).all()
    assert sorted(rows[1][:9]) == [0, 1, 2, 4, 5, 6, 7, 8, 9]
