"""The native search kernels, one shared library per instruction set. Without a C++ compiler the rest installs all the
same, and the search runs on PyTorch. Everything else about the package is in pyproject.toml."""

import platform
from pathlib import Path

from setuptools import Extension, setup

NATIVE = Path("pipeline/retrieval/backends/native")
AVX512 = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512bf16 -mavx512vnni -mfma"
FLAGS = {
    "amx": AVX512,  # its tiles are in assembler
    "avx512": AVX512,
    "avx2": "-mavx2 -mfma",
}
COMMON = "-std=c++17 -O3 -pthread -fno-math-errno -Wno-maybe-uninitialized -Wno-array-bounds"


def libraries() -> list[Extension]:
    """Loaded with ctypes, never imported; `optional` because a machine without a compiler is no reason to stop."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return []
    return [
        Extension(
            f"pipeline.retrieval.backends.native.{name}",
            sources=sorted(str(path) for path in NATIVE.glob("*.cpp")),
            depends=sorted(str(path) for path in NATIVE.glob("*.h")),
            define_macros=[(f"NR_{name.upper()}", "1")],
            extra_compile_args=COMMON.split() + flags.split(),
            extra_link_args=["-pthread"],
            language="c++",
            optional=True,
        )
        for name, flags in FLAGS.items()
    ]


if __name__ == "__main__":
    setup(ext_modules=libraries())
