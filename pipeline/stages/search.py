"""The search of all item shards: a chain of stages, in waves.

A wave is a chain with one stage per shard. A unit's batch of queries passes through all stages, and each improves its
top-k. A wave holds as many shards as fit at once; between two waves the store keeps each unit's running top-k.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pyarrow as pa
import torch

from pipeline.artifacts import FileEntry, Manifest
from pipeline.data.lists import Int64
from pipeline.errors import InfrastructureError, InputError
from pipeline.io.artifacts import Claims, read_file, sizes_of, write_file
from pipeline.io.checkpoint import load_model, model_bytes
from pipeline.io.corpus import open_corpus, read_low_rank, read_shard, shard_entries
from pipeline.io.histories import read_bucket
from pipeline.io.night import Night
from pipeline.io.parquet import read_parquet_bytes, write_parquet_bytes
from pipeline.io.storage.base import Storage
from pipeline.retrieval.backends import describe_backend, open_index
from pipeline.retrieval.search import search_shard
from pipeline.retrieval.topk import TopK, empty_topk
from pipeline.settings import Settings
from pipeline.stages.devices import device_for, memory_to_hold
from pipeline.stages.encode import encode_queries
from pipeline.stages.memory import bonus_source, memory_of_bonuses
from pipeline.stages.poison import around_failures
from pipeline.stages.queries import QuerySource
from pipeline.stages.query_batch import (
    backends_in,
    backends_metadata,
    decode_batch,
    encode_batch,
    topk_columns,
    topk_from_columns,
)
from pipeline.stages.rules import TonightsRules
from pipeline.stages.runner import Actors, Payload, Runner, Stage
from pipeline.stages.user_rules import UserRulesSource

AGAIN = "has another process finished this search meanwhile? Run again"


@dataclass(frozen=True)
class Search:
    """The values that every wave of a search needs."""

    night: Night
    settings: Settings
    source: QuerySource
    scratch: str  # prefix of the temporary files between waves; no other search uses it
    compares_bonuses: bool = False  # search for each query twice: with its bonuses and without

    def running_claims(self, num_covered: int) -> Claims[FileEntry]:
        """The units whose top-k over the first `num_covered` shards is in the store."""
        prefix = f"{self.scratch}/first-{num_covered:05d}-shards"
        return Claims(self.night.storage, prefix, "unit", FileEntry, lambda entry: sizes_of(prefix, entry))


@dataclass(frozen=True)
class Wave:
    """Shards `first` to `last` (exclusive), searched in one pass over the units."""

    first: int
    last: int


def search_shards(runner: Runner, search: Search, units: Sequence[int], end: Stage) -> None:
    """Search all shards for the queries of each unit (a user bucket), and end with the stage `end`.

    An interrupted search resumes from its scratch. Raises InputError when the corpus does not exist or has fewer than k
    items, and the errors of `Runner.run_chain`.
    """
    manifest = open_corpus(search.night.storage, search.night.corpus)
    check_k(search.settings, manifest)
    if units:
        searchers = searcher_stages(search, shard_entries(manifest))
        at_once = runner.num_fitting(searchers, beside=[encoder_stage(search), end])
        *earlier, last = plan_waves(len(searchers), at_once)
        for wave in earlier:
            missing = search.running_claims(wave.last).missing(units)
            keeper = Stage(RunningKeeper, {"search": search, "num_covered": wave.last}, Actors.ONE)
            _run_wave(runner, search, searchers, wave, missing, keeper)
        _run_wave(runner, search, searchers, last, units, end)


def plan_waves(num_shards: int, per_wave: int) -> tuple[Wave, ...]:
    """Cut the shards into waves of nearly the same size, at most `per_wave` shards each."""
    num_waves = max(1, -(-num_shards // per_wave))
    bounds = [wave * num_shards // num_waves for wave in range(num_waves + 1)]
    return tuple(Wave(first, last) for first, last in pairwise(bounds))


def _run_wave(
    runner: Runner, search: Search, searchers: Sequence[Stage], wave: Wave, units: Sequence[int], end: Stage
) -> None:
    """Send the units through an encoder, the shards of the wave and the stage `end`."""
    if units:
        label = f"search shards {wave.first} to {wave.last - 1} of {len(searchers)}"
        encoder = encoder_stage(search, wave.first)
        runner.run_chain(label, units, [encoder, *searchers[wave.first : wave.last], end])


def encoder_stage(search: Search, num_covered: int = 0) -> Stage:
    """The stage that encodes the queries, after waves over the first `num_covered` shards."""
    arguments = {"search": search, "num_covered": num_covered}
    gpus = search.settings.cluster.gpus_per_encoder
    memory = memory_to_hold(model_bytes(search.night)) + memory_of_bonuses(search.night, search.settings)
    return Stage(QueryEncoder, arguments, gpus=gpus, memory=memory)


def searcher_stages(search: Search, shards: Sequence[FileEntry]) -> list[Stage]:
    """A stage for each shard, in order."""
    night, settings = search.night, search.settings
    model, gpus = model_bytes(night), settings.cluster.gpus_per_actor
    return [
        Stage(
            ShardSearcher,
            {"night": night, "settings": settings, "entry": entry},
            gpus=gpus,
            memory=memory_to_hold(model, entry.bytes),
            searches=True,
        )
        for entry in shards
    ]


class QueryEncoder:
    """Reads a bucket, encodes its queries and starts their top-k, empty or as the wave before has left it."""

    def __init__(self, search: Search, num_covered: int) -> None:
        self._search, self._num_covered = search, num_covered
        device = device_for(search.settings.cluster.gpus_per_encoder)
        self._model = load_model(search.night.storage, search.night.checkpoint).to(device)
        self._bonus_source = bonus_source(search.night, search.settings)
        self._user_rules = UserRulesSource(search.night, search.settings)

    def __call__(self, unit: int, payload: Payload) -> pa.Buffer:
        """Return the unit's queries with a top-k over the first `num_covered` shards; the payload is not used."""
        search = self._search
        bucket = read_bucket(search.night.storage, search.night.histories, unit)
        batch = encode_queries(self._model, bucket, search.source, unit, self._bonus_source)
        batch = replace(batch, rules=self._user_rules(unit, batch.user_ids))
        if search.compares_bonuses:
            batch = batch.and_without_bonuses()
        running = empty_topk(len(batch.excluded), search.settings.search.k)
        if self._num_covered:
            running, backends, failures = read_running(search.running_claims(self._num_covered), unit, len(running))
            batch = replace(batch, backends=backends, failures=failures)
        return encode_batch(batch, running)


