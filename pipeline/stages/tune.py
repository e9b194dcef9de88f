"""Choosing tonight's search, on one shard, with a sample of tonight's users."""

import numpy as np
import pyarrow as pa

from pipeline.artifacts import Night
from pipeline.data.histories import Bucket
from pipeline.errors import InputError
from pipeline.io.checkpoint import load_model
from pipeline.io.corpus import open_corpus, read_low_rank, read_shard, shard_entries
from pipeline.io.histories import read_bucket
from pipeline.io.storage import open_storage
from pipeline.io.storage.base import Storage
from pipeline.io.tuning import write_tuning
from pipeline.model.mol import QuerySide
from pipeline.retrieval.backends import open_index
from pipeline.retrieval.filters import Exclusions
from pipeline.retrieval.index import ShardIndex
from pipeline.retrieval.tuning import tune
from pipeline.settings import Settings, TableDtype
from pipeline.stages.devices import device_for
from pipeline.stages.low_rank import judging_users
from pipeline.stages.queries import Requested
from pipeline.stages.query_batch import QueryBatch
from pipeline.stages.search import encode_queries


class Tuner:
    """Holds one shard, drawn by the seed, and tries every algorithm on it."""

    def __init__(self, storage_uri: str, night: Night, settings: Settings) -> None:
        self._storage, self._night, self._settings = open_storage(storage_uri), night, settings
        self._device = device_for(settings.cluster)

    def __call__(self, unit: int, payload: bytes) -> bytes:
        """Nothing comes in or goes out but the choice; the unit is not used."""
        storage, night, search = self._storage, self._night, self._settings.search
        entries = shard_entries(open_corpus(storage, night.corpus))
        rng = np.random.default_rng(search.tuning.seed)
        entry = entries[rng.choice(len(entries), p=np.array([e.rows for e in entries]) / sum(e.rows for e in entries))]
        model = load_model(storage, night.checkpoint)
        batches = judging_batches(storage, night, self._settings)
        queries = QuerySide.cat([batch.queries for batch in batches]).to(self._device)
        shard = read_shard(storage, night.corpus, entry).to(self._device)
        mol = model.mol.to(self._device)

        def open_with(table_dtype: TableDtype) -> ShardIndex:
            return open_index(mol, shard, search.model_copy(update={"table_dtype": table_dtype}))

        fit = read_low_rank(storage, night.corpus)
        query_map = fit.query_map.to(self._device) if fit else None
        # All of a list's items may be in one shard: items with neighbouring ids are often alike.
        wanted = search.model_copy(update={"k": min(search.k, entry.rows)})
        excluded = _joined([batch.excluded for batch in batches])
        write_tuning(storage, night, tune(open_with, queries, excluded, wanted, query_map, search.tuning.max_seconds))
        return payload


class JudgingUsers:
    """Users that no fit has seen, with the whole history: a `QuerySource`."""

    part = "whole"

    def __init__(self, num_users: int, seed: int) -> None:
        self._num_users, self._seed = num_users, seed

    def select(self, unit: int, bucket: Bucket) -> Requested:
        at = np.sort(judging_users(bucket, self._seed)[: self._num_users])
        return Requested(bucket.user_ids.take(pa.array(at)), at)


def judging_batches(storage: Storage, night: Night, settings: Settings) -> list[QueryBatch]:
    """Batches of tonight's users, up to `search.tuning.num_queries` queries in all, with what they have seen."""
    model, missing = load_model(storage, night.checkpoint), settings.search.tuning.num_queries
    batches: list[QueryBatch] = []
    for unit in reversed(range(settings.output.num_buckets)):
        if missing <= 0:
            break
        source = JudgingUsers(missing, settings.corpus.low_rank.seed)
        batch = encode_queries(model, read_bucket(storage, night.histories, unit), source, unit)
        batches.append(batch)
        missing -= len(batch.excluded)
    if not sum(len(batch.excluded) for batch in batches):
        raise InputError("there is no user to choose the search with; set search.method to exact")
    return batches


def _joined(parts: list[Exclusions]) -> Exclusions:
    lengths = np.concatenate([np.diff(part.offsets) for part in parts])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Exclusions(offsets, np.concatenate([part.rows for part in parts]))
