"""What an evaluation asks and compares with: held-out targets, a seeded sample, popularity and a brute-force oracle.

B queries, N items, K kept, U users of a bucket.
"""

import copy
from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.data.interactions import Bucket, Int64, Sequences, offsets_of
from pipeline.model.mol import ItemSide, MixtureOfLogits, QuerySide
from pipeline.retrieval.filters import Exclusions
from pipeline.retrieval.metrics import Targets
from pipeline.retrieval.search import PopularityScorer, search_items
from pipeline.retrieval.shard import Shard
from pipeline.retrieval.topk import NO_ITEM
from pipeline.settings import SearchSettings

ORACLE_TILE = 4_096  # items that the oracle scores at once
# Exact up to 2^24: popularity is scored by place, so that no two items tie and the scan need not look further.
MAX_PLACES = 1 << 24


def held_out_targets(bucket: Bucket) -> Targets:
    """(U users): the distinct items of each user's test events that are not in the history before the test.

    An item seen before is excluded from every list, so it could not be found and is no target. A user may have none.
    """
    test, visible = bucket.held_out("test"), bucket.cut("before_test")
    span = 1 + int(bucket.item_rows.max(initial=0))
    wanted, seen = np.unique(_pairs(test, span)), _pairs(visible, span)
    new = wanted[~np.isin(wanted, seen)]
    counts = np.bincount(new // span, minlength=bucket.num_users).astype(np.int64)
    return Targets(offsets_of(counts), (new % span).astype(np.int32))


def evaluable_users(bucket: Bucket) -> tuple[Int64, int]:
    """The users with a visible event and a target, and how many have a target but no visible event."""
    has_target = held_out_targets(bucket).counts_B > 0
    has_history = bucket.cut("before_test").lengths > 0
    return np.flatnonzero(has_target & has_history), int((has_target & ~has_history).sum())


def sampling_keys(user_keys: Int64, seed: int) -> NDArray[np.uint64]:
    """(U,): a pseudo-random number for each user (splitmix64). The m smallest of all users are a sample of m, whatever
    the buckets and the order in which they are met."""
    mixed = user_keys.astype(np.uint64) + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % (1 << 64))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))


def rank_by_popularity(counts_N: Int64, excluded: Exclusions, settings: SearchSettings) -> Int64:
    """(B, K) item rows: for each query the k items with the most events that are not excluded, ties by row.

    Goes through the same search as the model, over the most popular items only: as many as could ever be needed.
    """
    most_excluded = int(np.diff(excluded.offsets).max(initial=0))
    num_needed = min(len(counts_N), settings.k + most_excluded, MAX_PLACES)
    row_of_place = np.lexsort((np.arange(len(counts_N)), -counts_N))
    place_of_row = np.empty_like(row_of_place)
    place_of_row[row_of_place] = np.arange(len(counts_N))
    by_place = Exclusions(excluded.offsets, place_of_row[excluded.rows].astype(np.int32))
    scorer = PopularityScorer(-torch.arange(num_needed, dtype=torch.float32), num_queries=len(excluded))
    exact = settings.model_copy(update={"method": "exact"})
    places_BK = search_items(scorer, 0, torch.ones(num_needed, dtype=torch.bool), by_place, exact).rows_BK.numpy()
    return np.where(places_BK >= 0, row_of_place[places_BK], NO_ITEM)


@torch.inference_mode()
def brute_force(
    mol: MixtureOfLogits, queries: QuerySide, shards: Iterable[Shard], excluded: Exclusions, k: int
) -> tuple[NDArray[np.float32], Int64]:
    """Scores and item rows (B, K) of exact search, the plain way: every pair in float64, everything sorted.

    Shares nothing with the search but the model. For a handful of queries: a shard takes B × N × 12 bytes.
    """
    mol64 = copy.deepcopy(mol).double()
    queries64 = QuerySide(queries.components_BQD.double(), queries.gate_BP.double())
    num_queries = len(excluded)
    best_BK = np.full((num_queries, k), -np.inf, dtype=np.float32)
    rows_BK = np.full((num_queries, k), NO_ITEM, dtype=np.int64)
    for shard in shards:
        scores_BN = _scores(mol64, queries64, shard)
        scores_BN[:, ~shard.is_eligible_N.numpy()] = -np.inf
        of_query = np.repeat(np.arange(num_queries), np.diff(excluded.offsets))
        at = excluded.rows.astype(np.int64) - shard.first_row
        inside = (at >= 0) & (at < len(shard))
        scores_BN[of_query[inside], at[inside]] = -np.inf
        shard_rows = np.broadcast_to(shard.first_row + np.arange(len(shard)), scores_BN.shape)
        all_scores, all_rows = np.hstack([best_BK, scores_BN]), np.hstack([rows_BK, shard_rows])
        order_BK = np.lexsort((all_rows, -all_scores), axis=1)[:, :k]
        best_BK = np.take_along_axis(all_scores, order_BK, axis=1)
        rows_BK = np.take_along_axis(all_rows, order_BK, axis=1)
        rows_BK = np.where(best_BK > -np.inf, rows_BK, NO_ITEM)
    return best_BK, rows_BK


def _scores(mol64: MixtureOfLogits, queries64: QuerySide, shard: Shard) -> NDArray[np.float32]:
    """(B, N): rounded once to float32, as published scores are."""
    tiles = [np.empty((len(queries64.components_BQD), 0), dtype=np.float32)]
    for low in range(0, len(shard), ORACLE_TILE):
        tile = slice(low, low + ORACLE_TILE)
        items = ItemSide(shard.items.components_NXD[tile].double(), shard.items.gate_NP[tile].double())
        tiles.append(mol64(queries64, items).float().numpy())
    return np.concatenate(tiles, axis=1)


def _pairs(sequences: Sequences, span: int) -> Int64:
    users = np.repeat(np.arange(len(sequences.lengths), dtype=np.int64), sequences.lengths)
    return users * span + sequences.item_rows
