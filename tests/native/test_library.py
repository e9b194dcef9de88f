"""Where the native kernels come from, and which files are never loaded."""

import ctypes
import json
import multiprocessing
import os
import shutil
import sys
import tomllib
from pathlib import Path

import pytest

from pipeline.native import build, loader
from pipeline.native.build import (
    FLAGS,
    FOLDER,
    BuildError,
    compile_library,
    is_made_from,
    library_name,
    source_hash,
)
from pipeline.native.loader import CPU_FLAGS, cpu_flags, find_library, load_library, native_kernels
from tests.retrieval.backends.native_libraries import copy_sources, emulated_library

RUNNABLE = [name for name, needed in CPU_FLAGS.items() if needed <= cpu_flags()]
HAS_AVX512 = CPU_FLAGS["avx512"] <= cpu_flags()
GET_PERMISSIONS, TILE_DATA, ARCH_PRCTL = 0x1022, 18, 158
needs_compiler = pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
pytestmark = pytest.mark.skipif(not RUNNABLE, reason="no kernels for this CPU")


@pytest.fixture(autouse=True)
def forget_libraries():
    native_kernels.cache_clear()
    yield
    native_kernels.cache_clear()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of this CPU for the sources of this checkout."""
    path = tmp_path_factory.mktemp("compiled") / library_name(RUNNABLE[0])
    return Path(shutil.copy(find_library(RUNNABLE[0]).origin, path))


@pytest.fixture
def bare(tmp_path: Path, compiled: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout without libraries, no installed package, and an empty cache folder, which is returned.

    The compiler is quick: it copies what the real one has made.
    """
    (tmp_path / "compiler.py").write_text(
        "import shutil, sys\n"
        f"open({str(tmp_path / 'compiled.log')!r}, 'a').write('compiled\\n')\n"
        f"shutil.copy({str(compiled)!r}, sys.argv[sys.argv.index('-o') + 1])\n"
    )
    monkeypatch.setenv("CXX", f"{sys.executable} {tmp_path / 'compiler.py'}")
    checkout = tmp_path / "checkout" / FOLDER.relative_to(FOLDER.parents[1])
    checkout.mkdir(parents=True)
    copy_sources(checkout)
    monkeypatch.setattr(loader, "FOLDER", checkout)
    monkeypatch.setattr(loader, "distributions", lambda name: iter(()))
    monkeypatch.setenv("NIGHTRAILS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(loader.tempfile, "gettempdir", lambda: str(tmp_path))
    return tmp_path / "cache" / "kernels"


def permitted_tiles() -> bool:
    """Whether Linux lends the tiles of AMX to this process."""
    permissions = ctypes.c_uint64()
    asked = [ctypes.c_long(ARCH_PRCTL), ctypes.c_long(GET_PERMISSIONS), ctypes.byref(permissions)]
    answer = ctypes.CDLL(None).syscall(*asked)
    return answer == 0 and bool(permissions.value >> TILE_DATA & 1)


@needs_compiler
@pytest.mark.skipif(not HAS_AVX512, reason="the library for AMX is made of AVX-512 too")
def test_whoever_loads_the_library_for_amx_has_asked_for_the_tiles_or_does_not_get_it(tmp_path):
    compile_library("amx", tmp_path / "amx.so")
    amx = load_library(tmp_path / "amx.so")
    assert (amx is not None) == permitted_tiles()


@needs_compiler
@pytest.mark.skipif(not HAS_AVX512, reason="the library for AMX is made of AVX-512 too")
def test_a_library_whose_tiles_are_refused_is_not_handed_out(tmp_path, monkeypatch):
    refused, lent = tmp_path / "refused.so", tmp_path / "lent.so"
    for path in (refused, lent):
        path.write_bytes(emulated_library())
    monkeypatch.setenv("EMULATED_TILES_ARE_REFUSED", "1")
    assert load_library(refused) is None
    monkeypatch.delenv("EMULATED_TILES_ARE_REFUSED")
    assert load_library(lent) is not None


def test_a_library_says_which_instruction_set_it_is_for():
    for name in RUNNABLE:
        kernels = find_library(name)
        assert kernels.instruction_set == (name if kernels.functions else "")


def test_the_environment_chooses_the_library(monkeypatch):
    for choice in (*RUNNABLE, "off"):
        monkeypatch.setenv("NIGHTRAILS_NATIVE", choice)
        native_kernels.cache_clear()
        kernels = native_kernels()
        assert kernels.instruction_set == (choice if kernels.functions else "")
        assert (kernels.reason == "NIGHTRAILS_NATIVE=off") == (choice == "off")


def test_the_hash_changes_with_any_source_with_its_name_and_with_the_instruction_set(tmp_path):
    copy_sources(tmp_path)
    hashes = {source_hash(name, [tmp_path]) for name in FLAGS}
    assert hashes == {source_hash(name) for name in FLAGS}
    (tmp_path / "lanes.h").write_bytes((tmp_path / "lanes.h").read_bytes() + b"\n")
    hashes.add(source_hash("avx2", [tmp_path]))
    (tmp_path / "lanes.h").rename(tmp_path / "alleys.h")
    hashes.add(source_hash("avx2", [tmp_path]))
    assert len(hashes) == len(FLAGS) + 2


def test_the_wheel_has_all_sources():
    """Without them an installed library could not be told from one of other sources."""
    root = FOLDER.parents[1]
    packages = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert packages == {".".join(folder.relative_to(root).parts): ["*.cpp", "*.h"] for folder in build.FOLDERS}


def test_only_a_whole_file_of_these_sources_is_accepted(compiled, tmp_path):
    wanted, data = source_hash(RUNNABLE[0]), compiled.read_bytes()
    file = tmp_path / "library.so"
    assert is_made_from(compiled, wanted)
    assert not is_made_from(compiled, source_hash(RUNNABLE[0])[::-1])
    assert not is_made_from(tmp_path / "missing.so", wanted)
    for length in (0, 10, 64, len(data) // 2, len(data) - 1):
        file.write_bytes(data[:length])
        assert not is_made_from(file, wanted), length
    file.write_bytes(f"nightrails sources {wanted}\0".encode() * 10)  # the right words, but no library
    assert not is_made_from(file, wanted)


def test_a_library_beside_the_code_is_taken_first(bare, compiled):
    beside = Path(shutil.copy(compiled, loader.FOLDER))
    assert find_library(RUNNABLE[0]).origin == str(beside)
    assert not bare.exists()


@pytest.mark.parametrize("fault", ["of other sources", "cut short", "not a library"])
def test_a_wrong_file_beside_the_code_or_in_the_cache_is_never_loaded(bare, compiled, fault, tmp_path, monkeypatch):
    name, data = RUNNABLE[0], compiled.read_bytes()
    wanted = source_hash(name)
    wrong = {
        "of other sources": data.replace(wanted.encode(), wanted[::-1].encode()),
        "cut short": data[: len(data) * 2 // 3],
        "not a library": b"#!/bin/sh\n",
    }[fault]
    bare.mkdir(mode=0o700, parents=True)
    cached = bare / f"{name}-{wanted[:16]}.so"
    for path in (loader.FOLDER / library_name(name), cached):
        path.write_bytes(wrong)
    loaded: list[Path] = []
    monkeypatch.setattr(loader, "load_library", lambda path: loaded.append(path) or load_library(path))
    assert find_library(name).origin == str(cached)
    assert loaded == [cached]
    assert is_made_from(cached, wanted)  # it was built again


def test_a_checkout_without_libraries_takes_the_installed_ones(bare, compiled, tmp_path, monkeypatch):
    """As Ray unpacks a submitted job: the code shadows the installed package, whose libraries it uses."""
    within = loader.FOLDER.relative_to(tmp_path / "checkout")

    class Installed:
        def __init__(self, root: Path, origin: str | None) -> None:
            self.root, self.origin = root, origin

        def locate_file(self, path):
            return self.root / path

        def read_text(self, name):
            return self.origin if name == "direct_url.json" else None

    for kind in ("wheel", "editable install"):
        root = tmp_path / kind  # with a space in its name
        (root / within).mkdir(parents=True)
        url = json.dumps({"url": root.as_uri(), "dir_info": {"editable": True}})
        installed = Installed(root, None) if kind == "wheel" else Installed(tmp_path / "site-packages", url)
        monkeypatch.setattr(loader, "distributions", lambda name, installed=installed: iter([installed]))
        shutil.copy(compiled, root / within)
        assert find_library(RUNNABLE[0]).origin == str(root / within / library_name(RUNNABLE[0]))
    assert not bare.exists()


@needs_compiler
def test_without_any_the_library_is_built_and_kept_for_the_next_process(bare, monkeypatch, caplog):
    caplog.set_level("INFO", logger="nightrails")
    monkeypatch.delenv("CXX")  # the real compiler
    first = native_kernels()
    assert Path(first.origin).parent == bare
    assert "compiling" in caplog.text
    assert f"native kernels for {first.instruction_set} from {first.origin}" in caplog.text
    assert len(list(bare.glob("*.so"))) == 1  # for the best instruction set only
    monkeypatch.setenv("CXX", "/bin/false")
    native_kernels.cache_clear()
    assert native_kernels().origin == first.origin


def _has_library(name: str) -> None:
    assert find_library(name).functions is not None


def test_processes_that_need_it_at_once_build_it_once(bare, tmp_path):
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_has_library, args=(RUNNABLE[0],)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert (tmp_path / "compiled.log").read_text() == "compiled\n"


def test_without_a_compiler_the_reason_says_so(bare, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    assert native_kernels() == loader.Kernels(None, reason="no kernels: no C++ compiler")


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(bare, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", f"{sys.executable} -c \"raise SystemExit('no room left')\"")
    with pytest.raises(BuildError, match="ended with 1: no room left"):
        compile_library(RUNNABLE[0], tmp_path / "library.so")
    assert "no room left" in find_library(RUNNABLE[0]).reason
    assert not list(bare.glob("*.so"))


@pytest.mark.parametrize("cache", ["/proc", "/proc/nightrails", "/dev/null/nightrails"])
def test_a_home_that_cannot_be_written_to_leaves_the_temporary_folder(bare, cache, tmp_path, monkeypatch):
    monkeypatch.setenv("NIGHTRAILS_CACHE", cache)
    origin = Path(find_library(RUNNABLE[0]).origin)
    assert origin.parent == tmp_path / f"nightrails-{os.geteuid()}"
    assert origin.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("fault", ["writable by others", "a link", "another user's"])
def test_a_cache_folder_that_is_not_ours_alone_is_not_used(bare, fault, tmp_path, monkeypatch, compiled):
    real = bare if fault != "a link" else tmp_path / "elsewhere"
    real.mkdir(mode=0o700, parents=True)
    shutil.copy(compiled, real / f"{RUNNABLE[0]}-{source_hash(RUNNABLE[0])[:16]}.so")
    if fault == "writable by others":
        bare.chmod(0o770)
    elif fault == "a link":
        bare.parent.mkdir()
        bare.symlink_to(real)
    elif os.geteuid() == 0:
        os.chown(bare, 12345, 12345)
    else:
        pytest.skip("only root can make a folder another user's")
    assert Path(find_library(RUNNABLE[0]).origin).parent == tmp_path / f"nightrails-{os.geteuid()}"


@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"NIGHTRAILS_CACHE": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/a/kernels"),
        ({"XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/nightrails/kernels"),
        ({"HOME": "/c"}, "/c/.cache/nightrails/kernels"),
    ],
)
def test_the_environment_says_where_the_cache_is(environment, folder, monkeypatch):
    for name in ("NIGHTRAILS_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert loader.cache_folders()[0] == Path(folder)
