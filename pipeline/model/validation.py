"""Validation: how high held-out events rank among all items, to choose the best weights.

Shapes: B queries, N items of a tile, M held-out items of a query.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.data.batches import ValidationUsers
from pipeline.data.lists import NO_ITEM
from pipeline.model.inputs import Events, QueryInput
from pipeline.model.model import RetrievalModel
from pipeline.model.mol import QuerySide

QUERY_TILE = 128
ITEM_TILE = 128

# Scores of item rows. (N,) rows, the same for all queries, give (B, N) scores, or (N,) when all queries score alike;
# (B, M) rows, each query's own, give (B, M).
Score = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class RankingSums:
    """Sums over users: hits and NDCG at a cutoff. Sums of disjoint users can be added."""

    num_hits: float = 0.0  # users with a held-out item within the cutoff
    ndcg: float = 0.0

    def __add__(self, other: "RankingSums") -> "RankingSums":
        return RankingSums(self.num_hits + other.num_hits, self.ndcg + other.ndcg)


# Ranks the items that each user has not seen by the scores of a model; the last argument is the cutoff.
Validate = Callable[[RetrievalModel, ValidationUsers, int], RankingSums]


@torch.no_grad()
def rank_by_model(model: RetrievalModel, users: ValidationUsers, cutoff: int) -> RankingSums:
    """Rank by scoring every item: the plain way, for any similarity. `stages/validation.py` searches instead."""
    model.eval()
    sums = RankingSums()
    for tile in users.tiles(QUERY_TILE):
        events = Events.last(tile.histories, model.settings.max_length, model.device)
        query = model.query_side(QueryInput(events, torch.from_numpy(tile.user_keys).to(model.device)))
        sums += _sums(_num_ahead(_model_score(model, query), tile, model.num_items), cutoff)
    return sums


@torch.no_grad()
def rank_by_counts(item_counts: Tensor, users: ValidationUsers, cutoff: int) -> RankingSums:
    """Rank the items that each user has not seen by one count per item, the same for everybody."""
    counts = item_counts.double()

    def score(rows: Tensor) -> Tensor:
        return counts[rows]

    tiles = users.tiles(QUERY_TILE)
    return sum((_sums(_num_ahead(score, tile, len(counts)), cutoff) for tile in tiles), start=RankingSums())


def _model_score(model: RetrievalModel, query: QuerySide) -> Score:
    def score(rows: Tensor) -> Tensor:
        items = model.item_side(rows.to(query.gate_BP.device))
        scores: Tensor = model.mol(query, items) if rows.dim() == 1 else model.mol(query.alone(), items).squeeze(1)
        return scores.cpu()

    return score


def _num_ahead(score: Score, users: ValidationUsers, num_items: int) -> Tensor:
    """(B, M) int64: the number of items ahead of each held-out item, of those that may be shown to the user.

    Of equal scores the lower row is ahead. -1 where a user has fewer held-out items than another.
    """
    targets_BM = torch.from_numpy(users.held_out.last(int(users.held_out.lengths.max()))[0]).long()
    scores_BM1 = score(targets_BM.clamp_min(0)).unsqueeze(-1)
    seen_user = torch.from_numpy(users.seen.owners)
    seen_row = torch.from_numpy(users.seen.values).long()
    num_ahead_BM = torch.zeros_like(targets_BM)
    for first in range(0, num_items, ITEM_TILE):
        rows_N = torch.arange(first, min(first + ITEM_TILE, num_items))
        scores_B1N = score(rows_N).expand(len(users), -1).clone().unsqueeze(1)
        is_here = (seen_row >= first) & (seen_row < first + ITEM_TILE)
        scores_B1N[seen_user[is_here], 0, seen_row[is_here] - first] = -torch.inf
        is_tied_BMN = (scores_B1N == scores_BM1) & (rows_N > targets_BM.unsqueeze(-1))
        # false where a score is not a number
        is_behind_BMN = (scores_B1N < scores_BM1) | is_tied_BMN
        # An item is not ahead of itself, though its two scores may differ by rounding.
        is_behind_BMN |= (rows_N == targets_BM.unsqueeze(-1)) & scores_BM1.isfinite()
        num_ahead_BM += (~is_behind_BMN).sum(dim=-1)
    return num_ahead_BM.masked_fill(targets_BM == NO_ITEM, -1)


def _sums(num_ahead_BM: Tensor, cutoff: int) -> RankingSums:
    """The sums of users with these numbers of items ahead of their held-out items, of which each has at least one.

    NDCG: the gain 1/log2(1 + rank) of the items within the cutoff, over that of the best list.
    """
    is_hit_BM = (num_ahead_BM >= 0) & (num_ahead_BM < cutoff)
    gains = 1.0 / torch.arange(2, cutoff + 2, dtype=torch.float64).log2()
    gain_B = gains[num_ahead_BM.clamp(0, cutoff - 1)].where(is_hit_BM, 0.0).sum(dim=1)
    num_held_out_B = (num_ahead_BM >= 0).sum(dim=1)
    best_B = gains.cumsum(0)[num_held_out_B.clamp_max(cutoff) - 1]
    return RankingSums(float(is_hit_BM.any(dim=1).sum()), float((gain_B / best_B).sum()))
