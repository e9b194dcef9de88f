"""Ranking by popularity, the floor that every model is held against. B queries, N items, K kept."""

from itertools import pairwise

import numpy as np

from pipeline.data.lists import Int64
from pipeline.retrieval.filters import Exclusions
from pipeline.retrieval.topk import NO_ITEM


def rank_by_popularity(counts_N: Int64, excluded: Exclusions, k: int) -> Int64:
    """(B, K) item rows: for each query the k items with the most events that are not excluded, ties by row.

    In the order of popularity the i-th item that is left has place i + the number of excluded places before it.
    """
    row_of_place = np.lexsort((np.arange(len(counts_N)), -counts_N))
    place_of_row = np.argsort(row_of_place)
    places_BK = np.full((len(excluded), k), len(counts_N), dtype=np.int64)
    for query, (low, high) in enumerate(pairwise(excluded.offsets)):
        hidden = np.unique(place_of_row[excluded.rows[low:high]])
        num_before = np.searchsorted(hidden - np.arange(len(hidden)), np.arange(k), side="right")
        places_BK[query] = np.arange(k) + num_before
    return np.append(row_of_place, NO_ITEM)[np.minimum(places_BK, len(counts_N))]
