"""Executes the stages on Ray: how many actors of which size, and whether they fit."""

from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar

from pipeline.distributed.backends import check_backends
from pipeline.distributed.chain import Pool, run_chain
from pipeline.distributed.cluster import ActorNeed, Cluster, connect, preflight, what_is_missing
from pipeline.distributed.tasks import run_tasks
from pipeline.distributed.train import train
from pipeline.io.night import Night
from pipeline.settings import ClusterSettings, Settings
from pipeline.stages.runner import Actors, Stage

T = TypeVar("T")

MAX_ACTORS_PER_NODE = 4  # of a stage that takes as many as there is room for: each may hold the whole model


class RayRunner:
    """A `Runner` on the cluster that this job was submitted to, else on a local Ray."""

    def __init__(self, settings: Settings) -> None:
        self._all_settings, self._settings = settings, settings.cluster
        self._cluster = connect(settings)

    def run_tasks(
        self, label: str, function: Callable[..., T], arguments: Sequence[tuple[Any, ...]]
    ) -> Generator[T, None, None]:
        """As Runner.run_tasks: a task is one CPU's work."""
        return run_tasks(label, function, arguments)

    def run_chain(self, label: str, units: Sequence[int], stages: Sequence[Stage]) -> None:
        """As Runner.run_chain: a stage is a fixed pool of actors."""
        pools = [self._pool(stage, len(units)) for stage in stages]
        preflight(self._cluster, [pool.need for pool in pools])
        if any(stage.uses_gpus for stage in stages):
            check_backends(self._cluster, self._all_settings)
        run_chain(label, units, pools, self._settings.threads_per_actor)

    def shards_per_wave(self, num_shards: int) -> int:
        """As Runner.shards_per_wave: as many as fit at once, at most cluster.max_stages_per_wave."""
        return shards_per_wave(num_shards, self._cluster, self._settings)

    def train(self, night: Night, settings: Settings) -> None:
        """As Runner.train: by Ray Train."""
        train(self._cluster, night, settings)

    def _pool(self, stage: Stage, num_units: int) -> Pool:
        settings = self._settings
        num_actors = {
            Actors.ONE: 1,
            Actors.REPLICAS: settings.replicas,
            Actors.AS_MANY_AS_FIT: min(num_units, max_actors(self._cluster, settings)),
        }[stage.actors]
        return Pool(stage, num_actors, settings.cpus_per_actor, settings.gpus_per_actor if stage.uses_gpus else 0.0)


def shards_per_wave(num_shards: int, cluster: Cluster, settings: ClusterSettings) -> int:
    """As many shards as fit at once. Without this number Ray would wait for ever for the missing part of a chain."""
    preflight(cluster, chain_needs(1, settings))
    fitting = 1
    while fitting < min(num_shards, settings.max_stages_per_wave):
        if what_is_missing(cluster.nodes, chain_needs(fitting + 1, settings)):
            break
        fitting += 1
    return fitting


def chain_needs(num_shards: int, settings: ClusterSettings) -> list[ActorNeed]:
    """The actors of a wave: searchers, and on CPUs only an encoder, a writer and room to restart one of them."""
    cpus = settings.cpus_per_actor
    return [
        ActorNeed("ShardSearcher", num_shards * settings.replicas, cpus, settings.gpus_per_actor),
        ActorNeed("QueryEncoder", settings.replicas, cpus),
        ActorNeed("writer or spare", 2, cpus),
    ]


def max_actors(cluster: Cluster, settings: ClusterSettings) -> int:
    """How many actors of one stage the cluster holds, with a CPU left for reading and writing."""
    if settings.gpus_per_actor:
        return max(1, int(cluster.num_gpus / settings.gpus_per_actor))
    cpus = max(settings.cpus_per_actor, settings.threads_per_actor)
    return max(1, min(int(cluster.num_cpus / cpus) - 1, MAX_ACTORS_PER_NODE * len(cluster.nodes)))
