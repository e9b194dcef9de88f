"""Whom an evaluation asks, and what they should find."""

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.histories import Bucket
from pipeline.data.lists import Lists
from pipeline.data.seen import IN_ALL_PARTS
from pipeline.evaluation.targets import Turnout, count_turnout, evaluable_users, held_out_targets, sampling_keys


def bucket(*users: tuple[list[int], list[int], list[int]], also_seen: Lists | None = None) -> Bucket:
    """Each user's train, validation and test events, as item rows."""
    events = [[*train, *validation, *test] for train, validation, test in users]
    rows = np.array([row for rows in events for row in rows], dtype=np.int32)
    return Bucket(
        pa.array([f"u{n}" for n in range(len(users))], type=pa.string()),
        np.concatenate([[0], np.cumsum([len(e) for e in events])]).astype(np.int64),
        rows,
        np.arange(len(rows), dtype=np.int64),
        np.ones(len(rows), dtype=np.float32),
        np.full(len(rows), IN_ALL_PARTS, np.uint8),
        np.array([len(train) for train, _, _ in users], dtype=np.int32),
        np.array([len(validation) for _, validation, _ in users], dtype=np.int32),
        pa.repeat("", len(users)),
        also_seen or Lists.empty(len(users)),
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
    assert [targets[user].tolist() for user in range(5)] == [[4, 5], [], [0, 9], [], [3]]
    assert evaluable_users(users).tolist() == [0, 4]


def test_users_who_leave_the_metrics_are_counted_with_the_reason():
    users = bucket(
        ([1, 2], [3], [4]),
        ([1], [], [1]),  # seen before
        ([1], [], [8]),  # set aside, and so seen before
        ([], [], [9]),  # no history
        ([1], [2], [5, 6]),  # 5 and 6 have no training event
        ([1], [], [5, 4]),  # 4 has
        ([7], [8], []),  # no test
        also_seen=Lists.of([[], [], [8], [], [], [], []]),
    )
    is_learned = np.isin(np.arange(10), [1, 2, 4, 7])
    assert count_turnout(users, is_learned) == Turnout(6, only_repeats=2, without_history=1, only_unlearned=1)
    assert count_turnout(users, is_learned) + Turnout(1, 1, 0, 0) == Turnout(7, 3, 1, 1)


def test_what_was_seen_in_an_event_that_was_set_aside_is_no_target():
    users = bucket(([1], [], [2, 3]), ([1], [], [2]), also_seen=Lists.of([[2], [5]]))
    targets = held_out_targets(users)
    assert [targets[user].tolist() for user in range(2)] == [[3], [2]]


def test_an_empty_bucket_has_nobody_to_ask():
    assert evaluable_users(bucket()).tolist() == []
    assert count_turnout(bucket(), np.ones(3, dtype=bool)) == Turnout()


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
