"""Ranking by item-to-item counts, a floor that knows only which item follows which. B queries, N items, K kept."""

import numpy as np

from pipeline.data.columns import Mask
from pipeline.data.lists import Int64, Lists
from pipeline.data.neighbours import QUERIES_AT_ONCE, Neighbours, best_of, score_by_counts
from pipeline.evaluation.popularity import rank_by_popularity


def rank_by_counts(
    neighbours: Neighbours, histories: Lists, excluded: Lists, k: int, is_eligible_N: Mask, popularity_N: Int64
) -> Int64:
    """(B, K) item rows: for each query the k best items by `score_by_counts`, ties by row; none of them is excluded or
    not eligible. Where fewer than k items have a score, the list goes on with the most popular of the others."""
    ranked_BK = np.empty((len(histories), k), dtype=np.int64)
    for start in range(0, len(histories), QUERIES_AT_ONCE):
        stop = min(start + QUERIES_AT_ONCE, len(histories))
        scored, hidden = score_by_counts(neighbours, histories.narrow(start, stop)), excluded.narrow(start, stop)
        best = best_of(scored.where(is_eligible_N[scored.items.values] & ~scored.items.is_in(hidden)), k).items
        ranked_BK[start:stop], num_scored_B = best.last(k)
        short = np.flatnonzero(num_scored_B < k)
        others_BK = rank_by_popularity(popularity_N, hidden.take(short).union(best.take(short)), k, is_eligible_N)
        places_K, num_scored_B1 = np.arange(k), num_scored_B[:, None]
        ranked_BK[start:stop][places_K >= num_scored_B1] = others_BK[places_K < k - num_scored_B1[short]]
    return ranked_BK
