"""The search backends of the cluster's nodes: asked once, logged, and refused where the one asked for is missing."""

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.distributed.cluster import Cluster
from pipeline.distributed.errors import ray_errors_translated
from pipeline.errors import InfrastructureError
from pipeline.native.backend import Backend
from pipeline.retrieval.backends import describe_backend, require_backend
from pipeline.settings import ClusterSettings, SearchSettings, Settings
from pipeline.stages.devices import device_for

PROBE_SECONDS = 900.0  # a node without kernels for its CPU compiles them first

log = logging.getLogger("nightrails")


@dataclass(frozen=True)
class SearchNode:
    """A node that can hold a shard searcher."""

    host: str
    node_id: str


def check_backends(cluster: Cluster, settings: Settings) -> None:
    """Log the backend of every node, once per process and set of nodes.

    Raises InputError when a node does not have `search.backend`, or no GPU that PyTorch can use where the settings ask
    for GPUs; InfrastructureError when a node does not answer.
    """
    nodes = () if cluster.is_local else search_nodes(settings.cluster)
    _check(nodes, settings.search, settings.cluster.gpus_per_actor)


def search_nodes(settings: ClusterSettings) -> tuple[SearchNode, ...]:
    """The alive nodes with enough CPUs and GPUs for one shard searcher."""
    needed = {"CPU": settings.cpus_per_actor, "GPU": settings.gpus_per_actor}
    return tuple(
        SearchNode(node["NodeManagerHostname"], node["NodeID"])
        for node in sorted(ray.nodes(), key=lambda node: str(node["NodeID"]))
        if node["Alive"] and all(node["Resources"].get(kind, 0.0) >= number for kind, number in needed.items())
    )


def probe_backends(nodes: Sequence[SearchNode], search: SearchSettings, gpus: float) -> Mapping[SearchNode, Backend]:
    """Ask each node for its backend, with a task on that node, which sees a GPU if `gpus` is not 0.

    A node that is lost meanwhile is left out. Raises InfrastructureError when another one does not answer, InputError
    when a GPU cannot be used.
    """
    probe = ray.remote(num_cpus=0, num_gpus=gpus)(usable_backend)
    strategies = [NodeAffinitySchedulingStrategy(node.node_id, soft=False) for node in nodes]
    answers = [probe.options(scheduling_strategy=strategy).remote(search, gpus) for strategy in strategies]
    backends: dict[SearchNode, Backend] = {}
    for node, answer in zip(nodes, answers, strict=True):
        try:
            with ray_errors_translated():
                backends[node] = ray.get(answer, timeout=PROBE_SECONDS)
        except InfrastructureError:
            if node.node_id in {alive["NodeID"] for alive in ray.nodes() if alive["Alive"]}:
                raise
    return backends


def usable_backend(search: SearchSettings, gpus: float) -> Backend:
    """This machine's backend. Raises InputError when `gpus` is not 0 and PyTorch can use no GPU here."""
    return describe_backend(search, device_for(gpus).type)


@cache
def _check(nodes: tuple[SearchNode, ...], search: SearchSettings, gpus: float) -> None:
    """Check the backends of the nodes, or of this machine if there are none: then the cluster is local."""
    if nodes:
        backends = probe_backends(nodes, search, gpus)
    else:
        backends = {SearchNode("this machine", ""): usable_backend(search, gpus)}
    hosts_by_backend: dict[Backend, list[str]] = defaultdict(list)
    for node, backend in backends.items():
        require_backend(backend, search, f" on {node.host}")
        hosts_by_backend[backend].append(node.host)
    for backend, hosts in hosts_by_backend.items():
        _log_backend(backend, hosts)


def _log_backend(backend: Backend, hosts: Sequence[str]) -> None:
    count = "1 node searches" if len(hosts) == 1 else f"{len(hosts)} nodes search"
    if backend.reason:
        names = ", ".join(sorted(set(hosts)))
        log.warning("%s with %s, many times slower: %s (%s)", count, backend.name, backend.reason, names)
    else:
        log.info("%s with %s%s", count, backend.name, f" ({backend.origin})" if backend.origin else "")
