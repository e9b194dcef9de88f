"""Libraries that only tests build."""

import shutil
import tempfile
from functools import cache
from pathlib import Path

from pipeline.native.build import FOLDERS, compile_library, source_files


def copy_sources(folder: Path) -> None:
    """The kernels' sources, in a folder where a test may change them."""
    for path in source_files(FOLDERS, "*.cpp", "*.h"):
        shutil.copy(path, folder)


@cache
def emulated_library() -> bytes:
    """The library for AMX, as a file's content, with a plain model of the tiles in place of the real ones."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_sources(folder)
        shutil.copy(Path(__file__).with_name("emulated_tiles.h"), folder / "tiles.h")
        compile_library("amx", folder / "emulated.so", folders=[folder])
        return (folder / "emulated.so").read_bytes()
