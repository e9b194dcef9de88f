"""The fan-out of a search over the shards: a chain of stages, in waves (design section 6).

Stage s of a wave holds one shard in a fixed pool of actors; a unit's batch flows through all of them and carries its
running top-k. A wave is as many stages as the cluster holds at once; between waves the running top-k is spilled.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from pipeline.artifacts import FileEntry, Manifest, Night
from pipeline.distributed.chain import Stage, run_chain
from pipeline.distributed.cluster import ActorNeed, Cluster, connect, deadline, preflight, what_is_missing
from pipeline.distributed.queries import QuerySource
from pipeline.distributed.stages import QueryEncoder, ShardSearcher, Sink, Spill, Writer, spill_key
from pipeline.errors import InputError
from pipeline.io.corpus import open_corpus
from pipeline.io.storage import Storage, open_storage
from pipeline.settings import ClusterSettings, Settings

log = logging.getLogger("nightrails")


@dataclass(frozen=True)
class Wave:
    """Shards `first` to `last` (exclusive), searched in one pass over the units."""

    first: int
    last: int


def search_units(
    storage_uri: str,
    night: Night,
    settings: Settings,
    units: Sequence[int],
    source: type[QuerySource],
    sink: type[Sink],
    scratch: str,
) -> dict[int, bytes]:
    """Search the queries that `source` finds in each unit (a user bucket) and hand the results to `sink`.

    `scratch` is a prefix for what is spilled between waves; it must stand for this search and no other. It is left
    behind by an interrupted run, which then resumes from it, and removed at the end. Returns each unit's counts as
    the sink gave them, in JSON.
    """
    storage = open_storage(storage_uri)
    manifest = open_corpus(storage, night.corpus)
    check_k(settings, manifest)
    if not units:
        return {}
    cluster = connect(settings)
    entries = [entry for entry in manifest.files if entry.rows]  # a shard without items has nothing to say
    waves = plan_waves(len(entries), cluster, settings.cluster)
    counts: dict[int, bytes] = {}
    with deadline(settings.cluster.deadline_minutes):
        for wave in waves:
            is_last = wave is waves[-1]
            pending = units if is_last else unspilled(storage, scratch, wave.last, units)
            if not pending:
                continue
            stages = wave_stages(storage_uri, night, settings, entries, wave, source, scratch)
            stages.append(
                Stage(Writer, {**_common(storage_uri, night, settings), "sink": sink}, **_one(settings))
                if is_last
                else Stage(
                    Spill,
                    {"storage_uri": storage_uri, "scratch": scratch, "num_covered": wave.last},
                    **_one(settings),
                )
            )
            what = f"search shards {wave.first} to {wave.last - 1} of {len(entries)}"
            counts = run_chain(what, pending, stages, settings.cluster.threads_per_actor)
    for info in storage.list(f"{scratch}/"):
        storage.delete(info.key)
    return counts


def plan_waves(num_shards: int, cluster: Cluster, settings: ClusterSettings) -> tuple[Wave, ...]:
    """As many shards per wave as fit at once, in waves of nearly the same size.

    Raises when not even one shard fits, naming what is missing: without this check Ray would wait for ever.
    """
    preflight(cluster, chain_needs(1, settings))
    fitting = 1
    while fitting < min(num_shards, settings.max_stages_per_wave):
        if what_is_missing(cluster.nodes, chain_needs(fitting + 1, settings)):
            break
        fitting += 1
    num_waves = -(-num_shards // fitting)
    bounds = [wave * num_shards // num_waves for wave in range(num_waves + 1)]
    return tuple(Wave(first, last) for first, last in pairwise(bounds))


def chain_needs(num_shards: int, settings: ClusterSettings) -> list[ActorNeed]:
    """The actors of a wave: searchers, and on CPUs only an encoder, a writer and room to restart one of them."""
    cpus = settings.cpus_per_actor
    return [
        ActorNeed("shard searcher", num_shards * settings.replicas, cpus, settings.gpus_per_actor),
        ActorNeed("query encoder", settings.replicas, cpus),
        ActorNeed("writer or spare", 2, cpus),
    ]


def wave_stages(
    storage_uri: str,
    night: Night,
    settings: Settings,
    entries: Sequence[FileEntry],
    wave: Wave,
    source: type[QuerySource],
    scratch: str,
) -> list[Stage]:
    """The stages of a wave but for the last: encode the queries, then one stage per shard."""
    common = _common(storage_uri, night, settings)
    cluster = settings.cluster
    encoder = {**common, "source": source, "scratch": scratch, "num_covered": wave.first}
    searchers = [
        Stage(
            ShardSearcher, {**common, "entry": entry}, cluster.replicas, cluster.cpus_per_actor, cluster.gpus_per_actor
        )
        for entry in entries[wave.first : wave.last]
    ]
    return [Stage(QueryEncoder, encoder, cluster.replicas, cluster.cpus_per_actor), *searchers]


def unspilled(storage: Storage, scratch: str, num_covered: int, units: Sequence[int]) -> list[int]:
    """The units whose top-k over the first `num_covered` shards an interrupted run has not left behind."""
    prefix = spill_key(scratch, num_covered, 0).rpartition("/")[0]
    there = {info.key for info in storage.list(f"{prefix}/")}
    return [unit for unit in units if spill_key(scratch, num_covered, unit) not in there]


def check_k(settings: Settings, corpus: Manifest) -> None:
    """Refuse a k that no user could ever get."""
    num_items = int(corpus.counts["num_items"])
    if settings.search.k > num_items:
        raise InputError(f"search.k is {settings.search.k}, but the corpus has {num_items} items; lower search.k")


def _common(storage_uri: str, night: Night, settings: Settings) -> dict[str, object]:
    return {"storage_uri": storage_uri, "night": night, "settings": settings}


def _one(settings: Settings) -> dict[str, float]:
    return {"num_actors": 1, "num_cpus": settings.cluster.cpus_per_actor}
