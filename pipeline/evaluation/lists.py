"""What lists are like, whether or not they hit: how unknown their items are, and how much these differ.

A ranked list is int rows (B, K) padded with -1; N items, E embedding.
"""

import numpy as np
from numpy.typing import NDArray

from pipeline.data.lists import NO_ITEM, Int64
from pipeline.evaluation.metrics import Floats, Rows


def novelty(ranked_BK: Rows, popularity_N: Int64) -> Floats:
    """(lists with an item,): the mean of -log2 of the items' shares of all events, in bits (self-information; Zhou et
    al. 2010). Each item counts one event more than it has, so that none has a share of 0."""
    bits_N = -np.log2((popularity_N + 1) / (popularity_N.sum() + len(popularity_N)))
    is_item_BK = ranked_BK != NO_ITEM
    sums_B = np.where(is_item_BK, bits_N[ranked_BK], 0.0).sum(axis=1)
    lengths_B = is_item_BK.sum(axis=1)
    return np.asarray(sums_B[lengths_B > 0] / lengths_B[lengths_B > 0])


def intra_list_distance(ranked_BK: Rows, vectors_NE: NDArray[np.float32]) -> Floats:
    """(lists with two items,): the mean of 1 - cosine over all pairs of a list's items, halved, so that it is between 0
    and 1 (intra-list distance; Ziegler et al. 2005). A vector of 0 is at a right angle to all others."""
    is_item_BK = ranked_BK != NO_ITEM
    lengths_B = is_item_BK.sum(axis=1)
    chosen = lengths_B >= 2
    is_item_BK, lengths_B = is_item_BK[chosen], lengths_B[chosen]
    vectors_BKE = vectors_NE[ranked_BK[chosen]].astype(np.float64)
    norms_BK1 = np.linalg.norm(vectors_BKE, axis=2, keepdims=True)
    units_BKE = vectors_BKE / np.where(norms_BK1 > 0, norms_BK1, 1.0) * is_item_BK[:, :, None]
    # The square of the sum has each pair twice, and each vector with itself.
    squares_B = np.square(units_BKE.sum(axis=1)).sum(axis=1) - np.square(units_BKE).sum(axis=(1, 2))
    return np.asarray((1.0 - squares_B / (lengths_B * (lengths_B - 1))) / 2.0)
