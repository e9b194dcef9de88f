"""The runner on Ray: the number and size of the actors of each stage."""

from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar

from pipeline.distributed.backends import check_backends
from pipeline.distributed.chain import Pool, run_chain
from pipeline.distributed.cluster import ActorNeed, Cluster, connect, preflight, shortage
from pipeline.distributed.tasks import run_tasks
from pipeline.distributed.train import train
from pipeline.io.night import Night
from pipeline.settings import ClusterSettings, Settings
from pipeline.stages.runner import Actors, Stage

T = TypeVar("T")

MAX_ACTORS_PER_NODE = 4  # of a stage that runs as many actors as fit: each may hold the whole model in memory


class RayRunner:
    """A `Runner` on the cluster at `RAY_ADDRESS`, else on a local Ray."""

    def __init__(self, settings: Settings) -> None:
        self._all_settings, self._settings = settings, settings.cluster
        self._cluster = connect(settings)

    def run_tasks(
        self, label: str, function: Callable[..., T], arguments: Sequence[tuple[Any, ...]]
    ) -> Generator[T, None, None]:
        """Run the tasks with one CPU each."""
        return run_tasks(label, function, arguments)

    def run_chain(self, label: str, units: Sequence[int], stages: Sequence[Stage]) -> None:
        """Run each stage in a pool of actors of fixed size."""
        pools = [self._pool(stage, len(units)) for stage in stages]
        preflight(self._cluster, [pool.need for pool in pools])
        if any(stage.uses_gpus for stage in stages):
            check_backends(self._cluster, self._all_settings)
        run_chain(label, units, pools, self._settings.threads_per_actor)

    def shards_per_wave(self, num_shards: int) -> int:
        """The number of shards that fit at once, at most cluster.max_stages_per_wave."""
        return shards_per_wave(num_shards, self._cluster, self._settings)

    def train(self, night: Night, settings: Settings) -> None:
        """Train on Ray Train."""
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
    """The number of shards that fit at once, from 1 to `num_shards`: Ray would wait forever for actors that do not fit.

    Raises the errors of `preflight` when not even one shard fits.
    """
    preflight(cluster, chain_needs(1, settings))
    limit = min(num_shards, settings.max_stages_per_wave)
    num_fitting = 1
    while num_fitting < limit and not shortage(cluster.nodes, chain_needs(num_fitting + 1, settings)):
        num_fitting += 1
    return num_fitting


def chain_needs(num_shards: int, settings: ClusterSettings) -> list[ActorNeed]:
    """The actors of a wave of a search: searchers, encoders, a writer, and room to restart one of the last two."""
    cpus = settings.cpus_per_actor
    return [
        ActorNeed("ShardSearcher", num_shards * settings.replicas, cpus, settings.gpus_per_actor),
        ActorNeed("QueryEncoder", settings.replicas, cpus),
        ActorNeed("writer or spare", 2, cpus),
    ]


def max_actors(cluster: Cluster, settings: ClusterSettings) -> int:
    """The number of actors of one stage that the cluster holds; one actor's CPUs stay free for reading and writing."""
    if settings.gpus_per_actor:
        return max(1, int(cluster.num_gpus / settings.gpus_per_actor))
    cpus = max(settings.cpus_per_actor, settings.threads_per_actor)
    return max(1, min(int(cluster.num_cpus / cpus) - 1, MAX_ACTORS_PER_NODE * len(cluster.nodes)))
