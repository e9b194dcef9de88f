"""Classes of the held-out events, against their definitions, and their metrics, worked out target by target."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.columns import DAY_US
from pipeline.data.lists import Lists
from pipeline.evaluation.segments import (
    AGES,
    DIVISIONS,
    HISTORIES,
    Division,
    by_age,
    by_history,
    by_popularity,
    popularity_classes,
    segment_sums,
)

TARGETS = Lists.of([[4, 1], [2], [0, 3, 4]])


def named(division: Division) -> list[str]:
    return [DIVISIONS[division.by][index] for index in division.class_T]


@pytest.mark.parametrize(
    ("numbers", "classes"), [([1, 4, 5], [0, 0, 1]), ([9, 10, 19], [1, 2, 2]), ([20, 99, 100], [3, 4, 5])]
)
def test_targets_go_by_the_visible_history_of_their_user(numbers, classes):
    one_each = Lists.of([[0], [0], [0]])
    assert named(by_history(np.array(numbers), one_each)) == [HISTORIES[index] for index in classes]
    assert named(by_history(np.array(numbers), TARGETS)) == [
        HISTORIES[classes[user]] for user in TARGETS.owners.tolist()
    ]


@given(st.lists(st.integers(0, 20), min_size=1, max_size=12))
def test_an_item_belongs_where_the_events_of_more_popular_items_end(counts):
    classes = popularity_classes(np.array(counts))
    order = sorted(range(len(counts)), key=lambda row: (-counts[row], row))
    before, total = 0, sum(counts)
    for row in order:
        expected = 3 if counts[row] == 0 else 0 if 2 * before < total else 1 if 5 * before < 4 * total else 2
        assert classes[row] == expected
        before += counts[row]
    assert by_popularity(np.array(counts), Lists.of([list(range(len(counts)))])).class_T.tolist() == classes.tolist()


def test_the_age_of_an_item_is_counted_to_the_users_first_test_event():
    first_events = np.array([0, DAY_US, 10 * DAY_US, 29 * DAY_US, 31 * DAY_US - 1])
    asked_at = np.array([31 * DAY_US, 40 * DAY_US, 59 * DAY_US])
    expected = [AGES[0], AGES[3], AGES[3], AGES[3], AGES[3], AGES[2]]  # of 4, 1 | 2 | 0, 3, 4
    assert named(by_age(first_events, asked_at, TARGETS)) == expected
    assert named(by_age(first_events, np.array([2 * DAY_US]), Lists.of([[1]]))) == [AGES[1]]
    assert named(by_age(np.array([5]), np.array([5]), Lists.of([[0]]))) == [AGES[0]], "its first event is the target"


def test_a_user_counts_in_a_class_with_the_targets_of_this_class_only():
    ranked = {"model": np.array([[4, 0], [2, -1], [3, 4]]), "counts": np.array([[1, 2], [0, 1], [4, 0]])}
    division = Division("age", np.array([0, 1, 1, 3, 3, 0]))  # of 4, 1 | 2 | 0, 3, 4
    found = dict(segment_sums(division, ranked, TARGETS, [1, 2]))
    assert list(found) == [AGES[0], AGES[1], AGES[3]]
    young, grown, old = (found[AGES[index]] for index in (0, 1, 3))
    assert [each["model"]["hr@1"].count for each in (young, grown, old)] == [2, 2, 1]
    assert [young["model"][name].mean for name in ("hr@1", "hr@2", "mrr")] == [0.5, 1.0, 0.75]
    assert [grown["model"][name].mean for name in ("hr@1", "hr@2")] == [0.5, 0.5]
    assert [grown["counts"][name].mean for name in ("hr@1", "hr@2")] == [0.5, 0.5]
    assert old["counts"]["recall@2"].mean == old["model"]["recall@1"].mean == 0.5
