"""Ranking by popularity, the floor that every model is held against. B queries, N items, K kept."""

import numpy as np

from pipeline.data.columns import Mask
from pipeline.data.lists import NO_ITEM, Float32, Int64, Lists


def rank_by_popularity(counts_N: Int64 | Float32, excluded: Lists, k: int, is_eligible_N: Mask) -> Int64:
    """(B, K) item rows: for each query the k eligible items with the most events that are not excluded, ties by row.

    In the order of popularity, the i-th item that is left has as its position i + the number of excluded positions
    before it. Items that are not eligible come last.
    """
    row_of_position = np.lexsort((np.arange(len(counts_N)), -counts_N, ~is_eligible_N))
    position_of_row = np.argsort(row_of_position)
    num_eligible = int(is_eligible_N.sum())
    positions_BK = np.full((len(excluded), k), num_eligible, dtype=np.int64)
    for query in range(len(excluded)):
        hidden = np.unique(position_of_row[excluded[query]])
        num_before = np.searchsorted(hidden - np.arange(len(hidden)), np.arange(k), side="right")
        positions_BK[query] = np.arange(k) + num_before
    return np.append(row_of_position[:num_eligible], NO_ITEM)[np.minimum(positions_BK, num_eligible)]
