import json

import pytest

from pipeline.artifacts import Manifest
from pipeline.errors import ConflictError, InputError
from pipeline.io.artifacts import file_entry, now, read_manifest, versions, write_manifest
from pipeline.io.storage import open_storage
from pipeline.io.storage.base import Storage


def manifest(*files: bytes, created_at: str = "2026-11-20T00:00:00+00:00") -> Manifest:
    return Manifest(
        kind="corpus",
        id="0123456789abcdef",
        lineage={"model": "fedcba9876543210"},
        settings={"num_shards": 4, "nested": {"x": [1, 2.5, None]}},
        files=tuple(file_entry(f"shard-{i:05d}", data, 10) for i, data in enumerate(files)),
        counts={"items": 20},
        created_at=created_at,
        versions=versions(),
    )


def test_an_artifact_exists_when_its_manifest_does(storage: Storage) -> None:
    assert read_manifest(storage, "corpora/x") is None
    write_manifest(storage, "corpora/x", manifest(b"a", b"b"))
    assert read_manifest(storage, "corpora/x") == manifest(b"a", b"b")
    assert [info.key for info in storage.list()] == ["corpora/x/manifest.json"]


def test_the_same_artifact_may_be_written_again_and_the_first_stands() -> None:
    storage = open_storage("memory://manifests-again")
    write_manifest(storage, "x", manifest(b"a"))
    write_manifest(storage, "x", manifest(b"a", created_at=now()))
    assert read_manifest(storage, "x") == manifest(b"a")


def test_another_artifact_in_its_place_is_a_conflict() -> None:
    storage = open_storage("memory://manifests-conflict")
    write_manifest(storage, "x", manifest(b"a"))
    with pytest.raises(ConflictError, match=r"memory://manifests-conflict/x/manifest\.json"):
        write_manifest(storage, "x", manifest(b"other"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": "one"}, "format"),
        ({"unheard_of": 1}, "unheard_of"),
        ({"files": [{"key": "a"}]}, "files.0.bytes"),
    ],
)
def test_a_damaged_manifest_is_named_with_its_fault(change: dict[str, object], says: str) -> None:
    storage = open_storage(f"memory://manifests-damaged-{says}")
    storage.create("x/manifest.json", json.dumps(manifest().model_dump(mode="json") | change).encode())
    with pytest.raises(InputError, match=rf"x/manifest\.json: not a manifest of ours \({says}"):
        read_manifest(storage, "x")


def test_a_half_written_manifest_is_named() -> None:
    storage = open_storage("memory://manifests-half")
    storage.create("x/manifest.json", b'{"format": 1, "ki')
    with pytest.raises(InputError, match="not a manifest of ours"):
        read_manifest(storage, "x")


def test_the_entry_of_a_file_is_its_size_and_hash() -> None:
    entry = file_entry("k", b"abc", 7)
    assert (entry.key, entry.bytes, entry.rows) == ("k", 3, 7)
    assert entry.sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_versions_name_what_shapes_a_result() -> None:
    assert {"python", "torch", "ray", "pyarrow"} <= versions().keys()
