import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.errors import InputError
from pipeline.evaluation.metrics import find_hits, hits_at, ranking_sums, target_ranks
from pipeline.evaluation.paired import common_users, differences, paired_difference
from pipeline.schema import EVALUATED, evaluated_users
from tests.evaluation.test_metrics import RANKED, TARGETS


def test_ranks_say_where_a_target_stands():
    assert target_ranks(RANKED, TARGETS).tolist() == [0, 2, 1, 4, 0, 1, 0]


@given(st.integers(0, 500))
def test_the_ranks_of_targets_give_the_hits_of_their_lists(seed):
    rng = np.random.default_rng(seed)
    ranked = np.array([rng.permutation(8)[:4] for _ in range(5)])
    ranked[rng.random(ranked.shape) < 0.3] = -1
    targets = TARGETS.of([rng.permutation(8)[: rng.integers(1, 4)] for _ in range(5)])
    ranks = target_ranks(ranked, targets)
    for k in (1, 3, 4):
        assert hits_at(ranks, targets, k).tolist() == find_hits(ranked[:, :k], targets).tolist()


def test_the_difference_is_tested_on_the_same_users():
    """A difference that is small beside that between users, but the same way for most of them."""
    rng = np.random.default_rng(0)
    first = rng.random(400)
    second = np.clip(first + rng.normal(0.02, 0.05, 400), 0, 1)
    found = paired_difference(first, second)
    changes = second - first
    error = changes.std(ddof=1) / 20
    assert found.mean == pytest.approx(second.mean() - first.mean()) == pytest.approx(found.second - found.first)
    assert (found.low, found.high) == pytest.approx((found.mean - 1.959964 * error, found.mean + 1.959964 * error))
    assert found.p_value == pytest.approx(math.erfc(found.mean / error / math.sqrt(2)))
    assert 0 < found.p_value < 1e-6
    assert (found.num_better, found.num_worse) == ((changes > 0).sum(), (changes < 0).sum())
    back = paired_difference(second, first)
    assert (back.mean, back.p_value, back.num_worse) == (-found.mean, found.p_value, found.num_better)


def test_of_two_like_rankings_one_in_twenty_differs_by_chance():
    rng = np.random.default_rng(1)
    values = [paired_difference(rng.random(200), rng.random(200)).p_value < 0.05 for _ in range(1_000)]
    assert np.mean(values) == pytest.approx(0.05, abs=0.02)


def test_equal_values_and_single_users_say_nothing():
    alike = paired_difference(np.ones(9), np.ones(9))
    assert (alike.mean, alike.low, alike.high, alike.p_value) == (0, 0, 0, 1)
    alone = paired_difference(np.zeros(1), np.ones(1))
    assert (alone.mean, alone.low, alone.high, alone.p_value) == (1, -1, 1, 1)
    assert paired_difference(np.zeros(9), np.ones(9)).p_value == 0


def users(rows: list[tuple[object, list[str], list[int]]]) -> pa.Table:
    ids = pa.array([row[0] for row in rows])
    columns = {"user_id": ids, "num_visible": [1] * len(rows), "item_ids": [row[1] for row in rows]}
    columns |= {f"{name}_ranks": [row[2] for row in rows] for name in EVALUATED}
    return pa.table(columns, schema=evaluated_users(ids.type, pa.string()))


def test_differences_are_of_the_metrics_that_an_evaluation_has():
    ranks = target_ranks(RANKED, TARGETS)
    worse = np.where(ranks == 1, 0, ranks)
    parts = [np.split(each, TARGETS.offsets[1:-1]) for each in (ranks, worse)]
    tables = [users([(str(user), ["i"] * len(of), of.tolist()) for user, of in enumerate(part)]) for part in parts]
    found = differences((tables[0], "model"), (tables[1], "counts"), 4, [1, 4])
    expected = ranking_sums(RANKED, TARGETS, [1, 4])
    assert {name: value.first for name, value in found.items()} == pytest.approx(
        {name: value.mean for name, value in expected.items()}
    )
    assert (found["hr@1"].second, found["hr@4"].second, found["hr@1"].num_worse) == (0, 0.5, 2)


def test_users_are_found_again_by_their_id_and_what_they_had_to_find():
    first = users([("a", ["x"], [1]), ("b", ["x", "y"], [2, 0]), ("c", ["z"], [0])])
    second = users([("d", ["x"], [1]), ("c", ["q"], [4]), ("b", ["y", "x"], [3, 1]), ("a", ["x"], [0])])
    mine, theirs = common_users(first, second)
    assert mine["user_id"].to_pylist() == theirs["user_id"].to_pylist() == ["a", "b"]
    assert theirs["model_ranks"].to_pylist() == [[0], [3, 1]]
    with pytest.raises(InputError, match=r"no user had to find the same items in both .* same log, ds and split"):
        common_users(first.slice(0, 1), second.slice(0, 1))
    with pytest.raises(InputError, match="user ids are string in the first evaluation and int64 in the second"):
        common_users(first, users([(1, ["x"], [1])]))
