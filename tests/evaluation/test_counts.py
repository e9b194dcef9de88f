"""Ranking by item-to-item counts, user by user and in batches."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.lists import Lists
from pipeline.data.neighbours import Neighbours, score_by_counts
from pipeline.evaluation import counts
from pipeline.evaluation.counts import rank_by_counts

NUM_ITEMS = 7
rows = st.lists(st.integers(0, NUM_ITEMS - 1), max_size=6)


def neighbours_of(lists: dict[int, dict[int, float]]) -> Neighbours:
    """The given neighbours with their scores; other items have none."""
    of_item = [lists.get(row, {}) for row in range(NUM_ITEMS)]
    scores = [score for each in of_item for score in each.values()]
    return Neighbours(Lists.of(list(each) for each in of_item), np.array(scores, dtype=np.float32))


# After 0 come 1 and 2, alike; after 3 comes 2.
NEIGHBOURS = neighbours_of({0: {1: 0.5, 2: 0.5}, 3: {2: 0.25, 4: 0.125}})
POPULARITY = np.array([9, 1, 2, 3, 4, 5, 5])
EVERYTHING = np.ones(NUM_ITEMS, dtype=bool)


def test_a_list_worked_out_by_hand_is_filled_up_by_popularity() -> None:
    """History 3, 0: scores are 2: .5 + .8 × .25, 1: .5, 4: .8 × .125; then 5 and 6, the most popular of the others."""
    history = Lists.of([[3, 0]])
    assert rank_by_counts(NEIGHBOURS, history, history, 6, EVERYTHING, POPULARITY).tolist() == [[2, 1, 4, 5, 6, -1]]
    assert rank_by_counts(NEIGHBOURS, history, history, 2, EVERYTHING, POPULARITY).tolist() == [[2, 1]]


def test_equal_scores_go_by_row_and_what_is_not_eligible_is_left_out() -> None:
    history, seen = Lists.of([[0]]), Lists.of([[0, 5]])
    is_eligible = EVERYTHING.copy()
    is_eligible[[2, 4]] = False
    assert rank_by_counts(NEIGHBOURS, history, seen, 3, EVERYTHING, POPULARITY).tolist() == [[1, 2, 6]]
    assert rank_by_counts(NEIGHBOURS, history, seen, 3, is_eligible, POPULARITY).tolist() == [[1, 6, 3]]


@given(st.lists(st.tuples(rows, rows), max_size=7), st.integers(1, NUM_ITEMS), st.data())
def test_lists_equal_those_of_the_slow_way(queries, k, data) -> None:
    score = st.sampled_from([0.125, 0.25, 0.5])
    lists = st.dictionaries(st.integers(0, NUM_ITEMS - 1), score)
    neighbours = neighbours_of(data.draw(st.dictionaries(st.integers(0, NUM_ITEMS - 1), lists)))
    is_eligible = np.array(data.draw(st.lists(st.booleans(), min_size=NUM_ITEMS, max_size=NUM_ITEMS)))
    histories, excluded = Lists.of(h for h, _ in queries), Lists.of(e for _, e in queries)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counts, "QUERIES_AT_ONCE", 3)
        ranked = rank_by_counts(neighbours, histories, excluded, k, is_eligible, POPULARITY)
    scored = score_by_counts(neighbours, histories)
    assert ranked.shape == (len(queries), k)
    for query in range(len(queries)):
        start, stop = scored.items.offsets[query : query + 2]
        scores = dict(zip(scored.items[query].tolist(), scored.scores[start:stop].tolist(), strict=True))
        allowed = [row for row in range(NUM_ITEMS) if is_eligible[row] and row not in queries[query][1]]
        best = sorted(allowed, key=lambda row: (-scores.get(row, 0.0), -POPULARITY[row] * (row not in scores), row))[:k]
        assert ranked[query].tolist() == best + [-1] * (k - len(best))
