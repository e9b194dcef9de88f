"""What an evaluation asks: targets, the sample, popularity, and the oracle that exact search is held against."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.interactions import Bucket
from pipeline.retrieval.evaluation import (
    brute_force,
    evaluable_users,
    held_out_targets,
    rank_by_popularity,
    sampling_keys,
)
from pipeline.retrieval.search import search_shard
from pipeline.settings import SearchSettings
from tests.retrieval.worlds import exclusions, make_world


def bucket(*users: tuple[list[int], list[int], list[int]]) -> Bucket:
    """Each user's train, validation and test events, as item rows."""
    events = [[*train, *validation, *test] for train, validation, test in users]
    rows = np.array([row for rows in events for row in rows], dtype=np.int32)
    return Bucket(
        pa.array([f"u{n}" for n in range(len(users))], type=pa.string()),
        np.concatenate([[0], np.cumsum([len(e) for e in events])]).astype(np.int64),
        rows,
        np.arange(len(rows), dtype=np.int64),
        np.ones(len(rows), dtype=np.float32),
        np.array([len(train) for train, _, _ in users], dtype=np.int32),
        np.array([len(validation) for _, validation, _ in users], dtype=np.int32),
    )


def test_targets_are_the_distinct_test_items_that_were_not_seen_before():
    users = bucket(
        ([1, 2], [3], [4, 1, 5, 4, 3]),  # 1 and 3 were seen, 4 comes twice
        ([1], [], [1]),  # nothing new
        ([], [], [0, 9]),  # nothing before
        ([7], [8], []),  # no test
        ([1], [2], [3]),
    )
    targets = held_out_targets(users)
    lists = [targets.rows[a:b].tolist() for a, b in zip(targets.offsets, targets.offsets[1:], strict=False)]
    assert lists == [[4, 5], [], [0, 9], [], [3]]
    at, num_without_history = evaluable_users(users)
    assert at.tolist() == [0, 4]
    assert num_without_history == 1


def test_an_empty_bucket_has_nobody_to_ask():
    at, num_without_history = evaluable_users(bucket())
    assert (at.tolist(), num_without_history) == ([], 0)


def test_a_sample_of_the_smallest_keys_is_even_and_depends_on_the_seed():
    keys = sampling_keys(np.arange(20_000), seed=0)
    assert len(np.unique(keys)) == 20_000
    sampled = np.argsort(keys)[:2_000]
    in_each_tenth = np.bincount(sampled // 2_000, minlength=10)
    assert in_each_tenth.min() > 150  # 200 expected, standard deviation 13
    assert in_each_tenth.max() < 250
    other = np.argsort(sampling_keys(np.arange(20_000), seed=1))[:2_000]
    assert 130 < len(np.intersect1d(sampled, other)) < 270  # 200 expected of two independent samples


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 1_000))
def test_the_key_of_a_user_depends_on_nobody_else(user, seed):
    alone = sampling_keys(np.array([user]), seed)
    assert sampling_keys(np.array([5, user, 7]), seed)[1] == alone[0]


@pytest.mark.parametrize("k", [1, 4, 60])
def test_popularity_equals_a_sorted_list_without_what_each_has_seen(k):
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 5, 50)  # many ties
    seen = [rng.choice(50, size, replace=False) for size in (0, 3, 30, 50)]
    found = rank_by_popularity(counts, exclusions(seen), SearchSettings(k=k, query_tile=3, item_tile=7))
    by_popularity = sorted(range(50), key=lambda row: (-counts[row], row))
    for query, hidden in enumerate(seen):
        expected = [row for row in by_popularity if row not in set(hidden.tolist())][:k]
        assert found[query].tolist() == expected + [-1] * (k - len(expected))


def test_popularity_of_nobody_is_empty():
    assert rank_by_popularity(np.array([3, 1]), exclusions([]), SearchSettings(k=2)).shape == (0, 2)


@pytest.mark.parametrize("num_shards", [1, 4])
def test_brute_force_agrees_with_exact_search_to_the_last_bit(num_shards):
    world = make_world(num_queries=6, num_items=90)
    scores, rows = brute_force(world.mol, world.queries, world.shards(num_shards), world.excluded, k=12)
    settings, found = SearchSettings(k=12, query_tile=4, item_tile=16), None
    for shard in world.shards(num_shards):
        found = search_shard(world.mol, world.queries, shard, world.excluded, settings, found)
    assert found is not None
    assert rows.tolist() == found.rows_BK.tolist()
    assert scores.tolist() == found.scores_BK.tolist()


def test_brute_force_pads_where_few_items_are_left_and_hides_the_ineligible():
    world = make_world(num_queries=2, num_items=10, max_excluded=0)
    (shard,) = world.shards(1)
    shard.is_eligible_N[3] = False
    excluded = exclusions([np.arange(8), np.empty(0, dtype=np.int32)])
    scores, rows = brute_force(world.mol, world.queries, [shard], excluded, k=12)
    assert sorted(rows[0][:2]) == [8, 9]
    assert rows[0][2:].tolist() == [-1] * 10
    assert np.isneginf(scores[0][2:]).all()
    assert sorted(rows[1][:9]) == [0, 1, 2, 4, 5, 6, 7, 8, 9]
