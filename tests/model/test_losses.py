import math

import pytest
import torch

from pipeline.model.losses import mutual_information_loss, sampled_softmax_loss, user_norm_loss


def test_sampled_softmax_by_hand():
    """The positive has e^1 of e^1 + e^0 + e^2."""
    none = torch.zeros(1, 2, dtype=torch.bool)
    loss_T = sampled_softmax_loss(torch.tensor([1.0]), torch.tensor([[0.0, 2.0]]), none)
    assert loss_T.item() == pytest.approx(-math.log(math.e / (math.e + 1 + math.e**2)))


def test_fact_20_a_negative_that_is_the_users_own_takes_no_part():
    positive_T = torch.tensor([1.0, 1.0], requires_grad=True)
    negatives_TN = torch.tensor([[5.0, 2.0], [5.0, 2.0]], requires_grad=True)
    is_own_TN = torch.tensor([[True, False], [True, True]])
    loss_T = sampled_softmax_loss(positive_T, negatives_TN, is_own_TN)
    alone = sampled_softmax_loss(torch.tensor([1.0]), torch.tensor([[2.0]]), torch.tensor([[False]]))
    torch.testing.assert_close(loss_T[:1], alone)
    assert loss_T[1].item() == 0
    loss_T.sum().backward()
    assert negatives_TN.grad[is_own_TN].tolist() == [0.0, 0.0, 0.0]
    assert positive_T.grad[1].item() == 0
    assert torch.isfinite(negatives_TN.grad).all()


@pytest.mark.parametrize("num_pairs", [2, 4, 32, 64])
def test_fact_8_balanced_one_hot_gates_reach_the_lowest_loss(num_pairs):
    expected = {2: -0.6931461806, 4: -1.3862913611, 32: -3.4657049033, 64: -4.1588200854}[num_pairs]
    loss = mutual_information_loss(torch.eye(num_pairs, dtype=torch.float64).repeat(3, 1)).item()
    assert loss == pytest.approx(expected, abs=1e-9)
    assert loss == pytest.approx(math.log(1 / num_pairs + 1e-6) - math.log(1 + 1e-6), abs=1e-9)


@pytest.mark.parametrize("gate", [[0.25, 0.25, 0.25, 0.25], [0.7, 0.1, 0.1, 0.1]])
def test_fact_8_the_same_gate_everywhere_has_the_highest_loss(gate):
    loss = mutual_information_loss(torch.tensor([gate], dtype=torch.float64).repeat(6, 1)).item()
    assert loss == pytest.approx(0, abs=1e-9)


def test_facts_3_and_8_the_loss_is_minus_the_mean_divergence_from_the_mean_gate():
    gates_TP = torch.rand(50, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(dim=-1)
    mean_P = gates_TP.mean(dim=0)
    divergence = (gates_TP * (gates_TP.log() - mean_P.log())).sum(dim=-1).mean()
    loss = mutual_information_loss(gates_TP)
    torch.testing.assert_close(loss, -divergence, atol=1e-6, rtol=0)
    assert -math.log(8) <= loss <= 0


def test_user_norm_is_the_mean_squared_norm():
    assert user_norm_loss(torch.tensor([[3.0, 4.0], [0.0, 1.0]])).item() == 13.0
