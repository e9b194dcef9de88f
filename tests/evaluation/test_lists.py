import math
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.evaluation.lists import intra_list_distance, novelty

ROWS = st.lists(st.lists(st.integers(0, 5), max_size=4, unique=True), min_size=1, max_size=4)


def cosine(first: np.ndarray, second: np.ndarray) -> float:
    norms = np.linalg.norm(first) * np.linalg.norm(second)
    return float(first @ second / norms) if norms else 0.0


def padded(rows: list[list[int]]) -> np.ndarray:
    return np.array([[*each, *[-1] * (4 - len(each))] for each in rows])


@given(ROWS, st.lists(st.integers(0, 50), min_size=6, max_size=6))
def test_novelty_is_the_mean_self_information_of_a_lists_items(rows, counts):
    bits = [-math.log2((count + 1) / (sum(counts) + 6)) for count in counts]
    expected = [sum(bits[row] for row in each) / len(each) for each in rows if each]
    assert novelty(padded(rows), np.array(counts)).tolist() == pytest.approx(expected)


@given(ROWS, st.integers(0, 100))
def test_distance_is_the_mean_over_all_pairs_of_a_list(rows, seed):
    vectors = np.random.default_rng(seed).normal(size=(6, 3)).astype(np.float32)
    vectors[5] = 0.0
    expected = []
    for each in rows:
        distances = [(1 - cosine(vectors[first], vectors[second])) / 2 for first, second in combinations(each, 2)]
        if distances:
            expected.append(np.mean(distances))
    assert intra_list_distance(padded(rows), vectors).tolist() == pytest.approx(expected, abs=1e-6)


def test_a_list_of_opposites_is_far_apart_and_one_of_copies_is_not():
    vectors = np.array([[1, 0], [-2, 0], [3, 0]], dtype=np.float32)
    assert intra_list_distance(np.array([[0, 1], [0, 2], [1, -1]]), vectors).tolist() == pytest.approx([1.0, 0.0])
