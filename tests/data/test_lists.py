"""Laws of ragged arrays, held against Python's own lists."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.lists import Lists, ranges

rows = st.lists(st.integers(0, 30), max_size=8)
many = st.lists(rows, max_size=6)


def plain(lists: Lists) -> list[list[int]]:
    return [lists[owner].tolist() for owner in range(len(lists))]


@given(many)
def test_lists_give_back_what_they_were_made_of(given_lists):
    lists = Lists.of(given_lists)
    assert plain(lists) == given_lists
    assert lists.lengths.tolist() == [len(each) for each in given_lists]
    assert lists.owners.tolist() == [owner for owner, each in enumerate(given_lists) for _ in each]
    assert (lists.offsets.dtype, lists.values.dtype) == (np.int64, np.int32)


@given(many, st.data())
def test_owners_can_be_taken_in_any_order_and_again_and_an_unknown_one_has_nothing(given_lists, data):
    owners = data.draw(st.lists(st.integers(-1, len(given_lists) - 1), max_size=9))
    taken = Lists.of(given_lists).take(np.array(owners, dtype=np.int64))
    assert plain(taken) == [given_lists[owner] if owner >= 0 else [] for owner in owners]


@given(many, st.integers(0, 6), st.integers(0, 6))
def test_narrowing_is_slicing(given_lists, one, other):
    start, stop = sorted(min(bound, len(given_lists)) for bound in (one, other))
    narrowed, sliced = Lists.of(given_lists).narrow(start, stop), Lists.of(given_lists[start:stop])
    assert plain(narrowed) == given_lists[start:stop]
    assert narrowed.offsets.tolist() == sliced.offsets.tolist()  # they begin with 0 again
    assert narrowed.values.tolist() == sliced.values.tolist()


@given(st.lists(many, max_size=4))
def test_joined_parts_have_the_owners_of_all(parts):
    assert plain(Lists.concat(Lists.of(part) for part in parts)) == [each for part in parts for each in part]


@given(many)
def test_distinct_lists_ascend_without_repeats(given_lists):
    assert plain(Lists.of(given_lists).distinct()) == [sorted(set(each)) for each in given_lists]


@given(st.lists(st.tuples(rows, rows), max_size=6))
def test_minus_takes_from_each_owner_only_what_that_owner_has(pairs):
    left, right = Lists.of(one for one, _ in pairs), Lists.of(other for _, other in pairs)
    assert plain(left.minus(right)) == [[row for row in one if row not in other] for one, other in pairs]


@given(many, st.integers(0, 30), st.integers(0, 30))
def test_within_keeps_a_range_and_counts_from_its_first(given_lists, low, high):
    found = Lists.of(given_lists).within(low, high)
    assert plain(found) == [[row - low for row in each if low <= row < high] for each in given_lists]
    assert found.values.dtype == np.int32


@given(many, st.integers(0, 10))
def test_the_last_values_are_aligned_left_and_padded_right(given_lists, n):
    last, lengths = Lists.of(given_lists).last(n)
    expected = [each[max(0, len(each) - n) :] for each in given_lists]
    assert lengths.tolist() == [len(each) for each in expected]
    assert last.shape == (len(given_lists), n)
    assert last.tolist() == [each + [-1] * (n - len(each)) for each in expected]


def test_nobody_and_owners_without_values_are_lists_too():
    assert plain(Lists.empty(2)) == [[], []]
    nobody = Lists.of([])
    assert [len(each) for each in (nobody, nobody.distinct(), nobody.minus(nobody), Lists.concat([]))] == [0] * 4


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 6)), max_size=20))
def test_ranges_count_up_from_each_start(runs):
    starts = np.array([start for start, _ in runs], dtype=np.int64)
    lengths = np.array([length for _, length in runs], dtype=np.int64)
    assert ranges(starts, lengths).tolist() == [start + i for start, length in runs for i in range(length)]


def timed(given_lists: list[list[int]]) -> Lists:
    """Lists whose values have times, each different from all others."""
    lists = Lists.of(given_lists)
    return Lists(
        lists.offsets, lists.values, {"times": lists.values.astype(np.int64) * 10**12 + np.arange(len(lists.values))}
    )


def pairs(lists: Lists) -> list[list[tuple[int, int]]]:
    bounds = zip(lists.offsets, lists.offsets[1:], strict=False)
    return [
        list(zip(lists.values[low:high].tolist(), lists.columns["times"][low:high].tolist(), strict=True))
        for low, high in bounds
    ]


@given(many, st.data())
def test_values_keep_their_columns_wherever_they_go(given_lists, data):
    lists = timed(given_lists)
    expected = pairs(lists)
    owners = data.draw(st.lists(st.integers(-1, len(given_lists) - 1), max_size=9))
    taken = lists.take(np.array(owners, dtype=np.int64))
    assert pairs(taken) == [expected[owner] if owner >= 0 else [] for owner in owners]
    start, stop = sorted(data.draw(st.tuples(*[st.integers(0, len(given_lists))] * 2)))
    assert pairs(lists.narrow(start, stop)) == expected[start:stop]
    assert pairs(lists.where(lists.values % 2 == 0)) == [
        [pair for pair in each if pair[0] % 2 == 0] for each in expected
    ]
    assert pairs(Lists.concat([lists, taken])) == expected + pairs(taken)
    runs = lists.runs(lists.offsets[:-1], np.minimum(lists.lengths, 2))
    assert pairs(runs) == [each[:2] for each in expected]


@given(many, st.integers(1, 9))
def test_the_last_columns_stand_where_the_last_values_stand(given_lists, n):
    lists = timed(given_lists)
    rows, lengths = lists.last(n)
    times = lists.last_columns(n)["times"]
    assert (times.shape, times.dtype) == (rows.shape, np.int64)
    for owner, each in enumerate(pairs(lists)):
        length = lengths[owner]
        assert list(zip(rows[owner, :length].tolist(), times[owner, :length].tolist(), strict=True)) == each[-n:]
        assert not times[owner, length:].any()


def test_sets_have_no_columns():
    lists = timed([[3, 1, 3], [2]])
    for each in (lists.distinct(), lists.union(lists), lists.within(0, 9)):
        assert not each.columns
