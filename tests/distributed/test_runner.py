"""The numbers of actors on clusters of several sizes."""

import pytest

from pipeline.distributed import runner
from pipeline.distributed.cluster import Cluster, Node
from pipeline.distributed.runner import SHARED_BYTES, RayRunner, num_actors, plan_pools, wave_needs, wave_size
from pipeline.errors import InputError
from pipeline.settings import ClusterSettings, Settings
from pipeline.stages.runner import Actors, Payload, Stage


class Nothing:
    def __call__(self, unit: int, payload: Payload) -> Payload:
        return payload


BESIDE = [Stage(Nothing, {}), Stage(Nothing, {}, Actors.ONE)]  # an encoder and a writer


def local(cpus: float) -> Cluster:
    return Cluster((Node(cpus),), is_local=True)


def size_of_a_wave(num_shards: int, cluster: Cluster, settings: ClusterSettings, memory: int = 0) -> int:
    searcher = Stage(Nothing, {}, gpus=settings.gpus_per_actor, memory=memory)
    return wave_size(cluster, wave_needs([searcher] * num_shards, BESIDE, settings))


def test_waves_are_as_large_as_the_cluster():
    settings = ClusterSettings(cpus_per_actor=0.25)
    # 4 slots of 1 CPU: encoder, writer, a spare, and one searcher.
    assert size_of_a_wave(3, local(1.0), settings) == 1
    assert size_of_a_wave(4, local(2.0), settings) == 4
    assert size_of_a_wave(6, local(2.0), settings) == 5
    assert size_of_a_wave(3, local(4.0), ClusterSettings(cpus_per_actor=0.5, replicas=2)) == 2


def test_a_cluster_without_room_for_one_shard_is_refused():
    with pytest.raises(InputError, match=r"1 of 1 Nothings of 0\.25 CPUs and 1 GPUs and 0\.4 GB of memory"):
        size_of_a_wave(4, local(8.0), ClusterSettings(gpus_per_actor=1.0))
    with pytest.raises(InputError, match="no place for"):
        size_of_a_wave(4, local(2.0), ClusterSettings(cpus_per_actor=1.0))


def test_gpus_and_memory_bound_a_wave():
    two_gpu_nodes = Cluster((Node(8.0), Node(4.0, 2), Node(4.0, 2)), is_local=False)
    assert size_of_a_wave(10, two_gpu_nodes, ClusterSettings(gpus_per_actor=1.0)) == 4
    assert size_of_a_wave(10, two_gpu_nodes, ClusterSettings(gpus_per_actor=0.6)) == 4
    small = Cluster((Node(8.0, memory=10e9),), is_local=True)
    assert size_of_a_wave(10, small, ClusterSettings(), memory=3 * 10**9) == 2  # and each process has its own


def test_embedders_leave_room_and_share_gpus():
    def count(cluster: Cluster, gpus: float = 0.0, num_units: int = 99) -> int:
        return num_actors(Stage(Nothing, {}, Actors.AS_MANY_AS_FIT, gpus), num_units, cluster, ClusterSettings())

    nodes = Cluster((Node(16.0), Node(16.0, 4)), is_local=False)
    assert count(nodes) == 8
    assert count(nodes, gpus=2.0) == 2
    assert count(nodes, gpus=0.6) == 4
    assert count(nodes, num_units=3) == 3
    assert count(local(2.0)) == 1


def test_small_stages_share_their_processes_as_many_as_the_cluster_has_cpus_for():
    def counts(cluster: Cluster, num_units: int = 99, gpus: float = 0.0, memory: int = 1_000, **keys: int) -> list[int]:
        encoder, writer = BESIDE
        stages = [encoder, *[Stage(Nothing, {}, gpus=gpus, memory=memory)] * 3, writer]
        pools = plan_pools(stages, num_units, cluster, ClusterSettings(**keys))
        assert sum(pool.stage.memory for pool in pools) == 3 * memory
        return [pool.num_actors for pool in pools]

    assert counts(local(2.0)) == [2]
    assert counts(local(1.0)) == [1]
    assert counts(local(8.0), threads_per_actor=4) == [2]
    assert counts(local(2.0), threads_per_actor=4) == [1]
    assert counts(local(64.0)) == [5], "as many as there would be without sharing"
    assert counts(local(64.0), num_units=3) == [3]
    assert counts(local(64.0), replicas=2) == [9]
    # Nothing is shared that would be held twice at a price, or that has a GPU, or that does not fit together.
    assert counts(local(64.0), memory=SHARED_BYTES // 3 + 1) == [1] * 5
    assert counts(Cluster((Node(64.0, 8),), is_local=True), gpus=1.0, replicas=2) == [2, 2, 2, 2, 1]
    assert counts(Cluster((Node(64.0, memory=5e8),) * 9, is_local=False), memory=SHARED_BYTES // 3) == [1] * 5


def test_a_cluster_that_is_starting_gets_the_time_to_hold_all_shards(monkeypatch, tmp_path):
    """From no GPU to one and then two: a search that took the first would need twice the waves."""
    one, two = (Cluster((Node(8.0), *[Node(8.0, 1)] * num), is_local=False) for num in (1, 2))
    monkeypatch.setattr(runner, "connect", lambda settings: None)
    monkeypatch.setattr(runner, "wait_for_nodes", lambda needs, minutes: two)
    shards = [Stage(Nothing, {}, gpus=1.0)] * 2
    settings = Settings(root=str(tmp_path))
    for now, expected in ((Cluster((Node(8.0),), is_local=False), 2), (one, 1), (two, 2)):
        monkeypatch.setattr(runner, "describe", lambda now=now: now)
        assert RayRunner(settings).num_fitting(shards, BESIDE) == expected


def test_a_wave_has_at_most_the_stages_that_the_settings_allow(monkeypatch, tmp_path):
    monkeypatch.setattr(runner, "connect", lambda settings: None)
    monkeypatch.setattr(runner, "describe", lambda: local(64.0))
    settings = Settings(root=str(tmp_path), cluster=ClusterSettings(max_stages_per_wave=2))
    assert RayRunner(settings).num_fitting([Stage(Nothing, {})] * 5, BESIDE) == 2
