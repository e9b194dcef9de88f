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
from pipeline.stages.devices import PROCESS_BYTES
from pipeline.stages.runner import Actors, Stage, in_turn

T = TypeVar("T")

SHARED_BYTES = 500_000_000  # that the stages of a chain may hold together for one process to run them all
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
        """Run the stages in pools of actors of fixed size, when all of them fit on the cluster."""
        settings = self._settings
        cluster = preflight([need_of(stage, settings) for stage in stages], settings.wait_minutes)
        if any(stage.searches for stage in stages):
            check_backends(cluster, self._all_settings)
        run_chain(label, units, plan_pools(stages, len(units), cluster, settings), settings.threads_per_actor)

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


def plan_pools(stages: Sequence[Stage], num_units: int, cluster: Cluster, settings: ClusterSettings) -> list[Pool]:
    """A pool of actors for each stage; for small stages one pool, whose actors run all of them in turn.

    An actor takes seconds to start, as it loads torch: for a small log more than all its work. The one pool has as many
    actors as all pools would have, but not more than the cluster has CPUs for.
    """
    pools = [Pool(stage, num_actors(stage, num_units, cluster, settings), settings.cpus_per_actor) for stage in stages]
    together = in_turn(stages, Actors.ONE)
    is_small = together.memory <= SHARED_BYTES and not any(stage.gpus for stage in stages)
    if len(pools) == 1 or not is_small or shortage(cluster.nodes, [need_of(together, settings)]):
        return pools
    most = min(num_units, sum(pool.num_actors for pool in pools))
    fitting = num_fitting(cluster.nodes, replace(need_of(together, settings), count=most, cpus=_cpus_used(settings)))
    return [Pool(together, max(1, fitting), settings.cpus_per_actor)]


def need_of(stage: Stage, settings: ClusterSettings) -> ActorNeed:
    """The actors without which the stage cannot run."""
    count = settings.replicas if stage.actors is Actors.REPLICAS else 1
    return ActorNeed(stage.name, count, settings.cpus_per_actor, stage.gpus, PROCESS_BYTES + stage.memory)


def num_actors(stage: Stage, num_units: int, cluster: Cluster, settings: ClusterSettings) -> int:
    """The number of actors that run the stage."""
    if stage.actors is not Actors.AS_MANY_AS_FIT:
        return need_of(stage, settings).count
    if stage.gpus:
        return max(1, num_fitting(cluster.nodes, replace(need_of(stage, settings), count=num_units)))
    most = min(num_units, MAX_ACTORS_PER_NODE * len(cluster.nodes))
    need = replace(need_of(stage, settings), count=most + 1, cpus=_cpus_used(settings))
    return max(1, num_fitting(cluster.nodes, need) - 1)  # one actor's CPUs stay free for reading and writing


def _cpus_used(settings: ClusterSettings) -> float:
    """The CPUs that an actor keeps busy; it may ask Ray for fewer."""
    return max(settings.cpus_per_actor, settings.threads_per_actor)
