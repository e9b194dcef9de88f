"""The runner on Ray: the number and size of the actors of each stage."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from pipeline.distributed.backends import check_backends
from pipeline.distributed.chain import Pool, run_chain
from pipeline.distributed.cluster import (
    ActorNeed,
    Cluster,
    connect,
    describe,
    num_fitting,
    preflight,
    require,
    shortage,
    wait_for_nodes,
)
from pipeline.distributed.tasks import run_tasks
from pipeline.distributed.train import train
from pipeline.io.night import Night
from pipeline.settings import ClusterSettings, Settings
from pipeline.stages.runner import Actors, Stage

T = TypeVar("T")

MAX_ACTORS_PER_NODE = 4  # of a stage that runs as many actors as fit, without GPUs: more would wait for memory


class RayRunner:
    """A `Runner` on the cluster at `RAY_ADDRESS`, else on a local Ray."""

    def __init__(self, settings: Settings) -> None:
        self._all_settings, self._settings = settings, settings.cluster
        connect(settings)

    def run_tasks(
        self, label: str, function: Callable[..., T], arguments: Sequence[tuple[Any, ...]]
    ) -> Generator[T, None, None]:
        """Run the tasks with one CPU each."""
        return run_tasks(label, function, arguments)

    def run_chain(self, label: str, units: Sequence[int], stages: Sequence[Stage]) -> None:
        """Run each stage in a pool of actors of fixed size, when all of them fit on the cluster."""
        settings = self._settings
        cluster = preflight([need_of(stage, settings) for stage in stages], settings.wait_minutes)
        if any(stage.searches for stage in stages):
            check_backends(cluster, self._all_settings)
        counts = [num_actors(stage, len(units), cluster, settings) for stage in stages]
        pools = [Pool(stage, count, settings.cpus_per_actor) for stage, count in zip(stages, counts, strict=True)]
        run_chain(label, units, pools, settings.threads_per_actor)

    def num_fitting(self, stages: Sequence[Stage], beside: Sequence[Stage]) -> int:
        """The number of `stages` that fit at once, at most cluster.max_stages_per_wave.

        While not even one of them fits, the cluster gets cluster.wait_minutes to grow until all of them do.
        """
        settings = self._settings
        needs = wave_needs(stages[: settings.max_stages_per_wave], beside, settings)
        cluster = describe()
        if shortage(cluster.nodes, needs[0]):
            cluster = wait_for_nodes(needs[-1], settings.wait_minutes)
        return wave_size(cluster, needs)

    def train(self, night: Night, settings: Settings) -> None:
        """Train on Ray Train."""
        train(night, settings)


def wave_needs(stages: Sequence[Stage], beside: Sequence[Stage], settings: ClusterSettings) -> list[list[ActorNeed]]:
    """The actors of a wave of the first stage, of the first two, and so on, beside other stages.

    One actor's CPUs stay free, so that an actor can start again on another node.
    """
    spare = ActorNeed("spare", 1, settings.cpus_per_actor)
    others = [*(need_of(stage, settings) for stage in beside), spare]
    needs = [need_of(stage, settings) for stage in stages]
    return [[*needs[:size], *others] for size in range(1, len(needs) + 1)]


def wave_size(cluster: Cluster, needs: Sequence[Sequence[ActorNeed]]) -> int:
    """The size of the largest wave that fits, where `needs[i]` has the actors of a wave of size i + 1.

    Raises InputError or InfrastructureError when not even the smallest fits.
    """
    require(cluster, needs[0])
    size = 1
    while size < len(needs) and not shortage(cluster.nodes, needs[size]):
        size += 1
    return size


def need_of(stage: Stage, settings: ClusterSettings) -> ActorNeed:
    """The actors without which the stage cannot run."""
    count = settings.replicas if stage.actors is Actors.REPLICAS else 1
    return ActorNeed(stage.name, count, settings.cpus_per_actor, stage.gpus, stage.memory)


def num_actors(stage: Stage, num_units: int, cluster: Cluster, settings: ClusterSettings) -> int:
    """The number of actors that run the stage."""
    if stage.actors is not Actors.AS_MANY_AS_FIT:
        return need_of(stage, settings).count
    if stage.gpus:
        return max(1, num_fitting(cluster.nodes, replace(need_of(stage, settings), count=num_units)))
    cpus = max(settings.cpus_per_actor, settings.threads_per_actor)
    most = min(num_units, MAX_ACTORS_PER_NODE * len(cluster.nodes))
    fitting = num_fitting(cluster.nodes, ActorNeed(stage.name, most + 1, cpus, memory=stage.memory))
    return max(1, fitting - 1)  # one actor's CPUs stay free for reading and writing
