"""Negatives of the sampled softmax: drawn by popularity and uniformly, with the correction for how they are drawn.

Of N negatives drawn with probabilities q, the sum of exp(score) / (N · q) estimates the sum over all items, whatever q
is (log-Q correction; Bengio & Senécal 2008, Yi et al. 2019). Popular items matter most to that sum, because a model
gives them high scores: drawn uniformly from a large corpus they are hardly ever met.

Shapes: V items, G groups, N negatives of a group, B sequences.
"""

import math
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from pipeline.data.lists import Lists
from pipeline.settings import TrainSettings


@dataclass(frozen=True)
class Negatives:
    """Draws negatives: `num_popular` of each group by popularity, the others uniformly."""

    cumulative_V: Tensor  # float64: share of the training events on the items up to this one
    log_q_V: Tensor  # float64: log of the probability that a negative, whichever of the N, is this item
    num_popular: int
    num_negatives: int
    is_corrected: bool

    @classmethod
    def of(cls, item_counts_V: Tensor, settings: TrainSettings) -> Self:
        """For items with these numbers of training events."""
        counts_V = item_counts_V.double()
        num_popular = round(settings.popular_negatives * settings.num_negatives)
        share = num_popular / settings.num_negatives
        q_V = share * counts_V / counts_V.sum() + (1.0 - share) / len(counts_V)
        cumulative_V = (counts_V / counts_V.sum()).cumsum(0)
        return cls(cumulative_V, q_V.log(), num_popular, settings.num_negatives, settings.log_q)

    def draw(self, num_groups: int) -> Tensor:
        """(G, N): items, drawn with torch's random numbers."""
        device, num_items = self.cumulative_V.device, len(self.cumulative_V)
        numbers_GN = torch.rand((num_groups, self.num_popular), dtype=torch.float64, device=device)
        popular_GN = torch.searchsorted(self.cumulative_V, numbers_GN, right=True).clamp_max(num_items - 1)
        shape = (num_groups, self.num_negatives - self.num_popular)
        return torch.cat([popular_GN, torch.randint(num_items, shape, device=device)], dim=1)

    def corrections(self, rows_GN: Tensor) -> Tensor:
        """(G, N), float64: what is added to the scores of these negatives; 0 without correction, as in the paper."""
        if not self.is_corrected:
            return torch.zeros_like(rows_GN, dtype=torch.float64)
        return -self.log_q_V[rows_GN] - math.log(self.num_negatives)


def is_own(rows_GN: Tensor, own: Lists, num_items: int) -> Tensor:
    """(G, B, N): whether a negative is one of the items of sequence b's user; `own` has them in ascending order.

    What a user has is never shown to them, so the model need not rank it below what comes next.
    """
    codes = torch.from_numpy(own.owners * num_items + own.values).to(rows_GN.device)
    users_B = torch.arange(len(own), device=rows_GN.device)
    wanted_GBN = users_B[None, :, None] * num_items + rows_GN[:, None, :]
    if not len(codes):
        return torch.zeros_like(wanted_GBN, dtype=torch.bool)
    at_GBN = torch.searchsorted(codes, wanted_GBN).clamp_max(len(codes) - 1)
    return codes[at_GBN] == wanted_GBN
