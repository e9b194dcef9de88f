import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.lists import NO_ITEM
from pipeline.retrieval.topk import TopK, concat_queries, empty_topk, merge_topk, select_topk

candidates = st.lists(
    st.tuples(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), st.integers(0, 30)), max_size=20, unique_by=lambda c: c[1]
)


def topk_of(pairs: list[tuple[float, int]], k: int) -> TopK:
    scores = torch.tensor([[score for score, _ in pairs]], dtype=torch.float32).reshape(1, -1)
    rows = torch.tensor([[row for _, row in pairs]], dtype=torch.int64).reshape(1, -1)
    return select_topk(scores, rows, k)


def as_pairs(found: TopK) -> list[tuple[float, int]]:
    pairs = zip(found.scores_BK[0].tolist(), found.rows_BK[0].tolist(), strict=True)
    return [(score, row) for score, row in pairs if row != NO_ITEM]


@given(candidates, st.integers(1, 25))
def test_order_is_score_descending_then_row_ascending(pairs, k):
    expected = sorted(pairs, key=lambda pair: (-pair[0], pair[1]))[:k]
    assert as_pairs(topk_of(pairs, k)) == expected


@given(candidates, st.integers(1, 25), st.randoms())
def test_merging_parts_in_any_order_gives_the_whole(pairs, k, random):
    parts: list[list[tuple[float, int]]] = [[], [], []]
    for pair in pairs:
        random.choice(parts).append(pair)
    random.shuffle(parts)
    merged = empty_topk(1, k)
    for part in parts:
        merged = merge_topk(merged, topk_of(part, k), k)
    assert as_pairs(merged) == as_pairs(topk_of(pairs, k))


@given(st.lists(candidates, min_size=1, max_size=6), st.integers(1, 6), st.data())
def test_queries_may_be_taken_apart_and_put_together_again(lists, k, data):
    whole = concat_queries([topk_of(pairs, k) for pairs in lists])
    assert [as_pairs(whole.take(slice(query, query + 1))) for query in range(len(lists))] == [
        as_pairs(topk_of(pairs, k)) for pairs in lists
    ]
    cut = data.draw(st.integers(0, len(lists)))
    again = concat_queries([whole.take(slice(0, cut)), whole.take(slice(cut, None)).to("cpu")])
    assert len(again) == len(lists)
    for name in ("scores_BK", "rows_BK", "bounds_B"):
        assert torch.equal(getattr(again, name), getattr(whole, name))
    order = torch.tensor(data.draw(st.permutations(range(len(lists)))))
    assert torch.equal(whole.take(order).rows_BK, whole.rows_BK[order])


def test_what_either_part_can_have_missed_the_merged_list_can_have_missed():
    left, right = topk_of([(2.0, 1)], 2), topk_of([(1.0, 9)], 2)
    known = TopK(left.scores_BK, left.rows_BK, torch.tensor([0.5]))
    for one, other in ((known, right), (right, known)):
        assert merge_topk(one, other, 2).bounds_B.tolist() == [0.5]
    assert merge_topk(known, empty_topk(1, 2), 2).bounds_B.tolist() == [0.5]
    assert merge_topk(left, right, 2).is_proven_B.tolist() == [True]


def test_a_short_list_is_padded_and_minus_infinity_is_never_an_item():
    found = topk_of([(1.0, 4), (-torch.inf, 2)], k=3)
    assert found.rows_BK.tolist() == [[4, NO_ITEM, NO_ITEM]]
    assert found.scores_BK.tolist() == [[1.0, -torch.inf, -torch.inf]]


SCORES = st.integers(-(2**24), 2**24).map(lambda number: number / 2**20)  # each is a float32, their differences are not


@given(SCORES, st.one_of(st.just(-math.inf), st.just(math.inf), SCORES))
def test_what_was_missed_exceeds_the_last_score_by_no_more_than_the_gap(last, bound):
    found = TopK(torch.tensor([[last]]), torch.tensor([[3]]), torch.tensor([bound]))
    gap = float(found.gaps_B)
    assert last + gap >= bound  # in float64
    assert gap == 0 or not found.is_proven_B
    assert (gap == math.inf) == (bound == math.inf)


def test_a_list_is_not_proven_when_what_was_missed_can_tie_with_its_last_score():
    """A missed item of score 1 and a lower row would be in the list."""
    scores_BK, rows_BK = torch.tensor([[2.0, 1.0]] * 4), torch.tensor([[3, 7]] * 4)
    found = TopK(scores_BK, rows_BK, torch.tensor([0.99, 1.0, 1.5, -torch.inf]))
    assert found.is_proven_B.tolist() == [True, False, False, True]
    assert found.gaps_B.tolist() == [0.0, 0.0, 0.5, 0.0]
