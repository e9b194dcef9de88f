"""Compile the native kernels, and tell which compiled library was made from the sources of this checkout.

A library holds all kernels for one instruction set: those of training and of the search, and what they share.

Needs the standard library only: `setup.py` loads this file by its path, before anything is installed.
"""

import hashlib
import os
import shlex
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parent  # holds the libraries
# The folders of the sources, whose files have different names.
FOLDERS = (FOLDER, FOLDER.parent / "model/native", FOLDER.parent / "retrieval/backends/native")
AVX512 = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512bf16 -mavx512vnni -mfma"
# The flags of each instruction set, the best set first.
FLAGS = {
    "amx": AVX512,  # its tiles are in assembler
    "avx512": AVX512,
    "avx2": "-mavx2 -mfma",
}
COMMON = "-std=c++17 -O3 -fwrapv -pthread -fno-math-errno -Wno-maybe-uninitialized -Wno-array-bounds -fPIC -shared"
COMPILERS = ("c++", "g++", "clang++")
COMPILER_SECONDS = 600  # ten seconds on an idle core
LAST_LINES = 3  # lines of a failing compiler's output that the error quotes


class BuildError(Exception):
    """There is no compiler, or it failed."""


def library_name(instruction_set: str) -> str:
    """The file name that setuptools gives a library beside the code."""
    return f"{instruction_set}{sysconfig.get_config_var('EXT_SUFFIX')}"


def source_hash(instruction_set: str, folders: Sequence[Path] = FOLDERS) -> str:
    """The hash of the sources in `folders` and of the flags they are compiled with."""
    digest = hashlib.sha256(" ".join(_flags(instruction_set)).encode())
    for path in source_files(folders, "*.cpp", "*.h"):
        digest.update(f"\0{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def source_files(folders: Sequence[Path], *patterns: str) -> list[Path]:
    """The files in `folders` that have a name like one of the patterns, by name."""
    paths = [path for folder in folders for pattern in patterns for path in folder.glob(pattern)]
    return sorted(paths, key=lambda path: path.name)


def is_made_from(path: Path, wanted_hash: str) -> bool:
    """Whether the file is a whole library that carries this source hash. Reads the file and runs none of it."""
    try:
        data = path.read_bytes()
    except OSError:
        return False
    # The section headers end a linked ELF file: their offset, size and number are in the file's first 64 bytes.
    offset, size, number = (int.from_bytes(data[low:high], "little") for low, high in ((40, 48), (58, 60), (60, 62)))
    is_whole = data[:5] == b"\x7fELF\x02" and 0 < offset + size * number <= len(data)
    return is_whole and f"nightrails sources {wanted_hash}\0".encode() in data


def compile_library(
    instruction_set: str, output: Path, sources: Sequence[Path] = (), folders: Sequence[Path] = FOLDERS
) -> None:
    """Compile `sources` (all of `folders` unless given) into `output`, which appears whole or not at all.

    Raises BuildError, with the compiler's last words.
    """
    compiler = shlex.split(os.environ.get("CXX", "")) or [path for path in map(shutil.which, COMPILERS) if path][:1]
    if not compiler:
        raise BuildError("no C++ compiler")
    paths = [str(path) for path in sources or source_files(folders, "*.cpp")]
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}-") as scratch:
        made = Path(scratch) / output.name
        marker = f'-DNR_SOURCE_HASH="{source_hash(instruction_set, folders)}"'
        headers = [f"-I{folder}" for folder in folders]
        command = [*compiler, *_flags(instruction_set), marker, *headers, *paths, "-o", str(made)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILER_SECONDS)
        except subprocess.CalledProcessError as error:
            said = " · ".join(error.stderr.strip().splitlines()[-LAST_LINES:])
            raise BuildError(f"{compiler[0]} ended with {error.returncode}: {said}") from None
        except (OSError, subprocess.TimeoutExpired) as error:
            raise BuildError(f"{compiler[0]}: {error}") from None
        with open(made, "rb") as written:
            os.fsync(written.fileno())
        made.replace(output)


def _flags(instruction_set: str) -> list[str]:
    return [*COMMON.split(), *FLAGS[instruction_set].split(), f"-DNR_{instruction_set.upper()}"]
