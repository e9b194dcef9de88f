"""Which backend is chosen, and what is said when it cannot be the one that was asked for."""

import pytest

from pipeline.errors import InputError
from pipeline.native.backend import Backend
from pipeline.native.loader import Kernels
from pipeline.retrieval import backends
from pipeline.retrieval.backends import describe_backend, require_backend
from pipeline.settings import SearchSettings


def chosen(backend: str, device_type: str) -> Backend:
    return describe_backend(SearchSettings(backend=backend), device_type)


def test_without_kernels_auto_falls_back_to_pytorch_and_says_why(monkeypatch):
    monkeypatch.setattr(backends, "native_kernels", lambda: Kernels(None, reason="no kernels: no C++ compiler"))
    assert chosen("auto", "cpu") == Backend("torch", "no kernels: no C++ compiler")
    require_backend(chosen("auto", "cpu"), SearchSettings())
    with pytest.raises(InputError, match=r"native on node a: no kernels: no C\+\+ compiler; set search.backend=auto"):
        require_backend(chosen("native", "cpu"), SearchSettings(backend="native"), " on node a")


def test_pytorch_is_no_fallback_where_it_was_asked_for_or_is_the_fastest():
    assert chosen("torch", "cpu") == chosen("torch", "cuda") == chosen("auto", "cuda") == Backend("torch")


def test_kernels_of_the_other_kind_of_device_are_refused(monkeypatch):
    assert "GPU" in chosen("native", "cuda").reason
    assert "needs a GPU" in chosen("triton", "cpu").reason
    monkeypatch.setattr(backends, "find_spec", lambda name: None)
    assert "pip install" in chosen("triton", "cuda").reason
