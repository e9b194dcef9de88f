"""Negatives of the sampled softmax: drawn by popularity and uniformly, with the correction for how they are drawn.

Of N negatives drawn with probabilities q, the sum of exp(score) / (N · q) estimates the sum over all items, whatever q
is (log-Q correction; Bengio & Senécal 2008, Yi et al. 2019). Popular items matter most to that sum, because a model
gives them high scores: drawn uniformly from a large corpus they are hardly ever met.

Shapes: V items, G groups, N negatives of a group, B sequences.
"""

import math
from dataclasses import dataclass, replace
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

    def for_head(self, num_negatives: int) -> tuple[Tensor, Tensor]:
        """(M,) rows for the dot-product head and what is added to their scores: all items where they are no more than
        `num_negatives`, else so many that are drawn."""
        num_items = len(self.cumulative_V)
        if num_items <= num_negatives:
            rows_M = torch.arange(num_items, device=self.cumulative_V.device)
            return rows_M, torch.zeros(num_items, device=rows_M.device)
        drawn = replace(
            self, num_negatives=num_negatives, num_popular=num_negatives * self.num_popular // self.num_negatives
        )
        rows_1M = drawn.draw(1)
        return rows_1M[0], drawn.corrections(rows_1M)[0]

    def corrections(self, rows_GN: Tensor) -> Tensor:
        """(G, N), float64: what is added to the scores of these negatives; 0 without correction, as in the paper."""
        if not self.is_corrected:
            return torch.zeros_like(rows_GN, dtype=torch.float64)
        return -self.log_q_V[rows_GN] - math.log(self.num_negatives)


def is_own(rows_GN: Tensor, own: Lists) -> Tensor:
    """(G, B, N): whether a negative is one of the items of sequence b's user.

    What a user has is never shown to them, so the model need not rank it below what comes next.
    """
    num_groups, num_negatives = rows_GN.shape
    device = rows_GN.device
    owners, items = (torch.from_numpy(part).to(device, torch.int64) for part in (own.owners, own.values))
    rows, places = rows_GN.flatten().sort()
    first, end = torch.searchsorted(rows, items), torch.searchsorted(rows, items, right=True)
    # One entry for each negative that is an own item, which may have been drawn several times.
    times = end - first
    entry = torch.arange(len(items), device=device).repeat_interleave(times)
    nth = torch.arange(len(entry), device=device) - (times.cumsum(0) - times)[entry]
    place = places[first[entry] + nth]
    is_own_GBN = torch.zeros((num_groups, len(own), num_negatives), dtype=torch.bool, device=device)
    is_own_GBN[place // num_negatives, owners[entry], place % num_negatives] = True
    return is_own_GBN
