import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.batches import (
    Windows,
    cut_windows,
    epoch_batches,
    join_validation_users,
    join_windows,
    num_steps,
    sample_users,
    validation_users,
)
from pipeline.data.lists import Lists


def as_lists(windows: Windows) -> list[tuple[int, list[int]]]:
    return [(int(key), windows.events[window].tolist()) for window, key in enumerate(windows.user_keys)]


def test_histories_are_cut_from_their_end():
    windows = cut_windows(Lists.of([[1, 2, 3, 4, 5, 6], [7], [], [8, 9], [1, 2, 3, 4]]), np.arange(10, 15), 3)
    assert as_lists(windows) == [(10, [1, 2, 3]), (10, [3, 4, 5, 6]), (13, [8, 9]), (14, [1, 2, 3, 4])]
    assert windows.num_targets == 9


def targets_of(windows: Windows, steps: int, epoch: int = 1) -> list[tuple[int, int, int]]:
    """(user, event before, target) of all batches, checked for their form; all events weigh more than 0."""
    found = []
    batches = list(epoch_batches(windows, steps, seed=0, epoch=epoch, rank=0))
    assert len(batches) == steps
    for batch in batches:
        is_event_BL = batch.item_rows_BL >= 0
        assert (is_event_BL == (batch.targets_BL >= 0)).all()
        assert (np.diff(is_event_BL.astype(int), axis=1) <= 0).all(), "padding is at the right"
        assert (np.diff(is_event_BL.sum(axis=1)) <= 0).all(), "the longest comes first"
        assert ((batch.weights_BL > 0) == is_event_BL).all()
        for inputs_L, targets_L, key in zip(batch.item_rows_BL, batch.targets_BL, batch.user_keys_B, strict=True):
            found += [(int(key), int(i), int(t)) for i, t in zip(inputs_L, targets_L, strict=True) if t >= 0]
    return found


@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=12),
    max_length=st.integers(1, 8),
    steps=st.integers(1, 6),
)
def test_every_event_but_a_users_first_is_a_target_once(lengths, max_length, steps):
    """Items are numbered through, so that an event is told by its item and follows the number before it."""
    first = np.cumsum([0, *lengths])
    rows = [list(range(first[user], first[user + 1])) for user in range(len(lengths))]
    windows = cut_windows(Lists.of(rows), np.arange(len(rows)), max_length)
    assert (windows.events.lengths <= max_length + 1).all()
    expected = [(user, item - 1, item) for user, row in enumerate(rows) for item in row[1:]]
    assert sorted(targets_of(windows, steps)) == sorted(expected)


def test_the_order_is_a_function_of_seed_epoch_and_rank():
    windows = cut_windows(Lists.of([[i, i + 1] for i in range(50)]), np.arange(50), 4)
    assert targets_of(windows, 5, epoch=1) == targets_of(windows, 5, epoch=1)
    assert targets_of(windows, 5, epoch=1) != targets_of(windows, 5, epoch=2)


@given(
    lengths=st.lists(st.integers(2, 9), min_size=1, max_size=60),
    steps=st.integers(1, 8),
)
def test_the_batches_of_an_epoch_have_about_as_many_targets(lengths, steps):
    """A batch misses its share by one window at most: half of it at either end."""
    windows = cut_windows(Lists.of([range(length) for length in lengths]), np.arange(len(lengths)), 8)
    for batch in epoch_batches(windows, steps, seed=0, epoch=1, rank=0):
        assert abs((batch.targets_BL >= 0).sum() - windows.num_targets / steps) <= 8


