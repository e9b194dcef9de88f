"""The Ray cluster a job runs on: joining or starting it, what it offers, and how long it may take."""

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

# Actors of one stage that may die in a row while they load, each being replaced by a fresh process.
MAX_DEATHS_WHILE_LOADING = 2
# What these say is raised as well, or we asked for it.
QUIET = {
    "exceptions": logging.CRITICAL,
    "_internal.execution.streaming_executor_state": logging.CRITICAL,
    "_internal.execution.streaming_executor": logging.CRITICAL,
    "_internal.progress": logging.ERROR,
}

log = logging.getLogger("nightrails")


@dataclass(frozen=True)
class Node:
    """What one alive node offers."""

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
    """So many actors, each of which must find its CPUs and GPUs on one node."""

    name: str
    count: int
    cpus: float
    gpus: float = 0.0


def connect(settings: Settings) -> Cluster:
    """Join the cluster this job was submitted to (`RAY_ADDRESS`), else start a local one; safe to call again.

    Raises InputError when the root cannot be seen from every node or the address or token is wrong by itself,
    InfrastructureError when no cluster answers.
    """
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS") or "local"
        try:
            # "local" always starts a new instance, whatever cluster the machine's last `ray start` has left behind.
            ray.init(
                address=address,
                logging_level=logging.ERROR,
                # The workers' output is Ray's own chatter, a line a second from Ray Train alone; their errors arrive
                # as exceptions, and what a person should read comes through pipeline/distributed/messages.py.
                log_to_driver=False,
                include_dashboard=False if address == "local" else None,
            )
        except (AuthenticationError, ValueError) as error:  # no token; an address that is none
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
    """The cluster this process is connected to, as it is now."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    nodes = tuple(Node(resources.get("CPU", 0.0), resources.get("GPU", 0.0)) for resources in alive)
    return Cluster(nodes, is_local=os.environ.get("RAY_ADDRESS") in (None, "", "local"))


def check_root(settings: Settings, cluster: Cluster) -> None:
    """Refuse a root that the workers cannot share."""
    scheme, separator, _ = settings.root.partition("://")
    if separator and scheme == "memory":
        raise InputError("root: memory:// lives in one process, and Ray's workers are others; give a folder or s3://…")
    is_folder = not separator or scheme == "file"
    if is_folder and len(cluster.nodes) > 1 and not settings.root_is_shared:
        raise InputError(
            f"root: {settings.root} is a folder, and this cluster has {len(cluster.nodes)} nodes: each would write to "
            "its own disk. Give s3://bucket/prefix, or set root_is_shared: true when every node mounts this folder"
        )


def preflight(cluster: Cluster, needs: Sequence[ActorNeed]) -> None:
    """Refuse what does not fit: Ray would wait for ever for the missing part, holding the rest.

    Raises InputError on a local cluster, which cannot grow, else InfrastructureError: a node may still join.
    """
    missing = what_is_missing(cluster.nodes, needs)
    if missing:
        way_out = "add a node of this kind, or lower the cluster.* settings"
        error = InputError if cluster.is_local else InfrastructureError
        raise error(f"{cluster}: no place for {missing}; {way_out}")


def what_is_missing(nodes: Sequence[Node], needs: Sequence[ActorNeed]) -> str:
    """Place all actors, those with GPUs first; "" when they fit, else the first kind that does not, in words."""
    free = [[node.cpus, node.gpus] for node in nodes]
    for need in sorted(needs, key=lambda n: (-n.gpus, -n.cpus)):
        placed = 0
        # CPU-only actors leave nodes with GPUs to those who need them, as far as they can.
        for place in sorted(free, key=lambda f: f[1]):
            while placed < need.count and _holds(place, need):
                place[0] -= need.cpus
                place[1] -= need.gpus
                placed += 1
        if placed < need.count:
            gpus = f" and {need.gpus:g} GPUs" if need.gpus else ""
            return f"{need.count - placed} of {need.count} {need.name}s of {need.cpus:g} CPUs{gpus} each"
    return ""


def _holds(place: list[float], need: ActorNeed) -> bool:
    rounding = 1e-6  # fractions of a CPU are added and subtracted
    return place[0] + rounding >= need.cpus and place[1] + rounding >= need.gpus


def _set_data_defaults(settings: Settings) -> None:
    """Ray Data as every job wants it; a dataset takes these when it is created."""
    context = DataContext.get_current()
    context.execution_no_progress_timeout_s = settings.cluster.no_progress_minutes * 60
    context.max_consecutive_actor_init_deaths = MAX_DEATHS_WHILE_LOADING
    context.enable_progress_bars = False  # the jobs log their own progress, in units
    context.print_on_execution_start = False
    context.raise_original_map_exception = True  # else our own errors come back as text
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    for name, level in QUIET.items():
        logging.getLogger(f"ray.data.{name}").setLevel(level)
