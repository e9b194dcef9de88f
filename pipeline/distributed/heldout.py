"""The parts of an evaluation that run inside a search: who asks, what a unit's lists are worth, and the audit."""

from collections.abc import Sequence

import numpy as np
import torch

from pipeline.artifacts import FileEntry, Night
from pipeline.data.interactions import Bucket
from pipeline.distributed.batches import QueryBatch
from pipeline.distributed.queries import Requested, take_sequences
from pipeline.distributed.stages import encode_queries, seen_items
from pipeline.errors import InputError, MismatchError
from pipeline.io.checkpoint import load_model
from pipeline.io.corpus import read_shard
from pipeline.io.evaluations import (
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
from pipeline.io.storage import Storage, open_storage
from pipeline.retrieval.evaluation import (
    brute_force,
    evaluable_users,
    held_out_targets,
    rank_by_popularity,
    sampling_keys,
)
from pipeline.retrieval.metrics import MeanSum, Rows, measured_cutoffs, overlap_at_k, ranking_sums
from pipeline.retrieval.topk import NO_ITEM, TopK
from pipeline.settings import Settings


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
        seen = seen_items(take_sequences(bucket.cut(HeldOutUsers.part), requested.at), len(self._popularity_N))
        popular_BK = rank_by_popularity(self._popularity_N, seen, search)
        targets = held_out_targets(bucket).take(requested.at)
        cutoffs = measured_cutoffs(self._settings.evaluate.cutoffs, search.k)
        is_audited = np.isin(requested.at, self._audited.select(unit, bucket).at)
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


class AuditSink:
    """Compares the lists that were evaluated with those of exact search for the same users."""

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


class KeySampler:
    """Draws for the sample: the sampling keys of a unit's evaluable users."""

    def __init__(self, storage_uri: str, night: Night, settings: Settings) -> None:
        self._storage, self._night, self._settings = open_storage(storage_uri), night, settings.evaluate

    def __call__(self, unit: int, payload: bytes) -> bytes:
        """uint64 numbers: the evaluable users, those without history, and the smallest keys, ascending."""
        bucket = read_bucket(self._storage, self._night.histories, unit)
        at, num_without_history = evaluable_users(bucket)
        keys = np.sort(sampling_keys(bucket.user_keys[at], self._settings.seed))[: self._settings.max_queries]
        return np.concatenate([np.array([len(at), num_without_history], dtype=np.uint64), keys]).tobytes()


class BruteForcer:
    """Audits an exact search: the same queries again, every pair in float64, sorted the plain way."""

    def __init__(self, storage_uri: str, night: Night, settings: Settings, entries: Sequence[FileEntry]) -> None:
        self._storage, self._night, self._k = open_storage(storage_uri), night, settings.search.k
        self._entries = entries
        self._model = load_model(self._storage, night.checkpoint)
        self._users = AuditedUsers(storage_uri, night, settings)
        self._sink = AuditSink(storage_uri, night, settings)

    def __call__(self, unit: int, payload: bytes) -> bytes:
        bucket = read_bucket(self._storage, self._night.histories, unit)
        batch = encode_queries(self._model, bucket, self._users, unit)
        shards = (read_shard(self._storage, self._night.corpus, entry) for entry in self._entries)
        scores_BK, rows_BK = brute_force(self._model.mol, batch.queries, shards, batch.excluded, self._k)
        self._sink.write(unit, batch, TopK(torch.from_numpy(scores_BK), torch.from_numpy(rows_BK)))
        return payload


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
