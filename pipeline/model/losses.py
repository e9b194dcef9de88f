"""What training minimises (Ding & Zhai, arXiv 2407.15462).

Shapes: T training positions, N negatives, P component pairs, D width.
"""

import torch
from torch import Tensor

GATE_EPSILON = 1e-6


def sampled_softmax_loss(positive_T: Tensor, negatives_TN: Tensor, is_collision_TN: Tensor) -> Tensor:
    """(T,): -log of the softmax share of the positive among itself and its negatives.

    A negative that equals the positive (`is_collision_TN`) takes no part; where all do, the loss is 0.
    """
    others_TN = negatives_TN.masked_fill(is_collision_TN, float("-inf"))
    return torch.cat([positive_T.unsqueeze(-1), others_TN], dim=-1).logsumexp(dim=-1) - positive_T


def mutual_information_loss(gates_TP: Tensor) -> Tensor:
    """-H(mean gate) + mean H(gate): minus the mutual information of component pair and training position.

    In [-ln P, 0]. Lowest when each position uses few component pairs and all pairs are used alike; 0, the worst, when
    every position has the same gate, a uniform one included.
    """
    return _entropy(gates_TP).mean() - _entropy(gates_TP.mean(dim=0))


def user_norm_loss(users_TD: Tensor) -> Tensor:
    """Mean squared norm of the users' raw rows, before dropout and normalisation."""
    return users_TD.square().sum(dim=-1).mean()


def _entropy(shares: Tensor) -> Tensor:
    return -(shares * (shares + GATE_EPSILON).log()).sum(dim=-1)
