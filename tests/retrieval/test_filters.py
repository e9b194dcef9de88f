import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.lists import Lists
from pipeline.retrieval.filters import Eligibility, Rules, ShardMask


def test_a_query_loses_its_own_items_and_no_other():
    mask = Rules(Lists.of([[11, 99], [], [13, 10, 13]])).for_shard(first_row=10, num_items=4)
    hidden = mask.hide(torch.zeros(3, 4), low=0)
    assert hidden.isneginf().tolist() == [[False, True, False, False], [False] * 4, [True, False, False, True]]


def test_a_tile_is_hidden_like_its_part_of_the_whole():
    mask = ShardMask(5, Lists.of([[0, 3], [1, 4]]), torch.tensor([True, True, False, True, True]))
    whole = mask.hide(torch.zeros(2, 5), 0)
    tiles = torch.cat([mask.hide(torch.zeros(2, 2), 0), mask.hide(torch.zeros(2, 3), 2)], dim=1)
    assert torch.equal(whole, tiles)


def test_an_ineligible_item_is_hidden_from_its_group():
    markets = Eligibility(torch.tensor([[True, True, False], [False, True, True]]), np.array([1, 1]))
    mask = Rules(Lists.empty(2), markets).for_shard(first_row=1, num_items=2)
    assert mask.hide(torch.zeros(2, 2), 0).isneginf().tolist() == [[False, False]] * 2
    mask = Rules(Lists.empty(2), markets).take(np.array([0])).for_shard(first_row=0, num_items=2)
    assert mask.hide(torch.zeros(1, 2), 0).isneginf().tolist() == [[True, False]]


def test_masks_that_end_before_the_shard_are_refused():
    markets = Eligibility(torch.ones(1, 5, dtype=torch.bool), np.array([0]))
    with pytest.raises(ValueError, match="covers 5 items, but the shard ends at item 6"):
        Rules(Lists.empty(1), markets).for_shard(first_row=4, num_items=2)


@given(st.lists(st.integers(0, 3), max_size=20), st.integers(1, 7), st.booleans())
def test_each_query_is_in_one_part_and_each_part_is_small_and_of_one_group(groups, max_queries, has_groups):
    eligibility = Eligibility(torch.ones(4, 1, dtype=torch.bool), np.array(groups, dtype=np.int64))
    parts = list(Rules(Lists.empty(len(groups)), eligibility if has_groups else None).parts(max_queries))
    assert sorted(query for part in parts for query in part) == list(range(len(groups)))
    for part in parts:
        assert 1 <= len(part) <= max_queries
        assert not has_groups or len({groups[query] for query in part}) == 1


@given(st.data())
def test_rules_follow_their_queries_into_any_order(data):
    """Also one query twice; its own exclusions and its group come with it."""
    groups = data.draw(st.lists(st.integers(0, 2), min_size=1, max_size=8))
    lists = [data.draw(st.lists(st.integers(0, 9), max_size=4)) for _ in groups]
    queries = data.draw(st.lists(st.integers(0, len(groups) - 1), max_size=9))
    masks = torch.tensor([[True] * 10, [False, True] * 5, [True, False] * 5])
    rules = Rules(Lists.of(lists), Eligibility(masks, np.array(groups)))
    taken = rules.take(np.array(queries, dtype=np.int64))
    assert len(taken) == len(queries)
    assert taken.eligibility.group_of_B.tolist() == [groups[query] for query in queries]
    assert [taken.excluded[place].tolist() for place in range(len(queries))] == [lists[query] for query in queries]


@given(st.data())
def test_a_shards_mask_hides_what_its_part_of_the_whole_mask_hides(data):
    """Cut into shards, narrowed, taken and hidden tile by tile: the same cells as worked out one by one."""
    num_items, low = data.draw(st.integers(1, 12)), data.draw(st.integers(0, 12))
    first = min(low, num_items - 1)
    num_here = data.draw(st.integers(1, num_items - first))
    is_eligible = data.draw(st.lists(st.booleans(), min_size=num_items, max_size=num_items))
    lists = data.draw(st.lists(st.lists(st.integers(0, num_items - 1), max_size=5), min_size=1, max_size=5))
    rules = Rules(Lists.of(lists), Eligibility(torch.tensor([is_eligible]), np.zeros(len(lists), dtype=np.int64)))
    mask = rules.for_shard(first, num_here)
    expected = [[row in each or not is_eligible[row] for row in range(first, first + num_here)] for each in lists]
    cut = data.draw(st.integers(0, num_here))
    tiles = [mask.hide(torch.zeros(len(lists), high - low), low) for low, high in ((0, cut), (cut, num_here))]
    assert torch.cat(tiles, dim=1).isneginf().tolist() == expected
    start, stop = sorted(data.draw(st.integers(0, len(lists))) for _ in range(2))
    assert (
        mask.narrow(start, stop).hide(torch.zeros(stop - start, num_here), 0).isneginf().tolist()
        == expected[start:stop]
    )
    backwards = np.arange(len(lists))[::-1].copy()
    assert mask.take(backwards).hide(torch.zeros(len(lists), num_here), 0).isneginf().tolist() == expected[::-1]
    assert (len(mask), mask.to("cpu").num_items) == (len(lists), num_here)