class ShardSearcher:
    """Holds one item shard for the life of the process and improves each query's top-k with its items."""

    def __init__(self, night: Night, settings: Settings, entry: FileEntry) -> None:
        self._device = device_for(settings.cluster.gpus_per_actor)
        self._search = settings.search
        mol = load_model(night.storage, night.checkpoint).mol.to(self._device)
        shard = read_shard(night.storage, night.corpus, entry).to(self._device)
        self._index = open_index(mol, shard, settings.search)
        self._backend = str(describe_backend(settings.search, self._device.type))
        self._rules = TonightsRules(night, settings, range(shard.first_row, shard.first_row + len(shard)))
        fit = read_low_rank(night.storage, night.corpus)
        self._query_map = fit.query_map.to(self._device) if fit else None

    def __call__(self, unit: int, payload: Payload) -> pa.Buffer:
        batch, running = decode_batch(payload)
        queries, running = batch.queries.to(self._device), running.to(self._device)
        rules = self._rules.for_queries(batch.excluded, batch.bonuses, batch.rules_of_queries)
        sound = np.flatnonzero(batch.is_sound)

        def search(places: Int64) -> TopK:
            if len(places) == len(running):  # as nearly always: nothing is copied
                return search_shard(self._index, queries, rules, self._search, running, self._query_map)
            chosen = torch.from_numpy(sound[places])
            before = running.take(chosen)
            asked = rules.take(sound[places])
            return search_shard(self._index, queries.take(chosen), asked, self._search, before, self._query_map)

        parts, failed = around_failures(search, len(sound))
        result = running
        for places, improved in parts:
            whole = len(places) == len(running)
            result = improved if whole else result.put(torch.from_numpy(sound[places]), improved)
        batch = replace(batch, backends=batch.backends | {self._backend})
        return encode_batch(batch.failing({int(sound[place]): reason for place, reason in failed.items()}), result)


class RunningKeeper:
    """Ends a wave: keeps each unit's running top-k in the store for the next wave."""

    def __init__(self, search: Search, num_covered: int) -> None:
        self._claims = search.running_claims(num_covered)

    def __call__(self, unit: int, payload: Payload) -> bytes:
        batch, running = decode_batch(payload)
        failures = {} if batch.failures is None else {"failure": batch.failures}
        data = write_parquet_bytes(pa.table(topk_columns(running) | failures), backends_metadata(batch.backends))
        name = f"unit-{unit:05d}.parquet"
        self._claims.claim(unit, write_file(self._claims.storage, self._claims.prefix, name, data, len(running)))
        return b""


def read_running(
    claims: Claims[FileEntry], unit: int, num_queries: int
) -> tuple[TopK, frozenset[str], pa.Array | None]:
    """A unit's running top-k, the names of the backends that have searched for it, and its failures if there are any.

    Raises InfrastructureError when the file is gone or damaged, or when it has not `num_queries` queries.
    """
    storage = claims.storage
    entry = claims.require(unit, AGAIN)
    try:
        data = read_file(storage, claims.prefix, entry, AGAIN)
    except InputError as error:
        storage.delete(claims.key(unit))
        raise InfrastructureError(str(error)) from None
    table = read_parquet_bytes(data, f"{storage.uri}/{claims.prefix}/{entry.key}")
    running = topk_from_columns(table)
    if len(running) != num_queries:
        storage.delete(claims.key(unit))
        raise InfrastructureError(
            f"{storage.uri}/{claims.key(unit)}: holds {len(running)} queries instead of {num_queries}; run again"
        )
    failures = table["failure"].combine_chunks() if "failure" in table.column_names else None
    return running, backends_in(table.schema), failures


def remove_running(storage: Storage, scratch: str) -> None:
    """Delete the temporary files of a search."""
    for info in storage.list(f"{scratch}/"):
        storage.delete(info.key)


def check_k(settings: Settings, corpus: Manifest) -> None:
    """Raise InputError when k is larger than the number of items."""
    num_items = corpus.counts["num_items"]
    if settings.search.k > num_items:
        raise InputError(f"search.k is {settings.search.k}, but the corpus has {num_items} items; lower search.k")
