import torch

from pipeline.data.lists import Lists
from pipeline.retrieval.filters import mask_shard


def test_a_query_loses_its_own_items_and_no_other():
    mask = mask_shard(torch.ones(4, dtype=torch.bool), first_row=10, excluded=Lists.of([[11, 99], [], [13, 10]]))
    hidden = mask.hide(torch.zeros(3, 4), low=0)
    assert hidden.isneginf().tolist() == [[False, True, False, False], [False] * 4, [True, False, False, True]]


def test_a_tile_is_hidden_like_its_part_of_the_whole():
    mask = mask_shard(torch.tensor([True, True, False, True, True]), 0, Lists.of([[0, 3], [1, 4]]))
    whole = mask.hide(torch.zeros(2, 5), 0)
    tiles = torch.cat([mask.hide(torch.zeros(2, 2), 0), mask.hide(torch.zeros(2, 3), 2)], dim=1)
    assert torch.equal(whole, tiles)


def test_an_ineligible_item_is_hidden_from_all():
    mask = mask_shard(torch.tensor([True, False]), 0, Lists.empty(3))
    assert mask.hide(torch.zeros(3, 2), 0).isneginf().tolist() == [[False, True]] * 3
