"""The numbers of actors on clusters of several sizes."""

import pytest

from pipeline.distributed.cluster import Cluster, Node
from pipeline.distributed.runner import max_actors, shards_per_wave
from pipeline.errors import InputError
from pipeline.settings import ClusterSettings


def local(cpus: float) -> Cluster:
    return Cluster((Node(cpus),), is_local=True)


def test_waves_are_as_large_as_the_cluster():
    settings = ClusterSettings(cpus_per_actor=0.25)
    # 4 slots of 1 CPU: encoder, writer, a spare, and one searcher.
    assert shards_per_wave(3, local(1.0), settings) == 1
    assert shards_per_wave(4, local(2.0), settings) == 4
    assert shards_per_wave(6, local(2.0), settings) == 5
    assert shards_per_wave(5, local(64.0), ClusterSettings(cpus_per_actor=0.25, max_stages_per_wave=2)) == 2
    assert shards_per_wave(3, local(4.0), ClusterSettings(cpus_per_actor=0.5, replicas=2)) == 2


def test_a_cluster_without_room_for_one_shard_is_refused():
    with pytest.raises(InputError, match=r"1 of 1 ShardSearchers of 0\.25 CPUs and 1 GPUs each"):
        shards_per_wave(4, local(8.0), ClusterSettings(gpus_per_actor=1.0))
    with pytest.raises(InputError, match="no place for"):
        shards_per_wave(4, local(2.0), ClusterSettings(cpus_per_actor=1.0))


def test_gpus_bound_a_wave():
    two_gpu_nodes = Cluster((Node(8.0), Node(4.0, 2.0), Node(4.0, 2.0)), is_local=False)
    assert shards_per_wave(10, two_gpu_nodes, ClusterSettings(gpus_per_actor=1.0)) == 4


def test_embedders_leave_room_and_share_gpus():
    nodes = Cluster((Node(16.0), Node(16.0, 4.0)), is_local=False)
    assert max_actors(nodes, ClusterSettings()) == 8
    assert max_actors(nodes, ClusterSettings(gpus_per_actor=2.0)) == 2
    assert max_actors(Cluster((Node(2.0),), is_local=True), ClusterSettings()) == 1
