"""The terms of the training loss (Ding & Zhai, arXiv 2407.15462).

Shapes: T training positions, N negatives, P component pairs, D width.
"""

import torch
from torch import Tensor

GATE_EPSILON = 1e-6


def sampled_softmax_loss(positive_T: Tensor, negatives_TN: Tensor, is_left_out_TN: Tensor) -> Tensor:
    """(T,) minus the log of the positive's share in a softmax over the positive and its negatives.

    A negative that is an item of the user's own (`is_left_out_TN`) takes no part; without any other negative the loss
    is 0.
    """
    others_TN = negatives_TN.masked_fill(is_left_out_TN, float("-inf"))
    return torch.cat([positive_T.unsqueeze(-1), others_TN], dim=-1).logsumexp(dim=-1) - positive_T


def mutual_information_loss(gates_TP: Tensor) -> Tensor:
    """Minus the mutual information of component pair and training position: mean H(gate) - H(mean gate), H the entropy.

    In [-ln P, 0]. Lowest when each position uses few component pairs and all pairs are used equally often; 0, the
    worst, when all positions have the same gate.
    """
    return _entropy(gates_TP).mean() - _entropy(gates_TP.mean(dim=0))


def user_norm_loss(users_TD: Tensor) -> Tensor:
    """Mean squared norm of (T, D) rows of the user table, before dropout and normalisation."""
    return users_TD.square().sum(dim=-1).mean()


def _entropy(shares: Tensor) -> Tensor:
    return -(shares * (shares + GATE_EPSILON).log()).sum(dim=-1)
