"""The one protocol: files, claims, manifests; what is half done, damaged, or done twice."""

import json
import uuid
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.artifacts import Artifact, FileEntry, Manifest
from pipeline.config import Config
from pipeline.errors import InfrastructureError, InputError
from pipeline.io.artifacts import (
    Claims,
    file_entry,
    no_objects,
    read_file,
    read_manifest,
    require_manifest,
    seal,
    sizes_of,
    versions,
    write_file,
)
from pipeline.io.storage import open_storage
from pipeline.io.storage.base import Storage
from tests.jobs.crashing import Crash, CrashingStorage

CORPUS = Artifact("corpora", "0123456789abcdef")


class Record(Config):
    files: tuple[FileEntry, ...]
    words: str = ""


def fresh() -> Storage:
    return open_storage(f"memory://{uuid.uuid4().hex}")


def claims_in(storage: Storage, prefix: str = "work") -> Claims[Record]:
    return Claims(storage, prefix, "unit", Record, lambda record: sizes_of(prefix, *record.files))


def do_part(storage: Storage, part: int, data: bytes) -> Record:
    entry = write_file(storage, "work", f"unit-{part:05d}.bin", data, rows=1)
    return claims_in(storage).claim(part, Record(files=(entry,)))


def seal_files(storage: Storage, *files: bytes) -> Manifest:
    entries = [file_entry(f"shard-{number:05d}", data, 10) for number, data in enumerate(files)]
    return seal(
        storage,
        CORPUS,
        kind="corpus",
        lineage={"model": "fedcba9876543210"},
        settings={"num_shards": 4, "nested": {"x": [1, 2.5, None]}},
        files=entries,
        counts={"items": 20},
        measures={"bytes_per_item": 1.5},
    )


# Files


def test_a_files_name_carries_the_hash_of_its_content(storage: Storage) -> None:
    entry = write_file(storage, "corpora/x", "deep/items.parquet", b"abc", rows=7)
    assert entry == write_file(storage, "corpora/x", "deep/items.parquet", b"abc", rows=7)
    assert (entry.bytes, entry.rows) == (3, 7)
    assert entry.sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert entry.key == f"deep/items-{entry.sha256[:16]}.parquet"
    assert read_file(storage, "corpora/x", entry, "make it again") == b"abc"


@pytest.mark.parametrize(("damage", "says"), [(None, "gone since it was written"), (b"abd", "damaged, its SHA-256")])
def test_a_file_that_is_gone_or_damaged_is_named_with_the_remedy(damage: bytes | None, says: str) -> None:
    storage = fresh()
    entry = write_file(storage, "x", "a.bin", b"abc", rows=1)
    storage.delete(f"x/{entry.key}")
    if damage is not None:
        storage.create(f"x/{entry.key}", damage)
    with pytest.raises(InputError, match=rf"{storage.uri}/x/{entry.key}: {says}.*; make it again"):
        read_file(storage, "x", entry, "make it again")


# Claims


def test_a_part_is_done_when_its_claim_and_its_files_are_there(storage: Storage) -> None:
    claims = claims_in(storage)
    assert (claims.done(), claims.read(3), claims.missing([1, 3])) == ({}, None, [1, 3])
    record = do_part(storage, 3, b"data")
    assert claims.done() == {3: record}
    assert (claims.read(3), claims.missing([1, 3])) == (record, [1])
    with pytest.raises(InfrastructureError, match=r"work/unit-00001\.json: gone or damaged; do it again"):
        claims.require(1, "do it again")


def test_of_several_attempts_the_first_stands() -> None:
    storage = fresh()
    first = do_part(storage, 0, b"one")
    assert do_part(storage, 0, b"two") == first
    assert claims_in(storage).done() == {0: first}


@pytest.mark.parametrize("data", [b"", b"{", b"null", b"[]", b'{"files": [{"key": 1}]}', b'{"strange": 1}'])
def test_a_claim_that_cannot_be_read_is_made_again(data: bytes) -> None:
    storage = fresh()
    storage.create("work/unit-00000.json", data)
    assert claims_in(storage).done() == {}
    record = do_part(storage, 0, b"data")
    assert claims_in(storage).done() == {0: record}


