"""The fan-out of a search over the shards: a chain of stages, in waves.

Stage s of a wave holds one shard in a fixed pool of actors; a unit's batch flows through all of them and carries its
running top-k. A wave is as many stages as the cluster holds at once; between waves the running top-k is spilled.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from pipeline.artifacts import FileEntry, Manifest, Night
from pipeline.distributed.backends import check_backends
from pipeline.distributed.chain import Stage, run_chain
from pipeline.distributed.cluster import ActorNeed, Cluster, connect, deadline, preflight, what_is_missing
from pipeline.errors import InputError
from pipeline.io.corpus import open_corpus, shard_entries
from pipeline.io.storage import open_storage
from pipeline.io.storage.base import Storage
from pipeline.settings import ClusterSettings, Settings
from pipeline.stages.queries import QuerySource
from pipeline.stages.search import QueryEncoder, ShardSearcher, Sink, Spill, Writer, spill_key


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
    counts: dict[int, bytes] = {}
    if units:
        entries = shard_entries(manifest)
        cluster = connect(settings)
        *spilling, last = plan_waves(len(entries), cluster, settings.cluster)
        check_backends(cluster, settings)
        fan_out = _FanOut(storage_uri, night, settings, entries, source, scratch)
        with deadline(settings.cluster.deadline_minutes):
            for wave in spilling:
                fan_out.run(wave, unspilled(storage, scratch, wave.last, units), *fan_out.spill(wave))
            counts = fan_out.run(last, units, Writer, {**fan_out.common, "sink": sink})
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


@dataclass(frozen=True)
class _FanOut:
    """What the waves of one search have in common."""

    storage_uri: str
    night: Night
    settings: Settings
    entries: tuple[FileEntry, ...]
    source: type[QuerySource]
    scratch: str

    @property
    def common(self) -> dict[str, Any]:
        return {"storage_uri": self.storage_uri, "night": self.night, "settings": self.settings}

    def spill(self, wave: Wave) -> tuple[type[Spill], dict[str, Any]]:
        return Spill, {"storage_uri": self.storage_uri, "scratch": self.scratch, "num_covered": wave.last}

    def run(
        self, wave: Wave, units: Sequence[int], end: type[Spill | Writer], end_arguments: Mapping[str, Any]
    ) -> dict[int, bytes]:
        """Encode the queries, meet the shards of the wave one after the other, and hand over to `end`."""
        if not units:
            return {}
        cluster = self.settings.cluster
        encoder = {**self.common, "source": self.source, "scratch": self.scratch, "num_covered": wave.first}
        place = (cluster.replicas, cluster.cpus_per_actor)
        searchers = [
            Stage(ShardSearcher, {**self.common, "entry": entry}, *place, cluster.gpus_per_actor)
            for entry in self.entries[wave.first : wave.last]
        ]
        stages = [
            Stage(QueryEncoder, encoder, *place),
            *searchers,
            Stage(end, end_arguments, 1, cluster.cpus_per_actor),
        ]
        what = f"search shards {wave.first} to {wave.last - 1} of {len(self.entries)}"
        return run_chain(what, units, stages, cluster.threads_per_actor)


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
