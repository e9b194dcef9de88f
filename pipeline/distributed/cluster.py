"""The Ray cluster of a job: joining or starting it, its resources, and whether the actors of a step fit on it."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass

import ray
import torch  # noqa: F401 - here, while this process has one thread: loaded amid Ray's threads, its MKL once aborted
from ray.data import DataContext
from ray.exceptions import AuthenticationError

from pipeline.distributed.restart_notice import swallow_restart_notice
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

log = logging.getLogger("nightrails")


@dataclass(frozen=True)
class Node:
    """The CPUs and GPUs of one alive node."""

    cpus: float
    gpus: float = 0.0


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
    """The resources of a step's actors of one kind; an actor needs all its CPUs and GPUs on the same node."""

    name: str
    count: int
    cpus: float  # per actor
    gpus: float = 0.0  # per actor


def connect(settings: Settings) -> Cluster:
    """Join the cluster at `RAY_ADDRESS`, else start a local one. Calling it again is fine.

    Raises InputError when some node cannot see the root, or the address or the token is malformed;
    InfrastructureError when no cluster answers.
    """
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS") or "local"
        try:
            # "local" always starts a new instance, even on a machine where `ray start` has started a cluster.
            ray.init(
                address=address,
                logging_level=logging.ERROR,
                # Most of the workers' output is Ray's (Ray Train prints a line a second). Errors arrive as exceptions,
                # and lines for people come through pipeline/distributed/messages.py.
                log_to_driver=False,
                include_dashboard=False if address == "local" else None,
            )
        except (AuthenticationError, ValueError) as error:  # no token; a malformed address
            raise InputError(f"RAY_ADDRESS {address!r}: {error}") from error
        except (ConnectionError, RuntimeError) as error:
            raise InfrastructureError(
                f"no Ray cluster at {address!r} ({error}). Is it up? If it asks for a token, this process needs "
                "RAY_AUTH_MODE=token in its environment, and the token in ~/.ray/auth_token"
            ) from error
        swallow_restart_notice()
        log.info("%s", describe())
    cluster = describe()
    check_root(settings, cluster)
    _set_data_defaults(settings)
    return cluster


def describe() -> Cluster:
    """The nodes that are alive now in the cluster of this process."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    nodes = tuple(Node(resources.get("CPU", 0.0), resources.get("GPU", 0.0)) for resources in alive)
    return Cluster(nodes, is_local=os.environ.get("RAY_ADDRESS") in (None, "", "local"))


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


def preflight(cluster: Cluster, needs: Sequence[ActorNeed]) -> None:
    """Refuse actors that do not fit on the cluster: Ray would hold the ones that fit and wait forever for the others.

    Raises InputError on a local cluster, which cannot grow, else InfrastructureError, because a node may join later.
    """
    missing = shortage(cluster.nodes, needs)
    if missing:
        error = InputError if cluster.is_local else InfrastructureError
        remedy = "add a node of this kind, or lower the cluster.* settings"
        raise error(f"{cluster}: no place for {missing}; {remedy}")


def shortage(nodes: Sequence[Node], needs: Sequence[ActorNeed]) -> str:
    """Describe the first kind of actor that does not fit beside the others; "" when all actors fit."""
    free = [[node.cpus, node.gpus] for node in nodes]
    for need in sorted(needs, key=lambda n: (-n.gpus, -n.cpus)):
        placed = 0
        # Actors without GPUs go to the nodes with the fewest GPUs first.
        for node in sorted(free, key=lambda f: f[1]):
            while placed < need.count and _has_room(node, need):
                node[0] -= need.cpus
                node[1] -= need.gpus
                placed += 1
        if placed < need.count:
            gpus = f" and {need.gpus:g} GPUs" if need.gpus else ""
            return f"{need.count - placed} of {need.count} {need.name}s of {need.cpus:g} CPUs{gpus} each"
    return ""


def _has_room(free: list[float], need: ActorNeed) -> bool:
    """Compare the free CPUs and GPUs of a node with those of one actor."""
    rounding = 1e-6  # of adding and subtracting fractions of a CPU
    return free[0] + rounding >= need.cpus and free[1] + rounding >= need.gpus


def _set_data_defaults(settings: Settings) -> None:
    """Set the options of Ray Data for all datasets that this process creates from now on."""
    context = DataContext.get_current()
    context.execution_no_progress_timeout_s = settings.cluster.no_progress_minutes * 60
    context.max_consecutive_actor_init_deaths = MAX_DEATHS_WHILE_LOADING
    context.enable_progress_bars = False  # the jobs log their own progress, in units
    context.print_on_execution_start = False
    context.raise_original_map_exception = True  # otherwise our own errors come back as text
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    for name, level in QUIET.items():
        logging.getLogger(f"ray.data.{name}").setLevel(level)
