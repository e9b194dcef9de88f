"""The Ray cluster of a job: joining or starting it, its resources, and whether the actors of a step fit on it."""

import logging
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

import ray
import torch  # noqa: F401 - here, while this process has one thread: loaded amid Ray's threads, its MKL once aborted
from ray.autoscaler.sdk import request_resources
from ray.data import DataContext
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.distributed.restart_notice import swallow_restart_notice
from pipeline.distributed.start import LOCAL, join_or_start
from pipeline.errors import InfrastructureError, InputError
from pipeline.settings import Settings

# Actors of one stage that may die in a row while they load; Ray replaces each by a new process.
MAX_DEATHS_WHILE_LOADING = 2
# The least level that these loggers of Ray may log: their messages also arrive as exceptions.
QUIET = {
    "exceptions": logging.CRITICAL,
    "_internal.execution.streaming_executor_state": logging.CRITICAL,
    "_internal.execution.streaming_executor": logging.CRITICAL,
    "_internal.progress": logging.ERROR,
}

GB = 1e9
ROUNDING = 1e-6  # of adding and subtracting fractions of a CPU or GPU
SECONDS_BETWEEN_LOOKS = 2.0  # at the nodes, while a step waits for one to join

log = logging.getLogger("nightrails")


@dataclass(frozen=True)
class Node:
    """The CPUs, whole GPUs and bytes of memory that Ray may give away on one alive node."""

    cpus: float
    gpus: int = 0
    memory: float = math.inf


@dataclass(frozen=True)
class Cluster:
    """The alive nodes of the cluster; `is_local` when this process started it for itself."""

    nodes: tuple[Node, ...]
    is_local: bool

    @property
    def num_cpus(self) -> float:
        return sum(node.cpus for node in self.nodes)

    @property
    def num_gpus(self) -> float:
        return sum(node.gpus for node in self.nodes)

    def __str__(self) -> str:
        kind = "local Ray" if self.is_local else "Ray cluster"
        nodes = f"{len(self.nodes)} node" + ("s" if len(self.nodes) != 1 else "")
        return f"{kind}, {nodes}, {self.num_cpus:g} CPUs, {self.num_gpus:g} GPUs"


@dataclass(frozen=True)
class ActorNeed:
    """The resources of a step's actors of one kind; an actor needs all of its own on the same node.

    Ray gives a fraction of a GPU from one GPU only: at 0.6 each a GPU holds one actor, not 1⅔.
    """

    name: str
    count: int
    cpus: float  # per actor
    gpus: float = 0.0  # per actor: at most 1, or a whole number
    memory: int = 0  # bytes per actor

    @property
    def resources(self) -> dict[str, float]:
        """The resources of one actor, by Ray's names."""
        amounts = {"CPU": self.cpus, "GPU": self.gpus, "memory": self.memory}
        return {name: amount for name, amount in amounts.items() if amount}

    def __str__(self) -> str:
        parts = [f"{self.cpus:g} CPUs"]
        if self.gpus:
            parts.append(f"{self.gpus:g} GPUs")
        if self.memory:
            parts.append(f"{self.memory / GB:.1f} GB of memory")
        return f"{self.count} {self.name}s of {' and '.join(parts)} each"


def connect(settings: Settings) -> Cluster:
    """Join the cluster at `RAY_ADDRESS`, else start a local one. Calling it again is fine.

    Raises InputError when some node cannot see the root, or Ray refuses the environment; InfrastructureError when no
    cluster answers.
    """
    if not ray.is_initialized():
        join_or_start(os.environ.get("RAY_ADDRESS") or LOCAL)
        swallow_restart_notice()
        log.info("%s", describe())
    cluster = describe()
    check_root(settings, cluster)
    _set_data_defaults(settings)
    return cluster


def describe() -> Cluster:
    """The nodes that are alive now in the cluster of this process."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    nodes = tuple(
        Node(resources.get("CPU", 0.0), int(resources.get("GPU", 0.0)), resources.get("memory", 0.0))
        for resources in alive
    )
    return Cluster(nodes, is_local=os.environ.get("RAY_ADDRESS") in (None, "", LOCAL))


def on_this_node() -> NodeAffinitySchedulingStrategy:
    """Place an actor on the node of this process: the loss of another node does not end it."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def check_root(settings: Settings, cluster: Cluster) -> None:
    """Raise InputError when the workers cannot share the root."""
    scheme, separator, _ = settings.root.partition("://")
    if separator and scheme == "memory":
        raise InputError("root: memory:// lives in one process, but Ray has many; give a folder or s3://bucket/prefix")
    is_folder = not separator or scheme == "file"
    if is_folder and len(cluster.nodes) > 1 and not settings.root_is_shared:
        raise InputError(
            f"root: {settings.root} is a folder, and this cluster has {len(cluster.nodes)} nodes: each would write to "
            "its own disk. Give s3://bucket/prefix, or set root_is_shared: true when every node mounts this folder"
        )


