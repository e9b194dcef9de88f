import pytest

from pipeline.distributed.cluster import ActorNeed, Cluster, Node, check_root, connect, preflight
from pipeline.errors import InfrastructureError, InputError
from pipeline.settings import Settings

ONE_NODE = Cluster((Node(4.0),), is_local=True)
THREE_NODES = Cluster((Node(0.0), Node(8.0, 1.0), Node(8.0, 1.0)), is_local=False)


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


def test_preflight_names_what_is_missing():
    needs = [ActorNeed("searcher", 3, cpus=1.0, gpus=1.0), ActorNeed("encoder", 1, cpus=0.25)]
    with pytest.raises(InfrastructureError, match="1 of 3 searchers of 1 CPUs and 1 GPUs each"):
        preflight(THREE_NODES, needs)
    with pytest.raises(InputError, match="3 of 3 searchers"):
        preflight(ONE_NODE, needs)


def test_preflight_lets_pass_what_fits_node_by_node():
    preflight(THREE_NODES, [ActorNeed("searcher", 2, cpus=1.0, gpus=1.0), ActorNeed("encoder", 14, cpus=1.0)])
    preflight(ONE_NODE, [ActorNeed("searcher", 16, cpus=0.25)])
    with pytest.raises(InputError, match="1 of 17"):
        preflight(ONE_NODE, [ActorNeed("searcher", 17, cpus=0.25)])
    # Half a GPU is free on each of two nodes, which is not one GPU.
    with pytest.raises(InfrastructureError, match="1 of 2 searchers"):
        preflight(THREE_NODES, [ActorNeed("trainer", 1, 1.0, gpus=1.0), ActorNeed("searcher", 2, 1.0, gpus=0.6)])


@pytest.mark.ray
def test_connecting_again_joins_the_same_cluster(local_ray, tmp_path):
    first = connect(Settings(root=str(tmp_path)))
    assert connect(Settings(root=str(tmp_path))) == first
    assert first.num_cpus == 4.0
    assert "1 node, 4 CPUs, 0 GPUs" in str(first)
