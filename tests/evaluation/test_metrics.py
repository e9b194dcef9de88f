"""Metrics of ranked lists, worked out by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.lists import Lists
from pipeline.evaluation.metrics import (
    MeanSum,
    add_sums,
    catalogue_coverage,
    find_hits,
    gini,
    hit_rate_at_k,
    measured_cutoffs,
    ndcg_at_k,
    overlap_at_k,
    ranking_sums,
    recall_at_k,
    reciprocal_rank,
    summarise,
)
from pipeline.evaluation.results import Estimate

# Query 0 wants 5 and 7 and finds 7 at rank 2. Query 1 wants 3 and finds it first, in a short list.
# Query 2 wants 1, 2, 4 and finds 4 and 1 at ranks 1 and 4. Query 3 wants 0 and misses.
RANKED = np.array([[6, 7, 2, 1], [3, 2, -1, -1], [4, 9, 8, 1], [5, 6, 7, 8]])
TARGETS = Lists(np.array([0, 2, 3, 6, 7]), np.array([5, 7, 3, 1, 2, 4, 0], dtype=np.int32))
COUNTS = np.array([2, 1, 3, 1])
HITS = np.array([[0, 1, 0, 0], [1, 0, 0, 0], [1, 0, 0, 1], [0, 0, 0, 0]], dtype=bool)


def test_a_hit_is_a_target_of_the_same_query():
    assert find_hits(RANKED, TARGETS).tolist() == HITS.tolist()


def test_padding_is_never_a_hit_even_where_its_key_is_that_of_the_query_before():
    last_row_wanted = Lists(np.array([0, 1, 2]), np.array([9, 9]))
    assert not find_hits(np.array([[-1, -1], [-1, -1]]), last_row_wanted).any()


def test_hit_rate_asks_for_at_least_one():
    assert hit_rate_at_k(HITS, 1).tolist() == [0, 1, 1, 0]
    assert hit_rate_at_k(HITS, 2).tolist() == [1, 1, 1, 0]
    assert hit_rate_at_k(HITS, 100).tolist() == [1, 1, 1, 0]


def test_recall_divides_by_all_relevant_items():
    assert recall_at_k(HITS, COUNTS, 4).tolist() == [1 / 2, 1, 2 / 3, 0]
    assert recall_at_k(HITS, COUNTS, 1).tolist() == [0, 1, 1 / 3, 0]


def test_ndcg_compares_with_the_best_list_of_k_places():
    second, third, fourth = 1 / math.log2(3), 1 / math.log2(4), 1 / math.log2(5)
    expected = [second / (1 + second), 1.0, (1 + fourth) / (1 + second + third), 0.0]
    assert ndcg_at_k(HITS, COUNTS, 4) == pytest.approx(expected)
    assert ndcg_at_k(HITS, COUNTS, 2) == pytest.approx([second / (1 + second), 1.0, 1 / (1 + second), 0.0])
    assert ndcg_at_k(HITS, COUNTS, 100) == pytest.approx(expected)


def test_ndcg_is_one_when_all_places_are_hits_though_more_targets_exist():
    assert ndcg_at_k(np.array([[True, True]]), np.array([50]), 2) == pytest.approx([1.0])


def test_reciprocal_rank_is_that_of_the_first_hit_and_zero_for_a_miss():
    assert reciprocal_rank(HITS).tolist() == [1 / 2, 1, 1, 0]
    assert reciprocal_rank(np.zeros((2, 0), dtype=bool)).tolist() == [0, 0]


def test_overlap_counts_shared_items_whatever_their_order():
    found = np.array([[1, 2, 3], [4, 5, 6], [1, -1, -1], [7, 8, 9], [1, 2, 3]])
    exact = np.array([[3, 1, 9], [4, 5, 6], [1, 2, -1], [-1, -1, -1], [2, 3, 1]])
    assert overlap_at_k(found, exact, 3) == pytest.approx([2 / 3, 1, 1 / 2, 1, 1])
    assert overlap_at_k(found, exact, 1).tolist() == [0, 1, 1, 1, 0]


def test_exposure_coverage_and_gini_by_hand():
    exposure = np.array([3, 2, 0, 0])
    assert catalogue_coverage(exposure) == 0.5
    # ascending 0, 0, 2, 3: (2·3 - 5)·2 + (2·4 - 5)·3 = 11, over 4 items × 5 shown
    assert gini(exposure) == pytest.approx(11 / 20)


@pytest.mark.parametrize(
    ("exposure", "expected"), [([7, 7, 7], 0.0), ([0, 0, 0, 9], 0.75), ([0, 0], 0.0), ([], 0.0), ([5], 0.0)]
)
def test_gini_at_its_ends(exposure, expected):
    assert gini(np.array(exposure, dtype=np.int64)) == pytest.approx(expected)


@given(st.lists(st.integers(0, 50), min_size=1, max_size=30))
def test_gini_is_half_the_mean_difference_over_the_mean(values):
    exposure = np.array(values)
    differences = np.abs(exposure[:, None] - exposure[None, :]).mean()
    expected = differences / (2 * exposure.mean()) if exposure.sum() else 0.0
    assert gini(exposure) == pytest.approx(expected, abs=1e-12)


def test_cutoffs_beyond_the_list_are_left_out():
    assert measured_cutoffs((100, 10, 50, 10), k=50) == (10, 50)
    assert measured_cutoffs((10, 100), k=5) == (5,)


def test_normal_interval_by_hand():
    values = MeanSum.of(np.array([0.2, 0.4, 0.6, 0.8]))
    margin = 1.959964 * math.sqrt((0.09 + 0.01 + 0.01 + 0.09) / 3 / 4)
    assert values.normal_interval() == pytest.approx((0.5 - margin, 0.5 + margin), abs=1e-6)


def test_wilson_interval_agrees_with_a_textbook_case_and_never_claims_certainty():
    assert MeanSum.of(np.array([1.0] * 2 + [0.0] * 8)).wilson_interval() == pytest.approx((0.0567, 0.5098), abs=1e-4)
    low, high = MeanSum.of(np.zeros(20)).wilson_interval()
    assert low == 0.0
    assert high == pytest.approx(0.1611, abs=1e-4)


def test_one_value_says_nothing_about_the_spread():
    assert MeanSum.of(np.array([0.3])).normal_interval() == (0.0, 1.0)
    assert MeanSum().normal_interval() == MeanSum().wilson_interval() == (0.0, 1.0)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=40), st.integers(0, 40))
def test_sums_of_parts_are_the_sum_of_the_whole(values, cut):
    array = np.array(values)
    parts, whole = MeanSum.of(array[:cut]) + MeanSum.of(array[cut:]), MeanSum.of(array)
    assert parts.count == whole.count
    assert parts.mean == pytest.approx(whole.mean)
    assert parts.normal_interval() == pytest.approx(whole.normal_interval(), abs=1e-6)


def test_units_add_up_to_the_metrics_of_all_queries():
    cutoffs = (1, 4)
    first, last = np.arange(3), np.array([3])
    parts = [ranking_sums(RANKED[part], TARGETS.take(part), cutoffs) for part in (first, last)]
    whole = ranking_sums(RANKED, TARGETS, cutoffs)
    assert list(add_sums(parts)) == ["hr@1", "ndcg@1", "recall@1", "hr@4", "ndcg@4", "recall@4", "mrr"]
    for name, value in add_sums(parts).items():
        assert value.mean == pytest.approx(whole[name].mean)
    assert whole["hr@4"].mean == 0.75
    assert whole["mrr"].mean == pytest.approx(2.5 / 4)


def test_hit_rates_get_wilsons_interval_and_other_means_the_normal_one():
    sums = {"hr@10": MeanSum.of(np.zeros(20)), "mrr": MeanSum.of(np.zeros(20))}
    summary = summarise(sums)
    assert summary["hr@10"].high > 0.1
    assert summary["mrr"] == Estimate(mean=0.0, low=0.0, high=0.0)
