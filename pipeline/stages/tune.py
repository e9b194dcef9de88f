"""Choosing tonight's search method, on one shard, with a sample of tonight's users; all of it is one unit of work."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from pipeline.data.histories import Bucket
from pipeline.data.lists import Lists
from pipeline.io.checkpoint import load_model, model_bytes
from pipeline.io.corpus import open_corpus, read_low_rank, read_shard, shard_entries
from pipeline.io.histories import read_bucket
from pipeline.io.night import Night
from pipeline.io.tuning import TuningRecord, are_searches_tried, num_pairs, tuning_claims, write_exact, write_tuning
from pipeline.model.mol import QuerySide
from pipeline.retrieval.backends import open_index
from pipeline.retrieval.bonuses import Bonuses
from pipeline.retrieval.filters import Rules
from pipeline.retrieval.index import ShardIndex
from pipeline.retrieval.tuning import SampleQueries, tune
from pipeline.settings import Settings, TableDtype
from pipeline.stages.devices import device_for, memory_to_hold
from pipeline.stages.encode import encode_queries
from pipeline.stages.low_rank import SEED, judging_users
from pipeline.stages.memory import bonus_source, memory_of_bonuses
from pipeline.stages.queries import Requested
from pipeline.stages.query_batch import QueryBatch, UserRules
from pipeline.stages.rules import TonightsRules
from pipeline.stages.runner import Actors, Payload, Runner, Stage
from pipeline.stages.user_rules import UserRulesSource


def tune_search(runner: Runner, night: Night, settings: Settings) -> TuningRecord:
    """Measure the methods and choose one, unless the choice exists or there are few users and items; return the choice.

    Raises InputError when there is no corpus, and the errors of `Runner.run_chain`.
    """
    claims = tuning_claims(night)
    existing = claims.read(0)
    if existing is not None:
        return existing
    if not are_searches_tried(night, settings):
        reason = f"{num_pairs(night):,} pairs of a user and an item are too few for a choice to pay"
        return write_exact(night, settings, f"{reason} (search.tuning.min_pairs)")
    largest = max((entry.bytes for entry in shard_entries(open_corpus(night.storage, night.corpus))), default=0)
    arguments = {"night": night, "settings": settings}
    memory = memory_to_hold(model_bytes(night), largest) + memory_of_bonuses(night, settings)
    gpus = settings.cluster.gpus_per_actor
    tuner = Stage(Tuner, arguments, Actors.ONE, gpus=gpus, memory=memory, searches=True)
    runner.run_chain("choose a search", [0], [tuner])
    return claims.require(0, "run jobs/tune.py again")


class Tuner:
    """Draws one shard at random, tries every search method on it and writes the choice."""

    def __init__(self, night: Night, settings: Settings) -> None:
        self._night, self._settings = night, settings
        self._device = device_for(settings.cluster.gpus_per_actor)

    def __call__(self, unit: int, payload: Payload) -> Payload:
        """Write the choice; the unit is not used and the payload passes through."""
        night, search = self._night, self._settings.search
        storage = night.storage
        entries = shard_entries(open_corpus(storage, night.corpus))
        rng = np.random.default_rng(SEED)
        entry = entries[rng.choice(len(entries), p=np.array([e.rows for e in entries]) / sum(e.rows for e in entries))]
        model = load_model(storage, night.checkpoint)
        batches = judging_batches(night, self._settings)
        if not any(len(batch.excluded) for batch in batches):
            write_exact(night, self._settings, "there is no user to try searches with")
            return payload
        queries = QuerySide.cat([batch.queries for batch in batches]).to(self._device)
        shard = read_shard(storage, night.corpus, entry).to(self._device)
        mol = model.mol.to(self._device)

        def open_with(table_dtype: TableDtype) -> ShardIndex:
            return open_index(mol, shard, search.model_copy(update={"table_dtype": table_dtype}))

        fit = read_low_rank(storage, night.corpus)
        query_map = fit.query_map.to(self._device) if fit else None
        # k is not divided by the number of shards: one shard may hold a whole list, as similar items often have
        # neighbouring ids.
        shard_search = search.model_copy(update={"k": min(search.k, entry.rows)})
        sample = SampleQueries(
            queries,
            rules_of(batches, night, self._settings, range(shard.first_row, shard.first_row + len(shard))),
            query_map,
        )
        write_tuning(night, tune(open_with, sample, shard_search, search.tuning.max_seconds))
        return payload


def rules_of(batches: Sequence[QueryBatch], night: Night, settings: Settings, rows: range | None = None) -> Rules:
    """The rules for the queries of all batches, of which all have bonuses or none has; `rows`: the items of a shard."""
    excluded = Lists.concat(batch.excluded for batch in batches)
    bonuses = [batch.bonuses for batch in batches if batch.bonuses is not None]
    of_users = [rules for batch in batches if (rules := batch.rules_of_queries) is not None]
    return TonightsRules(night, settings, rows).for_queries(
        excluded, Bonuses.concat(bonuses) if bonuses else None, UserRules.concat(of_users) if of_users else None
    )


@dataclass(frozen=True)
class JudgingUsers:
    """A `QuerySource`: up to `num_users` users of a bucket that the low-rank fit does not use, with whole histories."""

    num_users: int
    part: str = "whole"

    def select(self, unit: int, bucket: Bucket) -> Requested:
        rows = np.sort(judging_users(bucket)[: self.num_users])
        return Requested(bucket.user_ids.take(pa.array(rows)), rows)


def judging_batches(night: Night, settings: Settings) -> list[QueryBatch]:
    """Batches of tonight's users, up to `search.tuning.num_queries` queries in all; items of their history excluded."""
    model, missing = load_model(night.storage, night.checkpoint), settings.search.tuning.num_queries
    bonuses, rules = bonus_source(night, settings), UserRulesSource(night, settings)
    batches: list[QueryBatch] = []
    for unit in reversed(range(settings.output.num_buckets)):
        if missing <= 0:
            break
        source = JudgingUsers(missing)
        batch = encode_queries(model, read_bucket(night.storage, night.histories, unit), source, unit, bonuses)
        batches.append(replace(batch, rules=rules(unit, batch.user_ids)))
        missing -= len(batch.excluded)
    return batches
