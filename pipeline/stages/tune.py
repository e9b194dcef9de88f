"""Choosing tonight's search: one unit of work, on one shard, with a sample of tonight's users."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.data.histories import Bucket
from pipeline.data.lists import Lists
from pipeline.errors import InputError
from pipeline.io.checkpoint import load_model
from pipeline.io.corpus import open_corpus, read_low_rank, read_shard, shard_entries
from pipeline.io.histories import read_bucket
from pipeline.io.night import Night
from pipeline.io.tuning import TuningRecord, tuning_claims, write_tuning
from pipeline.model.mol import QuerySide
from pipeline.retrieval.backends import open_index
from pipeline.retrieval.filters import Rules
from pipeline.retrieval.index import ShardIndex
from pipeline.retrieval.tuning import SampleQueries, tune
from pipeline.settings import Settings, TableDtype
from pipeline.stages.devices import device_for
from pipeline.stages.encode import encode_queries
from pipeline.stages.low_rank import SEED, judging_users
from pipeline.stages.queries import Requested
from pipeline.stages.query_batch import QueryBatch
from pipeline.stages.runner import Actors, Payload, Runner, Stage


def tune_search(runner: Runner, night: Night, settings: Settings) -> TuningRecord:
    """Measure and choose, or take up what was chosen. Raises InputError when there is no corpus."""
    claims = tuning_claims(night)
    known = claims.read(0)
    if known is not None:
        return known
    open_corpus(night.storage, night.corpus)
    tuner = Stage(Tuner, {"night": night, "settings": settings}, Actors.ONE, needs_gpu=True)
    runner.run_chain("choose a search", [0], [tuner])
    return claims.require(0, "run jobs/tune.py again")


class Tuner:
    """Holds one shard, drawn by the seed, and tries every algorithm on it."""

    def __init__(self, night: Night, settings: Settings) -> None:
        self._night, self._settings = night, settings
        self._device = device_for(settings.cluster)

    def __call__(self, unit: int, payload: Payload) -> Payload:
        """Nothing comes in or goes out but the choice; the unit is not used."""
        night, search = self._night, self._settings.search
        storage = night.storage
        entries = shard_entries(open_corpus(storage, night.corpus))
        rng = np.random.default_rng(SEED)
        entry = entries[rng.choice(len(entries), p=np.array([e.rows for e in entries]) / sum(e.rows for e in entries))]
        model = load_model(storage, night.checkpoint)
        batches = judging_batches(night, self._settings)
        queries = QuerySide.cat([batch.queries for batch in batches]).to(self._device)
        shard = read_shard(storage, night.corpus, entry).to(self._device)
        mol = model.mol.to(self._device)

        def open_with(table_dtype: TableDtype) -> ShardIndex:
            return open_index(mol, shard, search.model_copy(update={"table_dtype": table_dtype}))

        fit = read_low_rank(storage, night.corpus)
        query_map = fit.query_map.to(self._device) if fit else None
        # All of a list's items may be in one shard: items with neighbouring ids are often alike.
        wanted = search.model_copy(update={"k": min(search.k, entry.rows)})
        rules = Rules(Lists.concat(batch.excluded for batch in batches))
        sample = SampleQueries(queries, rules, query_map)
        write_tuning(night, tune(open_with, sample, wanted, search.tuning.max_seconds))
        return payload


@dataclass(frozen=True)
class JudgingUsers:
    """Users that no fit has seen, with the whole history: a `QuerySource`."""

    num_users: int
    part: str = "whole"

    def select(self, unit: int, bucket: Bucket) -> Requested:
        at = np.sort(judging_users(bucket)[: self.num_users])
        return Requested(bucket.user_ids.take(pa.array(at)), at)


def judging_batches(night: Night, settings: Settings) -> list[QueryBatch]:
    """Batches of tonight's users, up to `search.tuning.num_queries` queries in all, with what they have seen."""
    model, missing = load_model(night.storage, night.checkpoint), settings.search.tuning.num_queries
    batches: list[QueryBatch] = []
    for unit in reversed(range(settings.output.num_buckets)):
        if missing <= 0:
            break
        source = JudgingUsers(missing)
        batch = encode_queries(model, read_bucket(night.storage, night.histories, unit), source, unit)
        batches.append(batch)
        missing -= len(batch.excluded)
    if not sum(len(batch.excluded) for batch in batches):
        raise InputError("there is no user to choose the search with; set search.method to exact")
    return batches