def test_an_event_of_weight_0_is_read_but_is_no_target():
    histories, weights = Lists.of([[1, 2, 3, 4], [5, 6], [7, 8]]), np.array([0, 2, 0, 0.5, 1, 0, 0, 1], np.float32)
    windows = cut_windows(histories, np.arange(3), 8, weights)
    assert windows.num_targets == 3
    assert windows.user_keys.tolist() == [0, 2], "the second user has nothing to predict"
    (batch,) = epoch_batches(windows, 1, seed=0, epoch=1, rank=0)
    assert batch.item_rows_BL.tolist() == [[1, 2, 3], [7, -1, -1]]
    assert batch.targets_BL.tolist() == [[2, -1, 4], [8, -1, -1]]
    assert batch.weights_BL.tolist() == [[2, 0, 0.5], [1, 0, 0]]


def test_ranks_with_fewer_windows_take_smaller_steps():
    assert num_steps([100, 65], batch_positions=32) == 4
    windows = cut_windows(Lists.of([[1, 2]] * 65), np.arange(65), 4)
    assert [len(batch.user_keys_B) for batch in epoch_batches(windows, 4, 0, 0, 1)] == [16, 16, 17, 16]
    nothing = cut_windows(Lists.of([[1]]), np.arange(1), 4)
    assert [len(batch.user_keys_B) for batch in epoch_batches(nothing, 2, 0, 0, 1)] == [0, 0]


def test_joining_buckets_is_the_same_as_cutting_them_together():
    left, right = [[1, 2, 3], [4, 5]], [[6], [7, 8, 9, 10]]
    parts = [cut_windows(Lists.of(rows), np.arange(2) + shift, 2) for rows, shift in ((left, 0), (right, 2))]
    assert as_lists(join_windows(parts)) == as_lists(cut_windows(Lists.of(left + right), np.arange(4), 2))
    assert len(join_windows([])) == 0


def test_validation_users_have_a_history_and_something_new_after_it():
    histories = Lists.of([[1, 2], [1, 2], [], [3], [4]])
    held_out = Lists.of([[2, 5, 1], [2], [6], [], [3]])  # what user 3 has seen is new to user 4
    users = validation_users(histories, held_out, np.arange(5))
    assert users.user_keys.tolist() == [0, 4]
    assert users.held_out.values.tolist() == [5, 3]
    assert users.histories.values.tolist() == [1, 2, 4]
    assert [len(tile) for tile in users.tiles(1)] == [1, 1]


def test_joined_validation_users_are_those_of_all_parts():
    parts = [validation_users(Lists.of([[1]]), Lists.of([[2]]), np.array([key])) for key in (7, 9)]
    users = join_validation_users(parts)
    assert users.user_keys.tolist() == [7, 9]
    assert users.held_out.last(1)[0].tolist() == [[2], [2]]
    assert len(join_validation_users([])) == 0


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_sample_depends_on_keys_and_seed_alone(share):
    keys = np.arange(4_000) - 2_000
    users = validation_users(Lists.of([[1]] * 4_000), Lists.of([[2]] * 4_000), keys)
    sampled = sample_users(users, share, seed=3)
    assert len(sampled) == pytest.approx(4_000 * share, abs=100)
    halves = [sample_users(users.take(np.arange(half, 4_000, 2)), share, seed=3).user_keys for half in (0, 1)]
    assert sorted(np.concatenate(halves)) == sorted(sampled.user_keys)
    if share == 0.25:
        assert set(sample_users(users, share, seed=4).user_keys) != set(sampled.user_keys)


def test_each_sequence_knows_all_items_of_its_user():
    """Also those of the user's other windows, and of users that were joined after others."""
    parts = [
        cut_windows(Lists.of(rows), np.arange(2) + shift, 2)
        for rows, shift in (([[5, 4, 3, 4, 1], [7, 8]], 0), ([[9], [2, 1, 2]], 2))
    ]
    windows = join_windows(parts)
    own = {0: [1, 3, 4, 5], 1: [7, 8], 3: [1, 2]}
    for batch in epoch_batches(windows, 2, seed=0, epoch=1, rank=0):
        for row, key in enumerate(batch.user_keys_B.tolist()):
            assert batch.own[row].tolist() == own[key]