@pytest.mark.parametrize("left", [None, b"", b"dat", b"data longer"])
@pytest.mark.parametrize("again", [b"data", b"other"])
def test_a_claim_whose_file_is_lost_is_made_again(left: bytes | None, again: bytes) -> None:
    """By another attempt with other bytes, or by one with the same, whose file has the very name of the damaged one."""
    storage = fresh()
    first = do_part(storage, 0, b"data")
    storage.delete(f"work/{first.files[0].key}")
    if left is not None:
        storage.create(f"work/{first.files[0].key}", left)
    assert claims_in(storage).missing([0]) == [0]
    second = do_part(storage, 0, again)
    assert claims_in(storage).done() == {0: second}
    assert read_file(storage, "work", second.files[0], "") == again


def test_bytes_that_rotted_under_a_name_with_their_hash_are_written_again(storage: Storage) -> None:
    entry = write_file(storage, "work", "a.bin", b"data", rows=1)
    storage.delete(f"work/{entry.key}")
    storage.create(f"work/{entry.key}", b"dat\0")
    assert write_file(storage, "work", "a.bin", b"data", rows=1) == entry
    assert read_file(storage, "work", entry, "") == b"data"


@pytest.mark.parametrize("part", [0, 7, 99_999, 100_000, 12_345_678])
def test_parts_of_any_number_are_found_again(part: int) -> None:
    storage = fresh()
    record = do_part(storage, part, b"data")
    assert claims_in(storage).done() == {part: record}
    assert claims_in(storage).read(part) == record


@pytest.mark.parametrize("name", ["unit-00000.json.bak", "unit-0.json", "unit--0001.json", "unit-0000x.json", "unit-"])
def test_what_is_named_like_a_claim_and_is_none_is_left_alone(name: str) -> None:
    storage = fresh()
    do_part(storage, 3, b"data")
    storage.create(f"work/{name}", storage.read("work/unit-00003.json"))
    storage.create("work/homework/unit-00009.json", storage.read("work/unit-00003.json"))
    assert list(claims_in(storage).done()) == [3]


def test_the_files_of_a_claim_may_lie_above_it(storage: Storage) -> None:
    claims = Claims(storage, "table/run", "unit", Record, lambda record: sizes_of("table", *record.files))
    entry = write_file(storage, "table", "run/a.bin", b"abc", rows=1)
    record = claims.claim(0, Record(files=(entry,)))
    assert (claims.read(0), claims.done()) == (record, {0: record})
    storage.delete(f"table/{entry.key}")
    assert (claims.read(0), claims.done()) == (None, {})


def test_a_claim_without_files_is_all_there_is_to_keep(storage: Storage) -> None:
    claims = Claims(storage, "work", "sample", Record, no_objects)
    first = claims.claim(0, Record(files=(), words="one"))
    assert claims.claim(0, Record(files=(), words="two")) == first == claims.require(0, "")
    assert (claims.missing([2, 0, 1]), claims.missing([])) == ([2, 1], [])


def test_claims_of_another_kind_or_place_are_not_ours() -> None:
    storage = fresh()
    do_part(storage, 0, b"data")
    assert replace(claims_in(storage), stem="shard").done() == {}
    assert claims_in(storage, "other").done() == {}
    Claims(storage, "work", "unit-check", Record, no_objects).claim(7, Record(files=()))
    assert list(claims_in(storage).done()) == [0]


