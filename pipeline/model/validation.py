"""Validation: hits among all items on held-out events, to choose the best epoch.

Shapes: B queries, N items of a tile, M held-out items of a query.
"""

from collections.abc import Callable

import numpy as np
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


@torch.no_grad()
def count_model_hits(model: RetrievalModel, users: ValidationUsers, k: int) -> int:
    """Number of users with a held-out item among the k best items that they have not seen."""
    model.eval()
    hits = 0
    for tile in users.tiles(QUERY_TILE):
        rows_BL, _ = tile.histories.last(model.settings.max_length)
        events = Events(torch.from_numpy(rows_BL).to(model.device))
        query = model.query_side(QueryInput(events, torch.from_numpy(tile.user_keys).to(model.device)))
        hits += _count_hits(_model_score(model, query), tile, model.num_items, k)
    return hits


@torch.no_grad()
def count_popular_hits(item_counts: Tensor, users: ValidationUsers, k: int) -> int:
    """Number of users with a held-out item among the k items with the highest counts that they have not seen."""
    counts = item_counts.double()

    def score(rows: Tensor) -> Tensor:
        return counts[rows]

    return sum(_count_hits(score, tile, len(counts), k) for tile in users.tiles(QUERY_TILE))


def _model_score(model: RetrievalModel, query: QuerySide) -> Score:
    def score(rows: Tensor) -> Tensor:
        items = model.item_side(rows.to(query.gate_BP.device))
        scores: Tensor = model.mol(query, items) if rows.dim() == 1 else model.mol(query.alone(), items).squeeze(1)
        return scores.cpu()

    return score


def _count_hits(score: Score, users: ValidationUsers, num_items: int, k: int) -> int:
    """Number of users whose best held-out item has fewer than k unseen items ahead of it; of equal scores the lower
    item row is ahead."""
    targets_BM = torch.from_numpy(users.held_out.last(int(users.held_out.lengths.max()))[0]).long()
    scores_BM = score(targets_BM.clamp_min(0)).masked_fill(targets_BM == NO_ITEM, float("-inf"))
    best_B1 = scores_BM.amax(dim=1, keepdim=True)
    row_B1 = torch.where(scores_BM == best_B1, targets_BM, num_items).amin(dim=1, keepdim=True)
    hidden_user, hidden_row = _pairs(users)
    num_ahead_B = torch.zeros(len(users), dtype=torch.int64)
    for first in range(0, num_items, ITEM_TILE):
        rows_N = torch.arange(first, min(first + ITEM_TILE, num_items))
        scores_BN = score(rows_N)
        is_ahead_BN = (scores_BN > best_B1) | ((scores_BN == best_B1) & (rows_N < row_B1))
        is_here = (hidden_row >= first) & (hidden_row < first + ITEM_TILE)
        is_ahead_BN[hidden_user[is_here], hidden_row[is_here] - first] = False
        num_ahead_B += is_ahead_BN.sum(dim=1)
    return int((num_ahead_B < k).sum())


def _pairs(users: ValidationUsers) -> tuple[Tensor, Tensor]:
    """Users and item rows of the pairs that are not counted as ahead: items seen, and the held-out items themselves."""
    parts = (users.histories, users.held_out)
    owner = np.concatenate([part.owners for part in parts])
    rows = np.concatenate([part.values for part in parts])
    return torch.from_numpy(owner), torch.from_numpy(rows).long()
