"""The values that carry bonuses to a search."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.lists import Lists
from pipeline.retrieval.bonuses import Bonuses
from pipeline.retrieval.filters import Eligibility, Rules

NUM_ITEMS = 12
Plain = list[dict[int, float]]  # the amount by row, for each query
plain_bonuses = st.lists(
    st.dictionaries(st.integers(0, NUM_ITEMS - 1), st.integers(-8, 8).map(float), max_size=6), max_size=6
)


def bonuses_of(plain: Plain, num_items: int = NUM_ITEMS) -> Bonuses:
    rows = [sorted(each) for each in plain]
    amounts = [each[row] for each, ascending in zip(plain, rows, strict=True) for row in ascending]
    return Bonuses(Lists.of(rows), np.array(amounts, dtype=np.float32), num_items)


def as_plain(bonuses: Bonuses) -> Plain:
    bounds = zip(bonuses.rows.offsets[:-1], bonuses.rows.offsets[1:], strict=True)
    return [
        dict(zip(bonuses.rows.values[low:high].tolist(), bonuses.amounts[low:high].tolist(), strict=True))
        for low, high in bounds
    ]


@given(plain_bonuses, st.data())
def test_bonuses_follow_their_queries_into_any_order(plain, data):
    """Also one query twice."""
    queries = data.draw(st.lists(st.integers(0, len(plain) - 1), max_size=9)) if plain else []
    taken = bonuses_of(plain).take(np.array(queries, dtype=np.int64))
    assert as_plain(taken) == [plain[query] for query in queries]
    rules = Rules(Lists.empty(len(plain)), bonuses=bonuses_of(plain)).take(np.array(queries, dtype=np.int64))
    assert as_plain(rules.bonuses) == [plain[query] for query in queries]


@given(plain_bonuses, st.integers(0, NUM_ITEMS), st.integers(0, NUM_ITEMS))
def test_a_shard_gets_the_bonuses_of_its_items_and_counts_from_its_first(plain, one, other):
    low, high = sorted((one, other))
    expected = [{row - low: amount for row, amount in each.items() if low <= row < high} for each in plain]
    part = bonuses_of(plain).within(low, high)
    assert (as_plain(part), part.num_items) == (expected, high - low)
    of_shard = Rules(Lists.empty(len(plain)), bonuses=bonuses_of(plain)).bonuses_for_shard(low, high - low)
    assert (of_shard is None) == (not any(expected))
    assert of_shard is None or as_plain(of_shard) == expected


@given(st.lists(plain_bonuses, min_size=1, max_size=4))
def test_joined_parts_have_the_queries_of_all(parts):
    assert as_plain(Bonuses.concat(map(bonuses_of, parts))) == [each for part in parts for each in part]


@given(plain_bonuses, st.data())
def test_where_keeps_the_marked_bonuses(plain, data):
    bonuses = bonuses_of(plain)
    kept = data.draw(st.sets(st.integers(0, NUM_ITEMS - 1)))
    expected = [{row: amount for row, amount in each.items() if row in kept} for each in plain]
    assert as_plain(bonuses.where(np.isin(bonuses.rows.values, list(kept)))) == expected


def test_as_tensors_there_is_one_line_per_query_padded_at_its_end():
    at_BM, amounts_BM = bonuses_of([{3: 0.5, 1: -2.0}, {}, {7: 1.0}]).as_tensors(torch.device("cpu"))
    assert at_BM.tolist() == [[1, 3], [-1, -1], [7, -1]]
    assert amounts_BM.tolist() == [[-2.0, 0.5], [0.0, 0.0], [1.0, 0.0]]
    assert bonuses_of([{}, {}]).as_tensors(torch.device("cpu"))[0].shape == (2, 0)


@pytest.mark.parametrize(
    ("rows", "amounts", "complaint"),
    [
        ([[1], [2, 12]], [0, 0, 0], "query 1 has a bonus for row 12 of 12 items"),
        ([[], [-1]], [0], "query 1 has a bonus for row -1 of 12 items"),
        ([[9], [4, 4]], [0, 0, 0], "rows with a bonus of query 1 do not ascend; sort them, and give each row once"),
        ([[5, 4]], [0, 0], "rows with a bonus of query 0 do not ascend"),
        ([[5], [], [7]], [0, np.nan], "query 2 has a bonus of nan for row 7"),
        ([[5], [], [7]], [-np.inf, 0], "query 0 has a bonus of -inf for row 5"),
        ([[5, 6]], [0], "1 amounts for 2 items"),
    ],
)
def test_bonuses_that_mean_nothing_are_refused(rows, amounts, complaint):
    with pytest.raises(ValueError, match=complaint):
        Bonuses(Lists.of(rows), np.array(amounts, dtype=np.float32), NUM_ITEMS)


def test_bonuses_of_a_smaller_index_or_of_other_queries_are_refused():
    rules = Rules(Lists.empty(1), bonuses=bonuses_of([{3: 1.0}]))
    with pytest.raises(ValueError, match="bonuses are for 12 items, but the shard ends at item 13"):
        rules.bonuses_for_shard(first_row=8, num_items=5)
    with pytest.raises(ValueError, match="bonuses for 1 queries, but 2 queries"):
        Rules(Lists.empty(2), bonuses=bonuses_of([{3: 1.0}]))


@given(plain_bonuses, st.data())
def test_a_bonus_counts_where_the_rules_allow_the_item(plain, data):
    hidden = [data.draw(st.sets(st.integers(0, NUM_ITEMS - 1))) for _ in plain]
    is_eligible = data.draw(st.lists(st.booleans(), min_size=NUM_ITEMS, max_size=NUM_ITEMS))
    eligibility = Eligibility(torch.tensor([is_eligible]), np.zeros(len(plain), dtype=np.int64))
    if not plain:
        return
    rows = bonuses_of(plain).rows
    for some, is_shown in ((eligibility, is_eligible), (None, [True] * NUM_ITEMS)):
        mask = Rules(Lists.of(sorted(each) for each in hidden), some).for_shard(0, NUM_ITEMS)
        pairs = [(row, hidden[query]) for query, each in enumerate(plain) for row in sorted(each)]
        assert mask.allows(rows).tolist() == [is_shown[row] and row not in mine for row, mine in pairs]
        left = mask.without(rows).hide(torch.zeros(len(plain), NUM_ITEMS), 0)
        expected = [
            [not is_shown[row] or row in mine or row in each for row in range(NUM_ITEMS)]
            for mine, each in zip(hidden, plain, strict=True)
        ]
        assert left.isneginf().tolist() == expected
