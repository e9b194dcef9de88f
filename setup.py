"""The native kernels, one shared library per instruction set. Without a C++ compiler the rest installs all the
same. Everything else about the package is in pyproject.toml."""

import platform
import runpy
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

NATIVE = "pipeline/native"
BUILD = runpy.run_path(f"{NATIVE}/build.py")


class BuildKernels(build_ext):
    """Compiles as a node does that finds no library for its sources (build.py)."""

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            BUILD["compile_library"](ext.name.rpartition(".")[2], output)
        except BUILD["BuildError"] as error:
            raise CompileError(f"{error}; installing without the native kernels") from error


def libraries() -> list[Extension]:
    """Loaded with ctypes, never imported; `optional` because a machine without a compiler is no reason to stop."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return []
    sources, headers = (
        [str(path) for path in BUILD["source_files"](BUILD["FOLDERS"], pattern)] for pattern in ("*.cpp", "*.h")
    )
    return [
        Extension(f"{NATIVE.replace('/', '.')}.{name}", sources, depends=headers, optional=True)
        for name in BUILD["FLAGS"]
    ]


if __name__ == "__main__":
    setup(ext_modules=libraries(), cmdclass={"build_ext": BuildKernels})