def preflight(needs: Sequence[ActorNeed], wait_minutes: float) -> Cluster:
    """Return the cluster once the actors fit on it.

    Ray would hold the actors that fit and wait forever for the others. Raises InputError at once on a local cluster,
    which cannot grow; else InfrastructureError after `wait_minutes`.
    """
    cluster = wait_for_nodes(needs, wait_minutes)
    require(cluster, needs)
    return cluster


def require(cluster: Cluster, needs: Sequence[ActorNeed]) -> None:
    """Raise InputError for a local cluster, InfrastructureError for another, when the actors do not fit on it."""
    if missing := shortage(cluster.nodes, needs):
        error = InputError if cluster.is_local else InfrastructureError
        remedy = "add a node of this kind, lower the cluster.* settings, or raise corpus.num_shards for smaller shards"
        raise error(f"{cluster}: no place for {missing}; {remedy}")


def wait_for_nodes(needs: Sequence[ActorNeed], wait_minutes: float) -> Cluster:
    """Wait until the actors fit, at most `wait_minutes`, and return the cluster as it is then.

    A cluster that was joined may grow: its autoscaler, if it has one, is asked for the resources. A local cluster is
    not waited for.
    """
    cluster = describe()
    missing = shortage(cluster.nodes, needs)
    if not missing or cluster.is_local:
        return cluster
    log.info(
        "%s: no place for %s; nodes may join for %g minutes (cluster.wait_minutes)", cluster, missing, wait_minutes
    )
    request_resources(bundles=[need.resources for need in needs for _ in range(need.count)])
    try:
        give_up = time.monotonic() + wait_minutes * 60
        while shortage(cluster.nodes, needs) and time.monotonic() < give_up:
            time.sleep(SECONDS_BETWEEN_LOOKS)
            cluster = describe()
    finally:
        request_resources(bundles=[])  # from now on the actors themselves keep their nodes
    return cluster


def shortage(nodes: Sequence[Node], needs: Sequence[ActorNeed]) -> str:
    """Describe the actors of the first kind that do not fit beside the others; "" when all actors fit."""
    free = [_Free(node) for node in nodes]
    for need in sorted(needs, key=lambda n: (-n.gpus, -n.memory, -n.cpus)):
        left = need.count - _place(free, need)
        if left:
            return f"{left} of {need}"
    return ""


def num_fitting(nodes: Sequence[Node], need: ActorNeed) -> int:
    """The number of actors, at most `need.count`, that fit on empty nodes."""
    return _place([_Free(node) for node in nodes], need)


class _Free:
    """The resources of a node that are not given away yet; `gpus` has the free share of each GPU."""

    def __init__(self, node: Node) -> None:
        self.cpus, self.memory, self.gpus = node.cpus, node.memory, [1.0] * node.gpus

    def take(self, need: ActorNeed) -> bool:
        """Give an actor its resources; False when the node does not have them all."""
        gpus = [gpu for gpu, share in enumerate(self.gpus) if share + ROUNDING >= min(need.gpus, 1.0)]
        num_gpus = math.ceil(need.gpus)
        if self.cpus + ROUNDING < need.cpus or self.memory < need.memory or len(gpus) < num_gpus:
            return False
        self.cpus -= need.cpus
        self.memory -= need.memory
        for gpu in gpus[:num_gpus]:
            self.gpus[gpu] -= min(need.gpus, 1.0)
        return True


def _place(free: Sequence[_Free], need: ActorNeed) -> int:
    """Place actors, at most `need.count`, on the nodes with the fewest GPUs first; return their number."""
    placed = 0
    for node in sorted(free, key=lambda node: len(node.gpus)):
        while placed < need.count and node.take(need):
            placed += 1
    return placed


def _set_data_defaults(settings: Settings) -> None:
    """Set the options of Ray Data for all datasets that this process creates from now on."""
    context = DataContext.get_current()
    patience = max(settings.cluster.no_progress_minutes, settings.cluster.wait_minutes)  # a lost node may be replaced
    context.execution_no_progress_timeout_s = int(patience * 60)
    context.max_consecutive_actor_init_deaths = MAX_DEATHS_WHILE_LOADING
    context.issue_detectors_config.detectors = []  # they advise people who write pipelines; ours has its own limits
    context.enable_progress_bars = False  # the jobs log their own progress, in units
    context.print_on_execution_start = False
    context.raise_original_map_exception = True  # otherwise our own errors come back as text
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    for name, level in QUIET.items():
        logging.getLogger(f"ray.data.{name}").setLevel(level)
