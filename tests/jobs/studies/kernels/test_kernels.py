"""The studies of GPU kernels, as far as a machine without a GPU can run them."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="pip install 'nightrails[gpu]'"),
]
STUDY = Path(__file__).parents[4] / "jobs/study.py"


def run(*words: str) -> str:
    """In a process of its own: whether Triton interprets is decided once per process."""
    return subprocess.run([sys.executable, STUDY, *words], capture_output=True, text=True, check=True).stdout


def test_a_product_of_bfloat16_uses_hoppers_matrix_units_and_spills_nothing():
    lines = run("gpu-compile", "products bfloat16 × 64").splitlines()
    assert {line.split()[4] for line in lines} >= {"bin_maxima_kernel:", "mark_kernel:", "gathered_products_kernel:"}
    (maxima,) = (line for line in lines if "bin_maxima_kernel" in line)
    assert "HGMMA" in maxima
    assert "STL" not in maxima


def test_speed_and_correctness_of_every_part_are_reported():
    printed = run("gpu-speed", "--num-queries", "4", "--num-items", "200")
    for part in ("stage 1 mean: fused", "rank 128: torch", "rank 128 int8", "stage 2 float32", "rescoring", "scan"):
        assert printed.count(part) >= 2  # for 32 and for 64 pairs
