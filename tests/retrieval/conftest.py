import os

import pytest
import torch

from pipeline.native.loader import native_kernels
from tests.retrieval import worlds

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """For all tests of this folder."""


@pytest.fixture(params=["torch", "native"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each backend that this machine has; `worlds.open_index` opens it.

    Triton runs in its interpreter, so slowly that a test file must ask for it, with the mark `slow`.
    """
    name: str = request.param
    if name == "native" and native_kernels().functions is None:
        pytest.skip("no kernels were built for this CPU")
    if name == "triton":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("these worlds are on the CPU, where a compiled kernel cannot read them")
    monkeypatch.setattr(worlds, "BACKEND", name)
    return name
