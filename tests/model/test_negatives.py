"""Negatives: how often an item is drawn, what corrects for it, and whose items take no part."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.lists import Lists
from pipeline.model.losses import sampled_softmax_loss
from pipeline.model.negatives import Demand, Negatives, is_left_out, is_own
from pipeline.settings import TrainSettings

COUNTS = torch.tensor([0, 1, 2, 7, 90])


def settings(share: float, num_negatives: int = 10, log_q: bool = True) -> TrainSettings:
    return TrainSettings(num_negatives=num_negatives, popular_negatives=share, log_q=log_q, hard_negatives=0.0)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_items_are_drawn_as_often_as_the_correction_says(share):
    torch.manual_seed(0)
    sampler = Negatives.of(COUNTS, settings(share))
    rows_GN = sampler.draw(20_000)
    assert rows_GN.shape == (20_000, 10)
    found = torch.bincount(rows_GN.flatten(), minlength=5) / rows_GN.numel()
    expected = share * COUNTS.double() / 100 + (1 - share) / 5
    torch.testing.assert_close(found.double(), expected.double(), atol=0.004, rtol=0)
    corrections_1V = sampler.corrections(torch.arange(5)[None])
    torch.testing.assert_close((-corrections_1V[0]).exp(), 10 * expected.double(), atol=1e-9, rtol=0)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_corrected_sum_over_negatives_estimates_the_sum_over_all_items(share):
    """For items that can be drawn at all."""
    torch.manual_seed(0)
    scores_V = torch.tensor([0.3, -1.0, 0.5, 2.0, 1.0], dtype=torch.float64)
    counts = COUNTS + 1
    sampler = Negatives.of(counts, settings(share, num_negatives=50))
    rows_GN = sampler.draw(4_000)
    estimates_G = (scores_V[rows_GN] + sampler.corrections(rows_GN)).exp().sum(dim=1)
    assert estimates_G.mean().item() == pytest.approx(scores_V.exp().sum().item(), rel=0.02)


def test_hard_negatives_follow_the_demand_of_their_group_and_are_corrected_for_it():
    """The head saw items 1, 2 and 4, the last one twice; all are drawn, by popularity and uniformly, with them."""
    torch.manual_seed(0)
    counts = COUNTS + 1
    keys = {"num_negatives": 40, "hard_negatives": 0.5, "popular_negatives": 0.5}
    sampler = Negatives.of(counts, TrainSettings(**keys))
    assert (sampler.num_hard, sampler.num_popular) == (20, 10)
    amounts = torch.tensor([[1.0, 0.0, 1.0, 2.0], [0.0, 5.0, 0.0, 0.0]])
    demand = Demand.of(torch.tensor([4, 2, 1, 4]), amounts)
    assert demand.rows_U.tolist() == [1, 2, 4]
    torch.testing.assert_close(
        demand.share_GU, torch.tensor([[0.25, 0.0, 0.75], [0.0, 1.0, 0.0]]).double(), atol=2e-3, rtol=0
    )
    scores_V = torch.tensor([0.3, -1.0, 0.5, 2.0, 1.0], dtype=torch.float64)
    estimates, hard = [], []
    for _ in range(3_000):
        rows_GN = sampler.draw(2, demand)
        estimates.append((scores_V[rows_GN] + sampler.corrections(rows_GN, demand)).exp().sum(dim=1))
        hard.append(rows_GN[:, 20:])
    assert torch.stack(estimates).mean(dim=0).tolist() == pytest.approx([scores_V.exp().sum().item()] * 2, rel=0.02)
    hard_GN = torch.cat(hard, dim=1)
    assert (hard_GN[0] == 4).double().mean().item() == pytest.approx(0.75, abs=0.01)
    assert (hard_GN[1] == 2).double().mean().item() > 0.99


@pytest.mark.parametrize("num_negatives", [1, 7])
def test_not_all_negatives_are_hard(num_negatives):
    """An item that the head does not see must be drawn at times, by the head's own sample too."""
    sampler = Negatives.of(COUNTS + 1, TrainSettings(num_negatives=num_negatives, hard_negatives=1.0))
    assert sampler.num_hard == num_negatives - 1
    demand = Demand.of(torch.tensor([2]), torch.ones(1_000, 1)) if sampler.num_hard else None
    rows_GN = sampler.draw(1_000, demand)
    assert set(rows_GN.unique().tolist()) == {0, 1, 2, 3, 4}
    assert sampler.corrections(rows_GN, demand).isfinite().all()
    rows_M, corrections_M = sampler.for_head(3)
    assert rows_M.shape == (3,)
    assert corrections_M.isfinite().all()


