"""Negatives of the sampled softmax: hard, popular and uniform ones, with the correction for how they are drawn.

Of N negatives of which an item is expected e times, the sum of exp(score) / e estimates the sum over all items, however
they are drawn (log-Q correction; Bengio & Senécal 2008, Yi et al. 2019). The estimate is the better, the more often an
item is drawn that has a high score: a popular one, or one that the dot-product head takes for the right one.

Shapes: V items, G groups of positions, N negatives of a group, M of the head, U distinct ones of these, B sequences.
"""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from pipeline.data.lists import Lists
from pipeline.settings import TrainSettings

SPREAD = 1e-3  # of the demand, over all items of the head: no item has none


@dataclass(frozen=True)
class Demand:
    """How much each group of positions takes each of some items for the right one, when it is wrong."""

    rows_U: Tensor  # the items, ascending
    share_GU: Tensor  # float64; they sum to one for each group

    @classmethod
    def of(cls, rows_M: Tensor, amount_GM: Tensor) -> Self:
        """Of items, some perhaps several times, with amounts of at least 0.

        The amounts of broken weights are not finite: they count as none, and the loss tells of the weights.
        """
        rows_U, place_M = rows_M.unique(return_inverse=True)
        amount_GU = torch.zeros((len(amount_GM), len(rows_U)), dtype=torch.float64, device=rows_M.device)
        amount_GU.index_add_(1, place_M, amount_GM.double().nan_to_num(0.0, posinf=0.0))
        total_G1 = amount_GU.sum(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        share_GU = (1.0 - SPREAD) * amount_GU / total_G1 + SPREAD / len(rows_U)
        return cls(rows_U, share_GU / share_GU.sum(dim=1, keepdim=True))

    def draw(self, num_negatives: int) -> Tensor:
        """(G, N) items, as often as their shares."""
        return self.rows_U[torch.multinomial(self.share_GU, num_negatives, replacement=True)]

    def shares(self, rows_GN: Tensor) -> Tensor:
        """(G, N) shares of these items in their groups; 0 for an item that is not among ours."""
        at_GN = torch.searchsorted(self.rows_U, rows_GN).clamp_max(len(self.rows_U) - 1)
        return self.share_GU.gather(1, at_GN) * (self.rows_U[at_GN] == rows_GN)


@dataclass(frozen=True)
class Negatives:
    """Draws the negatives of a group: `num_hard` by the group's demand, `num_popular` by popularity, the others
    uniformly."""

    popularity_V: Tensor  # float64: share of the training events on each item
    cumulative_V: Tensor  # on the items up to each
    num_hard: int
    num_popular: int
    num_negatives: int
    is_corrected: bool
    drawn_U: Tensor  # the items that uniform ones are drawn of, ascending

    @classmethod
    def of(cls, item_counts_V: Tensor, settings: TrainSettings, only_met: bool = False) -> Self:
        """For items with these numbers of training events; with `only_met` those without one are never drawn."""
        counts_V = item_counts_V.double()
        drawn_U = (counts_V > 0).nonzero()[:, 0] if only_met else torch.arange(len(counts_V), device=counts_V.device)
        num_hard = round(settings.hard_negatives * settings.num_negatives) if settings.head_weight else 0
        num_hard = min(num_hard, settings.num_negatives - 1)  # what the head does not see must be drawn at times
        num_popular = round(settings.popular_negatives * (settings.num_negatives - num_hard))
        popularity_V = counts_V / counts_V.sum()
        num_negatives, cumulative_V = settings.num_negatives, popularity_V.cumsum(0)
        return cls(popularity_V, cumulative_V, num_hard, num_popular, num_negatives, settings.log_q, drawn_U)

    @property
    def num_items(self) -> int:
        return len(self.cumulative_V)

    def for_head(self, num_negatives: int) -> tuple[Tensor, Tensor]:
        """(M,) items for the dot-product head and what is added to their scores: all items where they are no more than
        `num_negatives`, else so many, popular and uniform ones."""
        device = self.cumulative_V.device
        if len(self.drawn_U) <= num_negatives:
            return self.drawn_U, torch.zeros(len(self.drawn_U), device=device)
        num_popular = num_negatives * self.num_popular // (self.num_negatives - self.num_hard)
        sampler = replace(self, num_hard=0, num_popular=num_popular, num_negatives=num_negatives)
        rows_1M = sampler.draw(1)
        return rows_1M[0], sampler.corrections(rows_1M)[0]

    def draw(self, num_groups: int, demand: Demand | None = None) -> Tensor:
        """(G, N) items, drawn with torch's random numbers; without a `demand`, `num_hard` must be 0."""
        device = self.cumulative_V.device
        numbers_GN = torch.rand((num_groups, self.num_popular), dtype=torch.float64, device=device)
        popular_GN = torch.searchsorted(self.cumulative_V, numbers_GN, right=True).clamp_max(self.num_items - 1)
        num_uniform = self.num_negatives - self.num_hard - self.num_popular
        uniform_GN = self.drawn_U[torch.randint(len(self.drawn_U), (num_groups, num_uniform), device=device)]
        parts = [popular_GN, uniform_GN]
        if demand is not None:
            parts.append(demand.draw(self.num_hard))
        return torch.cat(parts, dim=1)

    def corrections(self, rows_GN: Tensor, demand: Demand | None = None) -> Tensor:
        """(G, N), float64: what is added to the scores of these negatives; 0 without correction, as in the paper."""
        if not self.is_corrected:
            return torch.zeros_like(rows_GN, dtype=torch.float64)
        num_uniform = self.num_negatives - self.num_hard - self.num_popular
        expected_GN = self.num_popular * self.popularity_V[rows_GN] + num_uniform / len(self.drawn_U)
        if demand is not None:
            expected_GN += self.num_hard * demand.shares(rows_GN)
        return -expected_GN.log()


def is_left_out(rows_GN: Tensor, own: Lists, sequences_T: Tensor, targets_T: Tensor) -> Tensor:
    """(T, N): whether a negative of the position's group has no part in its loss: it is the item to predict, or one of
    the `own` items of its sequence's user. The positions are in order of their groups."""
    group_T = torch.arange(len(targets_T), device=rows_GN.device) // (len(targets_T) // len(rows_GN))
    is_left_out_TN = is_own(rows_GN, own)[group_T, sequences_T]
    is_left_out_TN |= rows_GN[group_T] == targets_T.unsqueeze(1)
    return is_left_out_TN


def is_own(rows_GN: Tensor, own: Lists) -> Tensor:
    """(G, B, N): whether a negative is one of the `own` items of sequence b's user.

    They are hidden from the user, so the model need not rank them below what comes next.
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
