from collections.abc import Iterator

import pytest
import torch

from pipeline.distributed import backends
from pipeline.distributed.backends import SearchNode, check_backends, probe_backends, search_nodes
from pipeline.distributed.cluster import Cluster, Node
from pipeline.errors import InputError
from pipeline.native.backend import Backend
from pipeline.native.loader import Kernels
from pipeline.retrieval.backends import describe_backend
from pipeline.settings import ClusterSettings, SearchSettings, Settings

TWO = (SearchNode("a", "1"), SearchNode("b", "2"))
CLUSTER = Cluster((Node(4.0), Node(4.0)), is_local=False)
NATIVE = Backend("native avx512", origin="/kernels/avx512.so")
NO_COMPILER = Backend("torch", "no kernels: no C++ compiler")


@pytest.fixture(autouse=True)
def forget_answers() -> Iterator[None]:
    backends._check.cache_clear()
    yield
    backends._check.cache_clear()


def settings(backend: str = "auto") -> Settings:
    return Settings(search=SearchSettings(backend=backend))


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[SearchNode, Backend]:
    """The answers of a cluster of two nodes; a test changes them."""
    backend_of = dict.fromkeys(TWO, NATIVE)
    monkeypatch.setattr(backends, "search_nodes", lambda settings: TWO)
    monkeypatch.setattr(backends, "probe_backends", lambda nodes, search, gpus: backend_of)
    return backend_of


def test_nodes_that_search_alike_get_one_line_and_only_once(answers, caplog):
    caplog.set_level("INFO", logger="nightrails")
    for _ in range(3):
        check_backends(CLUSTER, settings())
    assert caplog.messages == ["2 nodes search with native avx512 (/kernels/avx512.so)"]


def test_a_node_that_falls_back_is_named_in_a_warning_with_the_reason(answers, caplog):
    caplog.set_level("INFO", logger="nightrails")
    answers[TWO[1]] = NO_COMPILER
    check_backends(CLUSTER, settings())
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning == "1 node searches with torch, many times slower: no kernels: no C++ compiler (b)"


def test_a_backend_that_one_node_cannot_have_is_refused_with_the_nodes_name(answers):
    answers[TWO[1]] = NO_COMPILER
    with pytest.raises(InputError, match=r"search.backend=native on b: .*no C\+\+ compiler; set search.backend=auto"):
        check_backends(CLUSTER, settings("native"))


def test_a_local_cluster_is_asked_without_ray(monkeypatch, caplog):
    caplog.set_level("INFO", logger="nightrails")
    monkeypatch.setattr(backends, "usable_backend", lambda search, gpus: Backend("cpu"))
    check_backends(Cluster((Node(4.0),), is_local=True), settings())
    assert caplog.messages == ["1 node searches with cpu"]


@pytest.mark.ray
def test_a_node_that_can_hold_a_shard_answers_for_itself(local_ray, monkeypatch):
    expected = describe_backend(SearchSettings(), "cpu")
    here = Kernels(None, reason="not in this process")
    monkeypatch.setattr("pipeline.retrieval.backends.native_kernels", lambda: here)
    (node,) = search_nodes(ClusterSettings())
    assert search_nodes(ClusterSettings(cpus_per_actor=5.0)) == ()
    assert probe_backends([node], SearchSettings(), gpus=0.0) == {node: expected}


@pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch can use a GPU here")
def test_gpus_that_pytorch_cannot_use_are_refused_before_the_search(monkeypatch):
    asked = Settings(cluster=ClusterSettings(gpus_per_actor=0.5))
    with pytest.raises(InputError, match=r"0\.5 GPUs, but PyTorch can use none on .*CPU build.*gpus_per_actor 0"):
        check_backends(Cluster((Node(4.0, 1),), is_local=True), asked)
