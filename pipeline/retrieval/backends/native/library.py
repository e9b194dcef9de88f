"""Finding and loading the native kernels: one shared library per instruction set, made by the package's build."""

import ctypes
import importlib.util
import logging
import os
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

log = logging.getLogger("nightrails")

CHOICE = "NIGHTRAILS_NATIVE"
# Best first, each with what /proc/cpuinfo must say.
_AVX512 = {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "avx512_vnni", "fma"}
LIBRARIES = {
    "amx": _AVX512 | {"amx_tile", "amx_bf16", "amx_int8"},
    "avx512": _AVX512,
    "avx2": {"avx2", "fma"},
}
# Linux lends the tiles of AMX to a process that asks: arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA).
ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA = 158, 0x1023, 18
HUGE_PAGE = 2 << 20
MADV_HUGEPAGE = 14


@cache
def native_library() -> ctypes.CDLL | None:
    """The best library that this CPU can run, None where there is none; says once which it is, or why not.

    The environment variable NIGHTRAILS_NATIVE names one instruction set, or `off`.
    """
    choice = os.environ.get(CHOICE, "")
    if choice == "off":
        log.info("native kernels are switched off by %s; searching with PyTorch", CHOICE)
        return None
    flags = cpu_flags()
    for name, needed in LIBRARIES.items():
        if choice and name != choice:
            continue
        path = library_path(name)
        if path is not None and needed <= flags and (name != "amx" or may_use_tiles()):
            log.info("native kernels for %s", name)
            return load_library(path)
    reason = "there is none for this CPU" if any(map(library_path, LIBRARIES)) else "none was built: no C++ compiler?"
    log.info("no native kernels (%s); searching with PyTorch, many times slower", reason)
    return None


@cache
def may_use_tiles() -> bool:
    """Ask for AMX's tiles; threads that are started later have them too."""
    libc = ctypes.CDLL(None, use_errno=True)
    asked = [ctypes.c_long(number) for number in (ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA)]
    return bool(libc.syscall(*asked) == 0)


def library_path(name: str) -> Path | None:
    """Where the build has put the library for an instruction set."""
    found = importlib.util.find_spec(f"pipeline.retrieval.backends.native.{name}")
    return Path(found.origin) if found and found.origin else None


def load_library(path: Path) -> ctypes.CDLL:
    """The library with its functions declared."""
    library = ctypes.CDLL(str(path))
    library.nr_num_blocks.restype = ctypes.c_int64
    library.nr_peak.restype = ctypes.c_double
    return library


@cache
def cpu_flags() -> frozenset[str]:
    """What the CPU can do, as Linux names it; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())


def huge_pages(num: int, dtype: torch.dtype) -> Tensor:
    """A tensor of zeros on a 2 MiB boundary, on huge pages where the kernel gives them: rows are read at random."""
    size = num * dtype.itemsize
    buffer = torch.empty(size + HUGE_PAGE, dtype=torch.uint8)
    start = -buffer.data_ptr() % HUGE_PAGE
    part = buffer[start : start + size]
    libc = ctypes.CDLL(None, use_errno=True)
    if hasattr(libc, "madvise") and size >= HUGE_PAGE:
        libc.madvise(ctypes.c_void_p(part.data_ptr()), ctypes.c_size_t(size), ctypes.c_int(MADV_HUGEPAGE))
    return part.zero_().view(dtype)
