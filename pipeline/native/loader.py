"""Find the native kernels for this CPU, build them once per node where there are none, and load them.

A library is accepted only when it is whole and made from the sources that lie beside this code. Ray uploads the code of
a submitted job without the files that `.gitignore` names, so the libraries may be elsewhere than the code, or missing.
"""

import ctypes
import fcntl
import json
import logging
import os
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

from pipeline.native.build import (
    FLAGS,
    FOLDER,
    BuildError,
    compile_library,
    is_made_from,
    library_name,
    source_hash,
)
from pipeline.native.interface import FUNCTIONS, declare

log = logging.getLogger("nightrails")

CHOICE = "NIGHTRAILS_NATIVE"
CACHE = "NIGHTRAILS_CACHE"
DISTRIBUTION = "nightrails"
# The flags of /proc/cpuinfo that each instruction set needs.
_AVX512 = {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "avx512_vnni", "fma"}
CPU_FLAGS = {
    "amx": _AVX512 | {"amx_tile", "amx_bf16", "amx_int8"},
    "avx512": _AVX512,
    "avx2": {"avx2", "fma"},
}


@dataclass(frozen=True)
class Kernels:
    """The library that this process uses and the file it came from, or the reason why there is none."""

    functions: ctypes.CDLL | None  # of the loaded library
    origin: str = ""
    reason: str = ""

    @property
    def instruction_set(self) -> str:
        return self.functions.nr_instruction_set().decode() if self.functions else ""


@cache
def native_kernels() -> Kernels:
    """The best library that this CPU can run; says once in the log which it is and where it came from, or why none.

    The environment variable NIGHTRAILS_NATIVE names one instruction set, or `off`.
    """
    choice = os.environ.get(CHOICE, "")
    names = [name for name in FLAGS if CPU_FLAGS[name] <= cpu_flags() and choice in ("", name)]
    kernels = Kernels(None, reason=f"{CHOICE}={choice}" if choice else "this CPU has neither AVX2 nor AVX-512")
    for name in names:
        kernels = find_library(name)
        if kernels.functions is not None:
            log.info("native kernels for %s from %s", name, kernels.origin)
            return kernels
    log.info("no native kernels: %s", kernels.reason)
    return kernels


def find_library(name: str) -> Kernels:
    """Load the library for one instruction set from the first place where it can be loaded."""
    reason = "no folder that is ours alone to build in"
    try:
        for path in _libraries(name):
            try:
                library = load_library(path)
            except OSError as error:  # built for another system, or on a disk that may not hold programs
                log.warning("native kernels: %s", error)
                reason = str(error)
                continue
            return Kernels(library, str(path), "" if library else "Linux does not lend AMX's tiles to this process")
    except BuildError as error:
        reason = str(error)
    return Kernels(None, reason=f"no kernels: {reason}")


def load_library(path: Path) -> ctypes.CDLL | None:
    """Load a library; None when Linux does not lend AMX's tiles to this process, so that its first tile would end it.

    Raises OSError when the file cannot be loaded.
    """
    library = ctypes.CDLL(str(path))
    declare(library, FUNCTIONS)
    return library if library.nr_is_usable() else None


def cache_folders() -> list[Path]:
    """The folders for libraries that a node has built: in the user's cache, and for users without one in /tmp."""
    temporary = Path(tempfile.gettempdir()) / f"{DISTRIBUTION}-{os.geteuid()}"
    if own := os.environ.get(CACHE):
        return [Path(own) / "kernels", temporary]
    try:
        parent = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a user whom the system does not know has no home
        return [temporary]
    return [parent / DISTRIBUTION / "kernels", temporary]


@cache
def cpu_flags() -> frozenset[str]:
    """The CPU's features by Linux's names; empty on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())


def _libraries(name: str) -> Iterator[Path]:
    """The files that hold this library, nearest first. The last ones are compiled when they are asked for."""
    wanted = source_hash(name)
    for folder in (FOLDER, *_installed_folders()):
        path = folder / library_name(name)
        if is_made_from(path, wanted):
            yield path
    for folder in cache_folders():
        path = folder / f"{name}-{wanted[:16]}.so"
        try:
            if not _is_ours_alone(folder):
                log.warning("native kernels: %s is not used: others may write to it", folder)
                continue
            if not is_made_from(path, wanted):
                _build_once(name, path, wanted)
        except OSError as error:
            log.info("native kernels: %s is not used: %s", folder, error)
            continue
        yield path


def _installed_folders() -> Iterator[Path]:
    """The kernel folders of the installed package: in a wheel's files, or in the checkout of an editable install."""
    within = FOLDER.relative_to(FOLDER.parents[1])  # pipeline/native
    for distribution in distributions(name=DISTRIBUTION):
        yield Path(str(distribution.locate_file(within)))
        origin = json.loads(distribution.read_text("direct_url.json") or "{}")
        if origin.get("dir_info", {}).get("editable"):
            yield Path(url2pathname(urlparse(origin["url"]).path)) / within


def _is_ours_alone(folder: Path) -> bool:
    """Make the folder if it is missing; return whether nobody else can put a library into it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.lstat()
    is_private = stat.S_ISDIR(status.st_mode) and not status.st_mode & 0o077
    return is_private and status.st_uid == os.geteuid()


def _build_once(name: str, path: Path, wanted: str) -> None:
    """Compile the library, or wait for another process of this node to do so."""
    with open(path.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not is_made_from(path, wanted):
            log.info("native kernels: compiling for %s, once on this node", name)
            compile_library(name, path)
