"""The rules for lists: against a slow way that chooses item by item, worked out by hand, and laws."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.lists import NO_ITEM, Lists
from pipeline.retrieval.list_rules import ListRules, Need, Quota, in_words

NUM_ITEMS = 12
FRESH = np.arange(NUM_ITEMS) % 4 == 3  # 3, 7, 11


def quota(most: int, values: list[list[int]], name: str = "genre") -> Quota:
    return Quota(name, most, Lists.of(values))


def ranking(*scores: float, width: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """One query whose item 0 has the first score, item 1 the next, and so on; scores fall."""
    width = width or len(scores)
    rows = np.full((1, width), NO_ITEM)
    rows[0, : len(scores)] = np.arange(len(scores))
    padded = np.full((1, width), -np.inf, dtype=np.float32)
    padded[0, : len(scores)] = scores
    return padded, rows


def items(chosen) -> list[int]:
    """Of the first query of a ranking whose place p has item p."""
    return [place for place in chosen.places_BK[0].tolist() if place >= 0]


def test_at_most_two_of_a_genre_worked_out_by_hand():
    """Items 0, 1, 2 are dramas, 2 and 3 horror, 4 has no genre."""
    rules = ListRules(quotas=(quota(2, [[0], [0], [0, 1], [1], []]),))
    chosen = rules.choose(*ranking(5, 4, 3, 2, 1), k=4, is_whole=True)
    assert items(chosen) == [0, 1, 3, 4]
    assert chosen.places_BK.tolist() == [[0, 1, 3, 4]]
    one_each = ListRules(quotas=(quota(1, [[0], [0], [0, 1], [1], []]),))
    short = one_each.choose(*ranking(5, 4, 3, 2, 1), k=4, is_whole=True)
    assert short.places_BK.tolist() == [[0, 3, 4, -1]]
    assert in_words(one_each, short, [True], 5) == ["only 3 items keep to the rules for lists"]
    assert in_words(one_each, short, [False], 5) == ["only 3 items of the best 5 keep to the rules for lists"]


def test_what_is_owed_takes_the_last_places():
    rules = ListRules(needs=(Need("fresh", 2, FRESH),))
    chosen = rules.choose(*ranking(*range(12, 0, -1)), k=4, is_whole=True)
    assert items(chosen) == [0, 1, 3, 7]
    assert chosen.num_fulfilling_BW.tolist() == [[2]]
    enough = rules.choose(*ranking(*range(12, 0, -1)), k=9, is_whole=True)
    assert items(enough) == list(range(9)), "the need is met without it"


def test_an_item_may_fulfil_two_needs_and_then_the_best_take_the_place_that_is_left():
    new, local = np.zeros(NUM_ITEMS, bool), np.zeros(NUM_ITEMS, bool)
    new[[5, 8]], local[[5, 9]] = True, True
    rules = ListRules(needs=(Need("new", 1, new), Need("local", 1, local)))
    chosen = rules.choose(*ranking(*range(12, 0, -1)), k=3, is_whole=True)
    assert items(chosen) == [0, 1, 5], "5 is new and local"


def test_what_is_owed_and_is_not_to_be_had_is_waived_and_said():
    rules = ListRules(needs=(Need("rules.at_least.fresh", 2, FRESH),))
    chosen = rules.choose(*ranking(6, 5, 4, 3, 2, 1, width=8), k=4, is_whole=False)
    assert items(chosen) == [0, 1, 2, 3]
    assert not chosen.is_open_B[0]
    assert in_words(rules, chosen, [True], 8) == ["1 of 2 items for rules.at_least.fresh"]
    assert chosen.needed_B[0] == -np.inf, "an item that was missed might have fulfilled it"


def test_a_list_is_open_while_the_ranking_may_go_on():
    rules = ListRules(needs=(Need("fresh", 2, FRESH),))
    scores, rows = ranking(6, 5, 4, 3, 2)
    assert rules.choose(scores, rows, 4, is_whole=False).is_open_B[0]
    assert not rules.choose(scores, rows, 4, is_whole=True).is_open_B[0]
    assert not rules.choose(*ranking(6, 5, 4, 3, 2, width=6), 4, is_whole=False).is_open_B[0]
    settled = replace(rules, min_score=2.5).choose(scores, rows, 4, is_whole=False)
    assert not settled.is_open_B[0], "what comes after the end scores too little"
    assert items(settled) == [0, 1, 2, 3]


def test_nothing_scores_less_than_the_minimum():
    chosen = ListRules(min_score=3.0).choose(*ranking(5, 4, 3, 2, 1), k=5, is_whole=True)
    assert chosen.places_BK.tolist() == [[0, 1, 2, -1, -1]]


def test_variety_prefers_an_item_that_is_unlike_the_others():
    """Items 0 and 1 are alike, 2 is not: its worth is 2.5, that of 1 is 2.9 - 1."""
    vectors = np.array([[1, 0], [1, 0], [0, 1]], dtype=np.float32)
    rules = ListRules(diversity=1.0, vectors_ND=vectors)
    scores, rows = ranking(3, 2.9, 2.5)
    assert items(rules.choose(scores, rows, 2, is_whole=True)) == [0, 2]
    assert items(replace(rules, diversity=0.1).choose(scores, rows, 2, is_whole=True)) == [0, 1]
    assert rules.choose(scores[:, :2], rows[:, :2], 2, is_whole=False).is_open_B[0], "an item after 1 may be worth more"


def test_without_queries_or_items_there_are_empty_lists():
    rules = ListRules((quota(1, [[0]] * NUM_ITEMS),), (Need("fresh", 1, FRESH),), 0.0)
    nobody = rules.choose(np.empty((0, 4), np.float32), np.empty((0, 4), np.int64), 2, is_whole=False)
    assert nobody.places_BK.shape == (0, 2)
    nothing = rules.choose(*ranking(width=4), 2, is_whole=False)
    assert nothing.places_BK.tolist() == [[-1, -1]]
    assert not nothing.is_open_B[0]
    assert nothing.needed_B[0] == -np.inf


def slow_choice(rules: ListRules, scores: list[float], rows: list[int], k: int, ends: bool):
    """The places of the list, in the order in which they are chosen; None where the ranking ended too soon."""
    free = [p for p in range(len(rows)) if rows[p] >= 0 and (rules.min_score is None or scores[p] >= rules.min_score)]
    ends = ends or rows[-1] < 0 or (rules.min_score is not None and scores[-1] < rules.min_score)
    owed = [need.least for need in rules.needs]
    taken: list[int] = []

    def is_allowed(p: int) -> bool:
        return all(
            sum(value in each.values[rows[q]].tolist() for q in taken) < each.most
            for each in rules.quotas
            for value in each.values[rows[p]].tolist()
        )

    def worth(p: int) -> float:
        near = [float(rules.vectors_ND[rows[p]] @ rules.vectors_ND[rows[q]]) for q in taken] if rules.diversity else []
        return float(scores[p]) - rules.diversity * max([0.0, *near])

    while len(taken) < k:
        allowed = [p for p in free if p not in taken and is_allowed(p)]
        if sum(owed) >= k - len(taken):
            helping = [
                p for p in allowed if any(o and n.fulfils_N[rows[p]] for o, n in zip(owed, rules.needs, strict=True))
            ]
            if not helping and ends:
                owed = [0] * len(owed)
            else:
                allowed = helping
        best = max(allowed, key=lambda p: (worth(p), -p), default=None)
        if best is None or (not ends and worth(best) < scores[-1]):
            return sorted(taken) if ends else None
        taken.append(best)
        owed = [max(0, o - n.fulfils_N[rows[best]]) for o, n in zip(owed, rules.needs, strict=True)]
    return sorted(taken)


@st.composite
def cases(draw):
    values = st.lists(st.lists(st.integers(0, 3), max_size=3, unique=True), min_size=NUM_ITEMS, max_size=NUM_ITEMS)
    quotas = tuple(quota(draw(st.integers(1, 3)), draw(values)) for _ in range(draw(st.integers(0, 2))))
    masks = st.lists(st.booleans(), min_size=NUM_ITEMS, max_size=NUM_ITEMS).map(np.array)
    needs = tuple(Need(str(n), draw(st.integers(1, 2)), draw(masks)) for n in range(draw(st.integers(0, 2))))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    vectors = np.round(rng.normal(size=(NUM_ITEMS, 2)).astype(np.float32))
    rules = ListRules(
        quotas, needs, draw(st.sampled_from([None, 0.0, 2.0])), draw(st.sampled_from([0.0, 0.5])), vectors
    )
    depth, num_queries = draw(st.integers(1, NUM_ITEMS)), draw(st.integers(0, 4))
    scores = -np.sort(-rng.integers(-2, 5, size=(num_queries, depth)).astype(np.float32), axis=1)
    rows = np.array([rng.permutation(NUM_ITEMS)[:depth] for _ in range(num_queries)], np.int64).reshape(-1, depth)
    for query in range(num_queries):
        found = int(rng.integers(0, depth + 1))
        if rng.random() < 0.5:
            scores[query, found:], rows[query, found:] = -np.inf, NO_ITEM
    return rules, scores, rows, draw(st.integers(4, 6)), draw(st.booleans())


@given(cases(), st.sampled_from([1, 20, 4_000_000]))
def test_lists_are_those_of_the_slow_way(case, at_once):
    rules, scores, rows, k, is_whole = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipeline.retrieval.list_rules.NUMBERS_AT_ONCE", at_once)
        chosen = rules.choose(scores, rows, k, is_whole)
    for query in range(len(rows)):
        expected = slow_choice(rules, scores[query].tolist(), rows[query].tolist(), k, is_whole)
        assert chosen.is_open_B[query] == (expected is None)
        if expected is not None:
            assert [place for place in chosen.places_BK[query].tolist() if place >= 0] == expected
            listed = rows[query][expected]
            assert chosen.num_fulfilling_BW[query].tolist() == [int(n.fulfils_N[listed].sum()) for n in rules.needs]


@given(cases())
def test_a_longer_ranking_does_not_change_a_settled_list_nor_does_an_item_below_what_was_needed(case):
    rules, scores, rows, k, _ = case
    depth = rows.shape[1]
    for shorter in range(1, depth):
        part = rules.choose(scores[:, :shorter], rows[:, :shorter], k, is_whole=False)
        whole = rules.choose(scores, rows, k, is_whole=True)
        for query in np.flatnonzero(~part.is_open_B):
            if rows[query, shorter - 1] != NO_ITEM:
                assert part.places_BK[query].tolist() == whole.places_BK[query].tolist()
    chosen = rules.choose(scores, rows, k, is_whole=True)
    for query, needed in enumerate(chosen.needed_B.tolist()):
        missing = [row for row in range(NUM_ITEMS) if row not in rows[query].tolist()]
        if not missing or math.isinf(needed):
            continue
        ranked = [(s, r) for s, r in zip(scores[query].tolist(), rows[query].tolist(), strict=True) if r != NO_ITEM]
        ranked.append((needed - 0.25, missing[0]))
        ranked.sort(key=lambda each: -each[0])
        more = rules.choose(
            np.array([[s for s, _ in ranked]], np.float32), np.array([[r for _, r in ranked]]), k, is_whole=True
        )
        others = chosen.rows_of(rows)[query].tolist()
        assert more.rows_of(np.array([[r for _, r in ranked]]))[0].tolist() == others


@given(cases())
def test_every_list_keeps_to_its_rules(case):
    rules, scores, rows, k, _ = case
    chosen = rules.choose(scores, rows, k, is_whole=True)
    listed, their_scores = chosen.rows_of(rows), chosen.scores_of(scores)
    for query in range(len(listed)):
        own = [row for row in listed[query].tolist() if row != NO_ITEM]
        assert len(set(own)) == len(own)
        for each in rules.quotas:
            counts = np.bincount([value for row in own for value in each.values[row].tolist()], minlength=1)
            assert counts.max() <= each.most
        finite = their_scores[query][np.isfinite(their_scores[query])]
        assert (np.diff(finite) <= 0).all()
        assert rules.min_score is None or (finite >= rules.min_score).all()
