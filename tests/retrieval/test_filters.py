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