def test_the_amounts_of_broken_weights_count_as_none():
    demand = Demand.of(torch.tensor([3, 7]), torch.tensor([[float("nan"), 2.0], [float("inf"), float("nan")]]))
    expected = torch.tensor([[0.0, 1.0], [0.5, 0.5]]).double()
    torch.testing.assert_close(demand.share_GU, expected, atol=1e-3, rtol=0)


def test_a_group_without_demand_draws_the_items_of_the_head_alike():
    demand = Demand.of(torch.tensor([3, 7]), torch.zeros(1, 2))
    torch.testing.assert_close(demand.share_GU, torch.full((1, 2), 0.5, dtype=torch.float64))


def test_the_head_sees_all_items_of_a_small_corpus_and_a_corrected_sample_of_a_large_one():
    torch.manual_seed(0)
    sampler = Negatives.of(COUNTS, settings(0.5))
    rows_M, corrections_M = sampler.for_head(5)
    assert rows_M.tolist() == [0, 1, 2, 3, 4]
    assert not corrections_M.any()
    counts = torch.arange(1, 3_001)
    rows_M, corrections_M = Negatives.of(counts, settings(0.5)).for_head(2_000)
    assert rows_M.shape == corrections_M.shape == (2_000,)
    scores_V = torch.linspace(-1, 1, 3_000, dtype=torch.float64)
    estimate = (scores_V[rows_M] + corrections_M).exp().sum().item()
    assert estimate == pytest.approx(scores_V.exp().sum().item(), rel=0.1)


def test_with_every_item_as_a_negative_the_loss_is_that_of_the_full_softmax():
    scores_V = torch.tensor([0.3, -1.0, 0.5, 2.0], dtype=torch.float64)
    sampler = Negatives.of(torch.ones(4), settings(0.0, num_negatives=4))
    rows_GN = torch.arange(4)[None]
    negatives = scores_V[rows_GN] + sampler.corrections(rows_GN)
    loss = sampled_softmax_loss(scores_V[2:3], negatives, rows_GN == 2)
    torch.testing.assert_close(loss, torch.logsumexp(scores_V, 0)[None] - scores_V[2:3])


def test_without_correction_scores_are_left_alone():
    sampler = Negatives.of(COUNTS, settings(0.5, log_q=False))
    assert sampler.corrections(sampler.draw(3)).abs().max() == 0


ITEMS = st.lists(st.lists(st.integers(0, 9), max_size=6), min_size=1, max_size=4)


@given(ITEMS, st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=1, max_size=3))
def test_own_items_are_those_of_the_sequences_user(own, rows):
    lists = Lists.of(own).distinct()
    found = is_own(torch.tensor(rows), lists)
    expected = [[[row in own[user] for row in group] for user in range(len(own))] for group in rows]
    assert found.tolist() == expected
    assert found.dtype == torch.bool


def test_numbers_of_many_users_and_items_do_not_overflow():
    own = Lists(np.array([0, 0, 1]), np.array([2_999_999_99], dtype=np.int32))
    assert is_own(torch.tensor([[2_999_999_99]]), own).tolist() == [[[False], [True]]]


def test_a_position_leaves_out_its_own_item_and_what_is_hidden_from_its_user():
    """Also where nothing is hidden from a user: then the item to predict is no negative of itself."""
    rows_GN = torch.tensor([[4, 7, 4, 1], [2, 7, 9, 9]])
    own = Lists.of([[1, 9], []])
    sequences_T, targets_T = torch.tensor([0, 1, 1, 0]), torch.tensor([7, 4, 7, 2])
    assert is_left_out(rows_GN, own, sequences_T, targets_T).tolist() == [
        [False, True, False, True],
        [True, False, True, False],
        [False, True, False, False],
        [True, False, True, True],
    ]
