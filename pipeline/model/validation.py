"""Hit rate over the full corpus on held-out events, for choosing the best epoch.

Shapes: B queries, N items of a tile, M held-out items of a query.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from pipeline.data.batches import ValidationUsers
from pipeline.data.lists import NO_ITEM
from pipeline.model.model import RetrievalModel
from pipeline.model.mol import QuerySide

QUERY_TILE = 128
ITEM_TILE = 128

# From item rows, (N,) shared by the queries or (B, M) of their own, to scores, (B, N) or, the same for all, (N,).
Score = Callable[[Tensor], Tensor]


@torch.no_grad()
def count_model_hits(model: RetrievalModel, users: ValidationUsers, k: int) -> int:
    """How many of these users have a held-out item among the k best that they have not seen."""
    model.eval()
    device = model.item_embedding.weight.device
    hits = 0
    for tile in users.tiles(QUERY_TILE):
        rows_BL, lengths_B = tile.histories.last(model.settings.max_length)
        inputs = (torch.from_numpy(array).to(device) for array in (rows_BL, lengths_B, tile.user_keys))
        hits += _count_hits(_model_score(model, model.query_side(*inputs)), tile, model.num_items, k)
    return hits


@torch.no_grad()
def count_popular_hits(item_counts: Tensor, users: ValidationUsers, k: int) -> int:
    """The same when everyone is shown the items with the highest counts."""
    counts = item_counts.double()

    def score(rows: Tensor) -> Tensor:
        return counts[rows]

    return sum(_count_hits(score, tile, len(counts), k) for tile in users.tiles(QUERY_TILE))


def _model_score(model: RetrievalModel, query: QuerySide) -> Score:
    single = QuerySide(query.components_BQD.unsqueeze(1), query.gate_BP.unsqueeze(1))

    def score(rows: Tensor) -> Tensor:
        items = model.item_side(rows.to(query.gate_BP.device))
        scores: Tensor = model.mol(query, items) if rows.dim() == 1 else model.mol(single, items).squeeze(1)
        return scores.cpu()

    return score


def _count_hits(score: Score, users: ValidationUsers, num_items: int, k: int) -> int:
    """Users with fewer than k unseen items ahead of the best of their held-out ones; ties go to the lower row."""
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
    """(user, item row) of all that must not be counted: what a user has seen, and the held-out items themselves."""
    parts = (users.histories, users.held_out)
    owner = np.concatenate([part.owners for part in parts])
    rows = np.concatenate([part.values for part in parts])
    return torch.from_numpy(owner), torch.from_numpy(rows).long()
