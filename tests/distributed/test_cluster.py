import pytest

from pipeline.distributed import cluster
from pipeline.distributed.cluster import (
    ActorNeed,
    Cluster,
    Node,
    check_root,
    connect,
    num_fitting,
    preflight,
    require,
)
from pipeline.errors import InfrastructureError, InputError
from pipeline.settings import Settings

ONE_NODE = Cluster((Node(4.0),), is_local=True)
THREE_NODES = Cluster((Node(0.0), Node(8.0, 1), Node(8.0, 1)), is_local=False)


def test_a_folder_is_refused_as_root_of_several_nodes():
    with pytest.raises(InputError, match=r"3 nodes.*root_is_shared"):
        check_root(Settings(root="/data"), THREE_NODES)
    with pytest.raises(InputError, match="3 nodes"):
        check_root(Settings(root="file:///data"), THREE_NODES)
    check_root(Settings(root="/data", root_is_shared=True), THREE_NODES)
    check_root(Settings(root="s3://bucket/prefix"), THREE_NODES)
    check_root(Settings(root="/data"), ONE_NODE)


def test_a_root_in_memory_is_refused_because_workers_are_other_processes():
    with pytest.raises(InputError, match="memory://"):
        check_root(Settings(root="memory://x"), ONE_NODE)


def test_what_does_not_fit_is_named():
    needs = [ActorNeed("searcher", 3, cpus=1.0, gpus=1.0), ActorNeed("encoder", 1, cpus=0.25)]
    with pytest.raises(InfrastructureError, match="1 of 3 searchers of 1 CPUs and 1 GPUs each"):
        require(THREE_NODES, needs)
    with pytest.raises(InputError, match="3 of 3 searchers"):
        require(ONE_NODE, needs)
    with pytest.raises(InputError, match=r"1 of 2 searchers of 1 CPUs and 5\.0 GB of memory each"):
        require(Cluster((Node(4.0, memory=9e9),), is_local=True), [ActorNeed("searcher", 2, 1.0, memory=5 * 10**9)])


@pytest.mark.parametrize(
    ("node", "need", "num"),
    [
        (Node(4.0), ActorNeed("", 99, 0.25), 16),
        (Node(8.0, 2), ActorNeed("", 99, 0.1, gpus=0.6), 2),  # not int(2 / 0.6): a share comes from one GPU
        (Node(8.0, 2), ActorNeed("", 99, 0.1, gpus=0.5), 4),
        (Node(8.0, 3), ActorNeed("", 99, 0.1, gpus=1 / 3), 9),
        (Node(8.0, 3), ActorNeed("", 99, 0.1, gpus=2.0), 1),
        (Node(1.0, 3), ActorNeed("", 99, 0.5, gpus=1.0), 2),
        (Node(8.0, memory=10e9), ActorNeed("", 99, 0.1, memory=4 * 10**9), 2),
        (Node(8.0, 1), ActorNeed("", 5, 0.1, gpus=0.1), 5),
    ],
)
def test_each_resource_bounds_the_actors_of_a_node(node, need, num):
    assert num_fitting([node], need) == num
    assert num_fitting([node, Node(0.0), node], need) == min(2 * num, need.count)


def test_actors_of_several_kinds_share_the_nodes():
    require(THREE_NODES, [ActorNeed("searcher", 2, cpus=1.0, gpus=1.0), ActorNeed("encoder", 14, cpus=1.0)])
    # Half a GPU is free on each of two nodes, which is not one GPU.
    with pytest.raises(InfrastructureError, match="1 of 2 searchers"):
        require(THREE_NODES, [ActorNeed("trainer", 1, 1.0, gpus=1.0), ActorNeed("searcher", 2, 1.0, gpus=0.6)])


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[Cluster]:
    """The clusters that are seen, one after the other, without a wait between them; the last one stays."""
    clusters: list[Cluster] = []
    monkeypatch.setattr(cluster, "describe", lambda: clusters.pop(0) if len(clusters) > 1 else clusters[0])
    monkeypatch.setattr(cluster, "SECONDS_BETWEEN_LOOKS", 0.001)
    monkeypatch.setattr(cluster, "request_resources", lambda bundles: asked_for.append(bundles))
    asked_for.clear()
    return clusters


asked_for: list[list[dict[str, float]]] = []
EMPTY = Cluster((Node(1.0),), is_local=False)
NEEDS = [ActorNeed("searcher", 2, cpus=0.5, gpus=1.0)]


def test_a_cluster_that_grows_is_waited_for_and_its_autoscaler_asked(looks):
    looks += [EMPTY, EMPTY, THREE_NODES]
    assert preflight(NEEDS, wait_minutes=1.0) == THREE_NODES
    assert asked_for == [[{"CPU": 0.5, "GPU": 1.0}] * 2, []]


def test_a_cluster_that_does_not_grow_is_not_waited_for_for_ever(looks):
    looks.append(EMPTY)
    with pytest.raises(InfrastructureError, match="2 of 2 searchers"):
        preflight(NEEDS, wait_minutes=0.001)
    assert asked_for[-1] == []


def test_a_local_cluster_is_not_waited_for(looks):
    looks.append(ONE_NODE)
    with pytest.raises(InputError, match="2 of 2 searchers"):
        preflight(NEEDS, wait_minutes=999.0)
    assert asked_for == []


@pytest.mark.ray
def test_connecting_again_joins_the_same_cluster(local_ray, tmp_path):
    first = connect(Settings(root=str(tmp_path)))
    assert connect(Settings(root=str(tmp_path))) == first
    assert first.num_cpus == 4.0
    assert "1 node, 4 CPUs, 0 GPUs" in str(first)
