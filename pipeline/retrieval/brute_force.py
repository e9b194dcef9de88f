"""The oracle that a search is compared with: exact search, the plain way. B queries, N items, K kept."""

import copy
from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.data.lists import NO_ITEM, Int64
from pipeline.model.mol import MixtureOfLogits, QuerySide
from pipeline.retrieval.filters import Rules
from pipeline.retrieval.shard import Shard

ORACLE_TILE = 4_096  # items that the oracle scores at once


@torch.inference_mode()
def brute_force(
    mol: MixtureOfLogits, queries: QuerySide, shards: Iterable[Shard], rules: Rules, k: int
) -> tuple[NDArray[np.float32], Int64]:
    """Scores and item rows (B, K) of exact search, the plain way: every pair in float64, everything sorted.

    Shares nothing with the search but the model. Meant for a handful of queries: a shard takes B × N × 12 bytes.
    """
    mol64 = copy.deepcopy(mol).double()
    queries64 = queries.to(torch.float64)
    best_BK = np.full((len(rules), k), -np.inf, dtype=np.float32)
    rows_BK = np.full((len(rules), k), NO_ITEM, dtype=np.int64)
    for shard in shards:
        scores_BN = _scores(mol64, queries64, shard)
        end = shard.first_row + len(shard)
        has_bonus_BN = np.zeros(scores_BN.shape, dtype=bool)
        if rules.bonuses is not None:
            bonuses = rules.bonuses.within(shard.first_row, end)
            scores_BN[bonuses.rows.owners, bonuses.rows.values] += bonuses.amounts
            has_bonus_BN[bonuses.rows.owners, bonuses.rows.values] = True
        if rules.needs_bonus_N is not None:
            scores_BN[rules.needs_bonus_N.numpy()[shard.first_row : end] & ~has_bonus_BN] = -np.inf
        if rules.eligibility is not None:
            masks = [rules.eligibility.is_eligible_GN[int(group)].numpy() for group in rules.eligibility.group_of_B]
            is_eligible_BN = np.array(masks, dtype=bool).reshape(len(masks), -1)
            scores_BN[~is_eligible_BN[:, shard.first_row : end]] = -np.inf
        excluded = rules.excluded.within(shard.first_row, end)
        scores_BN[excluded.owners, excluded.values] = -np.inf
        shard_rows = np.broadcast_to(shard.first_row + np.arange(len(shard)), scores_BN.shape)
        all_scores, all_rows = np.hstack([best_BK, scores_BN]), np.hstack([rows_BK, shard_rows])
        order_BK = np.lexsort((all_rows, -all_scores), axis=1)[:, :k]
        best_BK = np.take_along_axis(all_scores, order_BK, axis=1)
        rows_BK = np.take_along_axis(all_rows, order_BK, axis=1)
        rows_BK = np.where(best_BK > -np.inf, rows_BK, NO_ITEM)
    return best_BK, rows_BK


def _scores(mol64: MixtureOfLogits, queries64: QuerySide, shard: Shard) -> NDArray[np.float32]:
    """Score all pairs (B, N), rounded once to float32, as published scores without a bonus are."""
    tiles = [np.empty((len(queries64.components_BQD), 0), dtype=np.float32)]
    for low in range(0, len(shard), ORACLE_TILE):
        tile = slice(low, low + ORACLE_TILE)
        items = shard.items.take(tile).to(torch.float64)
        tiles.append(mol64(queries64, items).float().numpy())
    return np.concatenate(tiles, axis=1)
