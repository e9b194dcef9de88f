"""Item-to-item counts against slow, obvious ones, and laws of their sums."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.histories import Bucket
from pipeline.data.lists import Lists, offsets_of
from pipeline.data.neighbours import (
    COUNT,
    COUNTINGS,
    Neighbours,
    PairCounts,
    ScoredLists,
    count_pairs,
    cut_items,
    nearest_neighbours,
    score_by_counts,
)
from pipeline.data.seen import IN_ALL_PARTS

NUM_ITEMS = 6
Events = list[tuple[int, float]]  # item rows with weights

event = st.tuples(st.integers(0, NUM_ITEMS - 1), st.sampled_from([0.0, 0.5, 1.0, 4.0]))
COUNTED = sorted(COUNTINGS)
users = st.lists(st.lists(event, max_size=9), max_size=5)


def bucket_of(histories: list[Events], num_held_out: int = 0) -> Bucket:
    """All events are for training, but the last `num_held_out` of each history."""
    lengths = np.array([len(events) for events in histories], dtype=np.int64)
    flat = [each for events in histories for each in events]
    return Bucket(
        pa.array([f"u{user}" for user in range(len(histories))], type=pa.string()),
        offsets_of(lengths),
        np.array([row for row, _ in flat], dtype=np.int32),
        np.arange(len(flat), dtype=np.int64),
        np.array([weight for _, weight in flat], dtype=np.float32),
        np.full(len(flat), IN_ALL_PARTS, np.uint8),
        np.maximum(lengths - num_held_out, 0).astype(np.int32),
        np.zeros(len(histories), dtype=np.int32),
        pa.repeat("", len(histories)),
        Lists.empty(len(histories)),
    )


def slow_counts(histories: list[Events]) -> dict[tuple[int, int], Fraction]:
    counts: dict[tuple[int, int], Fraction] = {}
    for events in histories:
        for at, (first, _) in enumerate(events):
            for distance in (1, 2, 3):
                if at + distance < len(events):
                    second, weight = events[at + distance]
                    pair = (first, second)
                    counts[pair] = counts.get(pair, Fraction(0)) + Fraction(weight) / distance
    return {pair: count for pair, count in counts.items() if count}


def as_dict(pairs: PairCounts) -> dict[tuple[int, int], Fraction]:
    firsts, seconds = np.divmod(pairs.codes, NUM_ITEMS)
    return {
        (int(first), int(second)): Fraction(int(count), COUNT)
        for first, second, count in zip(firsts, seconds, pairs.counts, strict=True)
    }


def same(one: ScoredLists, other: ScoredLists) -> bool:
    return all(
        np.array_equal(mine, its)
        for mine, its in (
            (one.items.offsets, other.items.offsets),
            (one.items.values, other.items.values),
            (one.scores, other.scores),
        )
    )


def plain(histories: list[list[int]]) -> list[Events]:
    return [[(row, 1.0) for row in rows] for rows in histories]


def test_pairs_worked_out_by_hand() -> None:
    """0 1 2 3 4: of item 0 item 1 is one place later, 2 two places, 3 three places, and 4 too far. In 0 1 the second
    event is bought, which counts double; in 0 5 1 the event of 5 is context only."""
    histories = [*plain([[0, 1, 2, 3, 4]]), [(0, 1.0), (1, 2.0)], [(0, 1.0), (5, 0.0), (1, 1.0)]]
    counts = as_dict(count_pairs(bucket_of(histories), "train", NUM_ITEMS))
    of_0 = {second: count for (first, second), count in counts.items() if first == 0}
    assert of_0 == {1: 1 + 2 + Fraction(1, 2), 2: Fraction(1, 2), 3: Fraction(1, 3)}
    assert counts[5, 1] == 1


def test_only_the_visible_part_of_a_history_is_counted() -> None:
    bucket = bucket_of(plain([[0, 1, 2]]), num_held_out=1)
    assert as_dict(count_pairs(bucket, "train", NUM_ITEMS)) == {(0, 1): 1}
    assert as_dict(count_pairs(bucket, "whole", NUM_ITEMS)) == {(0, 1): 1, (0, 2): Fraction(1, 2), (1, 2): 1}


@given(users)
def test_counts_equal_those_of_the_slow_way(histories: list[Events]) -> None:
    assert as_dict(count_pairs(bucket_of(histories), "train", NUM_ITEMS)) == slow_counts(histories)


def slow_counts_together(histories: list[Events]) -> dict[tuple[int, int], Fraction]:
    counts: dict[tuple[int, int], Fraction] = {}
    for events in histories:
        for (first, _), (second, weight) in itertools.permutations(events, 2):
            part = Fraction(int(weight * COUNT) // (len(events) - 1), COUNT)  # the pairs of an event are 1 together
            counts[first, second] = counts.get((first, second), Fraction(0)) + part
    return {pair: count for pair, count in counts.items() if count}


@given(users, st.sampled_from([1, 10, 1_000]))
def test_where_order_means_nothing_all_pairs_of_a_history_count_both_ways(
    histories: list[Events], at_once: int
) -> None:
    together = COUNTINGS["together"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.data.neighbours.PAIRS_AT_ONCE", at_once)
        counts = count_pairs(bucket_of(histories), "train", NUM_ITEMS, together)
    assert as_dict(counts) == slow_counts_together(histories)
    num_events = np.bincount([row for events in histories for row, _ in events], minlength=NUM_ITEMS)
    for low, high in cut_items(num_events, 500, together):
        assert high - low == 1 or len(counts.within(low, high, NUM_ITEMS).codes) <= 500


def test_an_item_counts_with_a_hundred_events_on_each_side() -> None:
    pairs = count_pairs(bucket_of(plain([[0] * 250 + [1] + [2] * 50])), "train", NUM_ITEMS, COUNTINGS["together"])
    counts = as_dict(pairs)
    assert counts[1, 0] == 100 * Fraction(COUNT // 150, COUNT)
    assert counts[1, 2] == 50 * Fraction(COUNT // 150, COUNT)
    assert counts[0, 2] < counts[0, 1] + counts[0, 2] < counts[0, 0]


@given(users, st.integers(1, 3), st.integers(1, 40), st.randoms())
def test_any_buckets_ranges_and_order_of_adding_give_the_same_neighbours(histories, num_buckets, max_pairs, random):
    num_events = np.bincount([row for events in histories for row, _ in events], minlength=NUM_ITEMS)
    whole = count_pairs(bucket_of(histories), "train", NUM_ITEMS)
    expected = nearest_neighbours(whole, num_events, 0, NUM_ITEMS, 3)
    parts = [count_pairs(bucket_of(histories[n::num_buckets]), "train", NUM_ITEMS) for n in range(num_buckets)]
    random.shuffle(parts)
    by_range = []
    for low, high in cut_items(num_events, max_pairs):
        pairs = PairCounts.sum(part.within(low, high, NUM_ITEMS) for part in parts)
        by_range.append(nearest_neighbours(pairs, num_events, low, high, 3))
    assert same(ScoredLists.concat(by_range), expected)


@given(users, st.integers(1, 4))
def test_the_neighbours_kept_are_the_best_by_the_formula(histories: list[Events], num_neighbours: int) -> None:
    num_events = np.bincount([row for events in histories for row, _ in events], minlength=NUM_ITEMS)
    pairs = count_pairs(bucket_of(histories), "train", NUM_ITEMS)
    lists = nearest_neighbours(pairs, num_events, 0, NUM_ITEMS, num_neighbours)
    counts = slow_counts(histories)
    for first in range(NUM_ITEMS):
        scores = {
            b: np.float32(float(count) / math.sqrt(num_events[first] + 10) / math.sqrt(num_events[b] + 10))
            for (a, b), count in counts.items()
            if a == first
        }
        expected = sorted(scores, key=lambda row: (-scores[row], row))[:num_neighbours]
        start, stop = lists.items.offsets[first : first + 2]
        assert lists.items[first].tolist() == expected
        assert lists.scores[start:stop].tolist() == [scores[row] for row in expected]


def neighbours_of(histories: list[list[int]], num_neighbours: int, kind: str = "following") -> Neighbours:
    num_events = np.bincount([row for rows in histories for row in rows], minlength=NUM_ITEMS)
    pairs = count_pairs(bucket_of(plain(histories)), "whole", NUM_ITEMS, COUNTINGS[kind])
    lists = nearest_neighbours(pairs, num_events, 0, NUM_ITEMS, num_neighbours)
    return Neighbours(lists.items, lists.scores, COUNTINGS[kind])


def kind_of(neighbours: Neighbours) -> str:
    return next(kind for kind, counting in COUNTINGS.items() if counting is neighbours.counting)


def slow_scores(neighbours: Neighbours, history: list[int]) -> dict[int, float]:
    num_last, decay = {"following": (10, 0.8), "together": (200, 1.0)}[kind_of(neighbours)]
    scores: dict[int, float] = {}
    for age, row in enumerate(reversed(history[-num_last:])):
        start, stop = neighbours.items.offsets[row : row + 2]
        for near, score in zip(neighbours.items[row].tolist(), neighbours.scores[start:stop].tolist(), strict=True):
            scores[near] = scores.get(near, 0.0) + decay**age * score
    return scores


@given(st.lists(st.lists(st.integers(0, NUM_ITEMS - 1), max_size=14), min_size=1, max_size=6), st.sampled_from(COUNTED))
def test_scores_are_sums_over_the_last_events(histories: list[list[int]], kind: str) -> None:
    neighbours = neighbours_of(histories, 200, kind)
    scored = score_by_counts(neighbours, Lists.of(histories))
    for query, history in enumerate(histories):
        expected = slow_scores(neighbours, history)
        start, stop = scored.items.offsets[query : query + 2]
        assert scored.items[query].tolist() == sorted(expected)
        assert scored.scores[start:stop] == pytest.approx([expected[row] for row in sorted(expected)], rel=1e-6)


@pytest.mark.parametrize("kind", COUNTED)
def test_queries_of_many_batches_are_scored_as_alone(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    rng = np.random.default_rng(0)
    histories = Lists.of(rng.integers(0, NUM_ITEMS, size=length) for length in rng.integers(0, 9, size=25))
    neighbours = neighbours_of([histories[user].tolist() for user in range(25)], 4, kind)
    together = score_by_counts(neighbours, histories)
    monkeypatch.setattr("pipeline.data.neighbours.EVENTS_AT_ONCE", 30)
    assert same(score_by_counts(neighbours, histories), together)
    assert len(score_by_counts(neighbours, Lists.empty(0))) == 0


@pytest.mark.parametrize("histories", [[], [[]], [[(0, 1.0)]], [[(0, 0.0), (1, 0.0)]]])
def test_without_a_pair_no_item_has_a_neighbour(histories: list[Events]) -> None:
    pairs = count_pairs(bucket_of(histories), "train", NUM_ITEMS)
    lists = nearest_neighbours(pairs, np.zeros(NUM_ITEMS, dtype=np.int64), 0, NUM_ITEMS, 5)
    assert (len(lists), len(lists.scores)) == (NUM_ITEMS, 0)
    assert score_by_counts(Neighbours(lists.items, lists.scores), Lists.of([[0, 1], []])).items.lengths.tolist() == [
        0,
        0,
    ]


def test_a_catalogue_of_one_item_has_itself_as_neighbour() -> None:
    pairs = count_pairs(bucket_of(plain([[0, 0]])), "train", 1)
    lists = nearest_neighbours(pairs, np.array([2]), 0, 1, 5)
    assert lists.items[0].tolist() == [0]
    assert lists.scores.tolist() == [pytest.approx(1 / 12)]


@pytest.mark.parametrize(
    ("num_events", "max_pairs", "ranges"),
    [
        ([1, 1, 1, 1], 6, [(0, 2), (2, 4)]),
        ([100, 1, 1], 6, [(0, 1), (1, 3)]),  # one item may have more
        ([0, 0, 0], 2, [(0, 2), (2, 3)]),  # items without an event count too: they have a list
        ([5], 1, [(0, 1)]),
        ([], 1, []),
    ],
)
def test_ranges_hold_few_pairs(num_events: list[int], max_pairs: int, ranges: list[tuple[int, int]]) -> None:
    assert cut_items(np.array(num_events, dtype=np.int64), max_pairs) == ranges