@given(st.lists(st.tuples(st.integers(0, 3), st.binary(max_size=8)), max_size=8))
@settings(max_examples=30)
def test_whoever_does_what_in_which_order_each_part_keeps_its_first_record(
    attempts: Sequence[tuple[int, bytes]],
) -> None:
    storage = fresh()
    firsts: dict[int, Record] = {}
    for part, data in attempts:
        record = do_part(storage, part, data)
        assert record == firsts.setdefault(part, record)
    assert claims_in(storage).done() == firsts


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_death_at_any_operation_leaves_a_part_done_or_to_do_and_never_half_done(when: str) -> None:
    for at in range(1, 20):
        storage = fresh()
        dying = CrashingStorage(storage, at, when)
        try:
            do_part(dying, 0, b"data")
        except Crash:
            pass
        else:
            assert at > 2
            return
        done = claims_in(storage).done()
        assert all(storage.read(f"work/{record.files[0].key}") == b"data" for record in done.values())
        assert do_part(storage, 0, b"data") == claims_in(storage).done()[0]
    pytest.fail("more operations than this test tries")


# Manifests


def test_an_artifact_exists_when_its_manifest_does(storage: Storage) -> None:
    assert read_manifest(storage, CORPUS.prefix) is None
    with pytest.raises(InputError, match=r"corpora/0123456789abcdef: not there; run jobs/embed_items\.py first"):
        require_manifest(storage, CORPUS, "embed_items")
    made = seal_files(storage, b"a", b"b")
    assert read_manifest(storage, CORPUS.prefix) == require_manifest(storage, CORPUS, "embed_items") == made
    assert [info.key for info in storage.list()] == [CORPUS.key("manifest.json")]


def test_a_manifest_says_all_that_it_was_given(storage: Storage) -> None:
    seal_files(storage, b"a", b"bc")
    manifest = require_manifest(storage, CORPUS, "embed_items")
    assert (manifest.format, manifest.kind, manifest.id) == (2, "corpus", CORPUS.id)
    assert manifest.lineage == {"model": "fedcba9876543210"}
    assert manifest.settings == {"num_shards": 4, "nested": {"x": [1, 2.5, None]}}
    assert [(entry.key, entry.bytes, entry.rows) for entry in manifest.files] == [
        ("shard-00000", 1, 10),
        ("shard-00001", 2, 10),
    ]
    assert (manifest.counts, manifest.measures) == ({"items": 20}, {"bytes_per_item": 1.5})
    assert manifest.versions == versions()
    assert datetime.fromisoformat(manifest.created_at).utcoffset() == timedelta(0)


def test_counts_of_the_first_format_are_read_as_whole_numbers() -> None:
    storage = fresh()
    data = json.loads(seal_files(storage).model_dump_json()) | {"format": 1, "counts": {"items": 12.0}}
    storage.delete(CORPUS.key("manifest.json"))
    storage.create(CORPUS.key("manifest.json"), json.dumps(data).encode())
    assert require_manifest(storage, CORPUS, "embed_items").counts == {"items": 12}


def test_of_two_manifests_the_first_stands_and_is_returned() -> None:
    storage = fresh()
    first = seal_files(storage, b"a")
    assert seal_files(storage, b"other") == first
    assert read_manifest(storage, CORPUS.prefix) == first


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": "one"}, "format"),
        ({"unheard_of": 1}, "unheard_of"),
        ({"files": [{"key": "a"}]}, "files.0.bytes"),
        ({"counts": {"items": 1.5}}, "counts.items"),
    ],
)
def test_a_damaged_manifest_is_named_with_its_fault(change: dict[str, object], says: str) -> None:
    storage = fresh()
    data = json.loads(seal_files(storage).model_dump_json()) | change
    storage.delete(CORPUS.key("manifest.json"))
    storage.create(CORPUS.key("manifest.json"), json.dumps(data).encode())
    with pytest.raises(InputError, match=rf"manifest\.json: not written by this version of nightrails \({says}"):
        read_manifest(storage, CORPUS.prefix)


def test_a_half_written_manifest_is_named() -> None:
    storage = fresh()
    storage.create(CORPUS.key("manifest.json"), b'{"format": 1, "ki')
    with pytest.raises(InputError, match=r"not written by this version.*remove the folder to make it again"):
        read_manifest(storage, CORPUS.prefix)


def test_versions_name_what_shapes_a_result() -> None:
    assert {"python", "torch", "ray", "pyarrow"} <= versions().keys()
