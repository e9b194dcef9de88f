"""The parts of an evaluation that run inside a search: who asks, what a unit's lists are worth, and the audit."""

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.artifacts import Night
from pipeline.data.histories import Bucket
from pipeline.data.lists import NO_ITEM, Int64
from pipeline.errors import InputError, MismatchError
from pipeline.evaluation.metrics import MeanSum, Rows, measured_cutoffs, overlap_at_k, ranking_sums
from pipeline.evaluation.popularity import rank_by_popularity
from pipeline.evaluation.targets import evaluable_users, held_out_targets, sampling_keys
from pipeline.io.checkpoint import load_model
from pipeline.io.corpus import open_corpus, read_shard, shard_entries
from pipeline.io.evaluation import (
    Exposure,
    Sample,
    UnitOverlap,
    UnitScores,
    read_sample,
    read_scores,
    write_overlap,
    write_scores,
)
from pipeline.io.histories import read_bucket, read_items
from pipeline.io.storage import open_storage
from pipeline.io.storage.base import Storage
from pipeline.retrieval.brute_force import brute_force
from pipeline.retrieval.filters import Rules
from pipeline.retrieval.topk import TopK
from pipeline.settings import Settings
from pipeline.stages.queries import Requested
from pipeline.stages.query_batch import QueryBatch


class HeldOutUsers:
    """The sampled users with held-out events, each with the history before those."""

    part = "before_test"

    def __init__(self, storage_uri: str, night: Night, settings: Settings) -> None:
        self.sample = require_sample(open_storage(storage_uri), night)
        self._seed = settings.evaluate.seed

    def select(self, unit: int, bucket: Bucket) -> Requested:
        return self._up_to(bucket, self.sample.query_threshold)

    def _up_to(self, bucket: Bucket, threshold: int) -> Requested:
        at, _ = evaluable_users(bucket)
        at = at[sampling_keys(bucket.user_keys[at], self._seed) <= np.uint64(threshold)]
        return Requested(bucket.user_ids.take(at), at)


class AuditedUsers(HeldOutUsers):
    """Those of them whose lists are compared with exact search."""

    def select(self, unit: int, bucket: Bucket) -> Requested:
        if unit not in self.sample.audit_units:
            return Requested(bucket.user_ids.slice(0, 0), np.empty(0, dtype=np.int64))
        return self._up_to(bucket, self.sample.audit_threshold)


class EvaluationSink:
    """Compares a unit's lists with what was held out, beside popularity's lists, and keeps the sums."""

    def __init__(self, storage_uri: str, night: Night, settings: Settings) -> None:
        self._storage, self._night, self._settings = open_storage(storage_uri), night, settings
        self._users = HeldOutUsers(storage_uri, night, settings)
        self._audited = AuditedUsers(storage_uri, night, settings)
        items = read_items(self._storage, night.histories)
        counts = (items[name].to_numpy() for name in ("num_train_events", "num_validation_events"))
        self._popularity_N = sum(counts, start=np.zeros(items.num_rows, dtype=np.int64))

    def write(self, unit: int, batch: QueryBatch, found: TopK) -> dict[str, float]:
        search = self._settings.search
        bucket = read_bucket(self._storage, self._night.histories, unit)
        requested = self._users.select(unit, bucket)
        # A user whose query could not be made is asked for all the same, and counts as a miss.
        ranked_BK = np.full((len(requested.at), search.k), NO_ITEM, dtype=np.int64)
        ranked_BK[batch.searched] = found.rows_BK.numpy()
        seen = bucket.cut(HeldOutUsers.part).take(requested.at)
        popular_BK = rank_by_popularity(self._popularity_N, seen, search.k)
        targets = held_out_targets(bucket).take(requested.at)
        cutoffs = measured_cutoffs(self._settings.evaluate.cutoffs, search.k)
        is_audited = np.isin(requested.at, self._audited.select(unit, bucket).at)
        if search.is_exact and is_audited.any():
            # Before the scores, so that a unit that is done was verified too.
            self._verify(unit, batch, ranked_BK, is_audited)
        scores = UnitScores(
            unit=unit,
            queries=len(requested.at),
            model=ranking_sums(ranked_BK, targets, cutoffs),
            popularity=ranking_sums(popular_BK, targets, cutoffs),
            exposure=expose(ranked_BK, popular_BK),
            audited=ranked_BK[is_audited].tolist(),
        )
        write_scores(self._storage, self._night.evaluation, scores)
        return {"queries": scores.queries}

    def _verify(self, unit: int, batch: QueryBatch, ranked_BK: Int64, is_audited: NDArray[np.bool_]) -> None:
        """Hold an exact search against brute force: every pair in float64, everything sorted."""
        of_query = np.flatnonzero(is_audited[batch.searched])
        shards = (
            read_shard(self._storage, self._night.corpus, entry)
            for entry in shard_entries(open_corpus(self._storage, self._night.corpus))
        )
        mol = load_model(self._storage, self._night.checkpoint).mol
        queries = batch.queries.take(torch.from_numpy(of_query))
        k = self._settings.search.k
        _, exact_BK = brute_force(mol, queries, shards, Rules(batch.excluded.take(of_query)), k)
        overlap = MeanSum.of(overlap_at_k(ranked_BK[batch.searched[of_query]], exact_BK, k))
        write_overlap(self._storage, self._night.evaluation, UnitOverlap(unit=unit, overlap=overlap))


class AuditSink:
    """Compares the lists of an approximate search with those of exact search for the same users."""

    def __init__(self, storage_uri: str, night: Night, settings: Settings) -> None:
        self._storage, self._night, self._k = open_storage(storage_uri), night, settings.search.k

    def write(self, unit: int, batch: QueryBatch, found: TopK) -> dict[str, float]:
        (scores,) = read_scores(self._storage, self._night.evaluation, [unit])
        exact_BK = np.full((len(batch.user_ids), self._k), NO_ITEM, dtype=np.int64)
        exact_BK[batch.searched] = found.rows_BK.numpy()
        if len(scores.audited) != len(exact_BK):
            raise MismatchError(
                f"unit {unit}: {len(scores.audited)} lists were kept for the audit, but {len(exact_BK)} users are "
                f"audited; remove {self._storage.uri}/{self._night.evaluation.prefix} to evaluate again"
            )
        audited_BK = np.array(scores.audited, dtype=np.int64).reshape(exact_BK.shape)
        overlap = MeanSum.of(overlap_at_k(audited_BK, exact_BK, self._k))
        write_overlap(self._storage, self._night.evaluation, UnitOverlap(unit=unit, overlap=overlap))
        return {"queries": overlap.count}


def expose(model_BK: Rows, popular_BK: Rows) -> Exposure:
    """In how many lists of either kind each item is; items in none are left out."""
    rows = np.union1d(model_BK, popular_BK)
    rows = rows[rows != NO_ITEM]
    counted = {}
    for name, ranked_BK in (("model", model_BK), ("popularity", popular_BK)):
        shown = np.searchsorted(rows, ranked_BK[ranked_BK != NO_ITEM])
        counted[name] = np.bincount(shown, minlength=len(rows)).tolist()
    return Exposure(item_rows=rows.tolist(), **counted)


def require_sample(storage: Storage, night: Night) -> Sample:
    """The sample that was drawn before the search."""
    sample = read_sample(storage, night.evaluation)
    if sample is None:
        raise InputError(f"{storage.uri}/{night.evaluation.prefix}: no sample was drawn; run jobs/evaluate.py")
    return sample
