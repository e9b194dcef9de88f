import hashlib
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.artifacts import CandidateRun
from pipeline.errors import ConflictError, InputError
from pipeline.io.publication.commits import (
    Commit,
    RunFile,
    RunManifest,
    commit,
    commit_key,
    propose,
    published,
    read_run_manifest,
    refresh_latest,
    write_run_manifest,
)
from pipeline.io.publication.reader import latest_files, read_latest
from pipeline.io.publication.units import Sidecar, finished_units, units_of, write_unit
from pipeline.io.storage import open_storage
from pipeline.io.storage.base import Storage
from pipeline.schema import SCHEMA_VERSION
from tests.quality.nights import fresh_memory
from tests.quality.units import DS, make_unit

RUN = CandidateRun("home", DS, "0123456789abcdef")
OTHER = CandidateRun("home", DS, "other00000000000")


def write_units(storage: Storage, run: CandidateRun = RUN, num_units: int = 2) -> list[Sidecar]:
    units = (make_unit(run_id=run.run_id, first_user=100 * unit).tables() for unit in range(num_units))
    return [write_unit(storage, run, unit, *tables, 90, {"ok": 9}) for unit, tables in enumerate(units)]


def manifest_of(run: CandidateRun, sidecars: list[Sidecar]) -> RunManifest:
    files = tuple(
        RunFile(**file.model_dump(), table=table, unit=unit, min_user_id=None, max_user_id=None)
        for unit, sidecar in enumerate(sidecars)
        for table, file in (("candidates", sidecar.candidates), ("users", sidecar.users))
    )
    return RunManifest(
        table=run.table,
        ds=run.ds,
        fp=run.fp,
        run_id=run.run_id,
        files=files,
        rows=0,
        schemas={},
        counts={},
        lineage={},
        settings={},
        audits=(),
        versions={},
    )


def publish(storage: Storage, run: CandidateRun = RUN) -> Commit:
    manifest = manifest_of(run, write_units(storage, run))
    proposal = propose(run, published(storage, run.table, run.ds), *write_run_manifest(storage, run, manifest))
    return commit(storage, run, proposal)


class TestUnits:
    def test_a_unit_is_done_when_its_sidecar_is_there(self, storage: Storage) -> None:
        assert units_of(storage, RUN).done() == {}
        sidecars = write_units(storage)
        assert units_of(storage, RUN).done() == dict(enumerate(sidecars))
        assert finished_units(storage, RUN, 2) == units_of(storage, RUN).done()
        with pytest.raises(InputError, match=r"1 of 3 units are not there \(the first is 2\); run jobs/retrieve"):
            finished_units(storage, RUN, 3)

    def test_file_names_carry_the_hash_of_the_content_and_footers_the_run(self) -> None:
        storage = open_storage(fresh_memory())
        (sidecar,) = write_units(storage, num_units=1)
        for table, file in (("candidates", sidecar.candidates), ("users", sidecar.users)):
            data = storage.read(f"candidates/home/{file.key}")
            assert file.sha256 == hashlib.sha256(data).hexdigest()
            assert file.key == f"2026-11-20/{RUN.run_id}/{table}-00000-{file.sha256[:16]}.parquet"
            assert (file.bytes, file.rows) == (len(data), pq.read_metadata(pa.BufferReader(data)).num_rows)
            footer = pq.read_metadata(pa.BufferReader(data)).metadata
            assert (footer[b"run_id"], footer[b"schema_version"]) == (RUN.run_id.encode(), str(SCHEMA_VERSION).encode())

    def test_a_unit_that_is_computed_twice_is_written_once(self) -> None:
        storage = open_storage(fresh_memory())
        (first,) = write_units(storage, num_units=1)
        before = storage.list()
        candidates, users = make_unit(run_id=RUN.run_id).tables()
        assert write_unit(storage, RUN, 0, candidates, users, 90, {"ok": 9}) == first
        assert storage.list() == before

    def test_of_two_attempts_with_other_bytes_the_first_stands(self) -> None:
        storage = open_storage(fresh_memory())
        (first,) = write_units(storage, num_units=1)
        candidates, users = make_unit(seed=5, run_id=RUN.run_id).tables()
        assert write_unit(storage, RUN, 0, candidates, users, 90, {"ok": 9}) == first
        assert units_of(storage, RUN).done() == {0: first}

    @pytest.mark.parametrize("damage", ["gone", "shorter"])
    def test_a_unit_whose_file_is_lost_is_to_do_and_can_be_done_again(self, damage: str) -> None:
        storage = open_storage(fresh_memory())
        sidecars = write_units(storage)
        key = f"candidates/home/{sidecars[1].candidates.key}"
        data = storage.read(key)
        storage.delete(key)
        if damage == "shorter":
            storage.create(key, data[:-1])
        assert list(units_of(storage, RUN).done()) == [0]
        storage.delete(key)
        assert write_units(storage)[1] == sidecars[1]
        assert units_of(storage, RUN).done() == dict(enumerate(sidecars))

    @pytest.mark.parametrize(
        "data",
        [b"", b"{", b"[]", b"null", b'{"num_candidates": 1}', b'{"candidates": {"key": 1}, "users": {"key": 2}}'],
    )
    def test_a_sidecar_that_cannot_be_trusted_counts_for_nothing(self, data: bytes) -> None:
        storage = open_storage(fresh_memory())
        storage.create(units_of(storage, RUN).key(0), data)
        assert units_of(storage, RUN).done() == {}
        (sidecar,) = write_units(storage, num_units=1)
        assert units_of(storage, RUN).done() == {0: sidecar}

    def test_units_of_another_run_are_not_ours(self) -> None:
        storage = open_storage(fresh_memory())
        write_units(storage, OTHER)
        assert units_of(storage, RUN).done() == {}


class TestCommits:
    def test_commits_are_numbered_from_one_and_none_is_lost(self, storage: Storage) -> None:
        assert published(storage, "home", DS) is None
        first, second = publish(storage), publish(storage, OTHER)
        assert (first.seq, first.parent, second.seq, second.parent) == (1, 0, 2, 1)
        assert published(storage, "home", DS) == published(storage, "home") == second
        keys = [info.key for info in storage.list("candidates/home/_commits/")]
        assert keys == [commit_key("home", DS, 1), commit_key("home", DS, 2)]
        assert keys[0].endswith("/ds=2026-11-20/000000000001.json")

    def test_a_manifest_is_named_by_its_hash_and_the_same_run_has_the_same(self) -> None:
        storage = open_storage(fresh_memory())
        first = publish(storage)
        assert first.manifest == f"_manifests/ds=2026-11-20/{first.manifest_sha256}.json"
        data = storage.read(f"candidates/home/{first.manifest}")
        assert hashlib.sha256(data).hexdigest() == first.manifest_sha256
        assert write_run_manifest(storage, RUN, manifest_of(RUN, write_units(storage)))[1] == first.manifest_sha256
        assert read_run_manifest(storage, "home", first) == manifest_of(RUN, write_units(storage))

    def test_whoever_is_second_is_told_who_was_first(self) -> None:
        storage = open_storage(fresh_memory())
        place = write_run_manifest(storage, RUN, manifest_of(RUN, []))
        ours, theirs = propose(RUN, None, *place), propose(OTHER, None, *place)
        assert commit(storage, OTHER, theirs) == theirs
        when = re.escape(theirs.created_at)
        with pytest.raises(ConflictError, match=rf"found {OTHER.run_id} by .* at {when} \(commit 1\)"):
            commit(storage, RUN, ours)
        assert published(storage, "home", DS) == theirs

    def test_a_commit_never_fills_a_gap_below_the_last_one(self) -> None:
        storage = open_storage(fresh_memory())
        place = write_run_manifest(storage, RUN, manifest_of(RUN, []))
        ours = propose(RUN, None, *place)
        for run in (OTHER, OTHER):
            commit(storage, run, propose(run, published(storage, "home", DS), *place))
        storage.delete(commit_key("home", DS, 1))
        with pytest.raises(ConflictError, match=r"\(commit 2\)"):
            commit(storage, RUN, ours)

    def test_the_same_run_published_by_another_process_is_fine(self) -> None:
        storage = open_storage(fresh_memory())
        place = write_run_manifest(storage, RUN, manifest_of(RUN, []))
        first = commit(storage, RUN, propose(RUN, None, *place))
        assert commit(storage, RUN, propose(RUN, None, *place)) == first
        assert len(storage.list("candidates/home/_commits/")) == 1

    def test_a_run_that_was_retracted_meanwhile_is_not_taken_for_published(self) -> None:
        storage = open_storage(fresh_memory())
        first = publish(storage)
        ours = propose(RUN, first, first.manifest, first.manifest_sha256)
        gone = first.model_copy(update={"seq": 2, "parent": 1, "kind": "retract", "uuid": "another"})
        storage.create(commit_key("home", DS, 2), gone.model_dump_json().encode())
        with pytest.raises(ConflictError, match=r"\(commit 2\)"):
            commit(storage, RUN, ours)

    @pytest.mark.parametrize("kind", ["publish", "rollback", "retract"])
    def test_our_own_commit_is_recognised_when_its_answer_was_lost(
        self, kind: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        storage = open_storage(fresh_memory())
        place = write_run_manifest(storage, RUN, manifest_of(RUN, []))
        create = storage.create
        monkeypatch.setattr(storage, "create", lambda key, data: create(key, data) and False)
        proposal = propose(RUN, None, *place).model_copy(update={"kind": kind})
        assert commit(storage, RUN, proposal) == proposal

    def test_latest_json_follows_the_newest_day_and_is_written_only_when_it_must(self) -> None:
        storage = open_storage(fresh_memory())
        refresh_latest(storage, "home")
        assert storage.head("candidates/home/latest.json") is None
        for run in (RUN, OTHER):
            made = publish(storage, run)
            refresh_latest(storage, "home")
            assert Commit.model_validate_json(storage.read("candidates/home/latest.json")) == made

    def test_a_latest_json_that_cannot_be_written_harms_nothing(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        storage = open_storage(fresh_memory())
        publish(storage)

        def refuse(*_: object) -> None:
            raise InputError("s3:DeleteObject is not allowed")

        monkeypatch.setattr(storage, "delete", refuse)
        refresh_latest(storage, "home")
        assert "s3:DeleteObject is not allowed" in caplog.text


class TestReaders:
    def test_exactly_the_published_rows_are_read(self, storage: Storage) -> None:
        publish(storage)
        write_units(storage, OTHER)  # computed, not published
        expected = pa.concat_tables(make_unit(run_id=RUN.run_id, first_user=first).tables()[0] for first in (0, 100))
        assert read_latest(storage.uri, "home").equals(expected)
        assert read_latest(storage.uri, "home", DS).equals(expected)
        assert read_latest(storage.uri, "home", "2026-11-20", columns=["item_id"]).equals(expected.select(["item_id"]))
        assert read_latest(storage.uri, "home", table="users").num_rows == 18

    def test_files_are_named_for_any_reader(self, storage: Storage) -> None:
        publish(storage)
        files = latest_files(storage.uri, "home")
        assert len(files) == 2
        for file in files:
            assert file.startswith(f"{storage.uri}/candidates/home/2026-11-20/{RUN.run_id}/candidates-0000")
            assert storage.head(file.removeprefix(f"{storage.uri}/")) is not None

    def test_a_table_of_the_layout_before_is_still_read_and_is_replaced_by_one_of_todays(
        self, storage: Storage, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as before:
            before.setattr(CandidateRun, "prefix", property(lambda run: f"{run.table_prefix}/ds={run.ds}/{run.run_id}"))
            first = publish(storage)
            expected = read_latest(storage.uri, "home")
        assert all("/home/ds=2026-11-20/run-" in file for file in latest_files(storage.uri, "home"))
        assert read_latest(storage.uri, "home").equals(expected)
        assert first.offers(RUN)
        assert publish(storage, OTHER).seq == 2
        assert all(f"/home/2026-11-20/{OTHER.run_id}/" in file for file in latest_files(storage.uri, "home"))

    def test_a_table_that_is_none_of_the_two_is_refused(self) -> None:
        storage = open_storage(fresh_memory())
        publish(storage)
        with pytest.raises(InputError, match="commit 1 names no files of 'user'; ask for 'candidates' or 'users'"):
            read_latest(storage.uri, "home", table="user")  # type: ignore[arg-type]

    def test_what_is_not_published_is_said_with_its_place(self) -> None:
        root = fresh_memory()
        publish(open_storage(root))
        for read in (read_latest, latest_files):
            with pytest.raises(InputError, match=rf"{root}/candidates/other: nothing is published"):
                read(root, "other")
            with pytest.raises(InputError, match=r"home ds=2026-11-19: nothing is published"):
                read(root, "home", "2026-11-19")
            with pytest.raises(InputError, match="no name of a table"):
                read(root, "../home")
            with pytest.raises(InputError, match="YYYY-MM-DD"):
                read(root, "home", "../2026-11-20")

    def test_a_retracted_day_is_not_read(self) -> None:
        storage = open_storage(fresh_memory())
        last = publish(storage)
        gone = last.model_copy(update={"seq": 2, "parent": 1, "kind": "retract"})
        storage.create(commit_key("home", DS, 2), gone.model_dump_json().encode())
        with pytest.raises(InputError, match="it was retracted"):
            read_latest(storage.uri, "home")
        assert publish(storage).seq == 3  # and can be published again

    def test_damage_is_found_and_named(self) -> None:
        storage = open_storage(fresh_memory())
        publish(storage)
        key = latest_files(storage.uri, "home")[0].removeprefix(f"{storage.uri}/")
        data = storage.read(key)
        for damaged, says in (
            (data[:-1], "has .* bytes; commit 1 published it with"),
            (data[:50] + bytes([data[50] ^ 1]) + data[51:], "damaged, its SHA-256 is not the one that was written"),
            (None, "is gone; commit 1 published it"),
        ):
            storage.delete(key)
            if damaged is not None:
                storage.create(key, damaged)
            with pytest.raises(InputError, match=says):
                read_latest(storage.uri, "home")

    def test_a_manifest_that_was_changed_is_refused(self) -> None:
        storage = open_storage(fresh_memory())
        made = publish(storage)
        key = f"candidates/home/{made.manifest}"
        changed = json.dumps(json.loads(storage.read(key)) | {"rows": 1}).encode()
        storage.delete(key)
        with pytest.raises(InputError, match="but it is gone"):
            read_latest(storage.uri, "home")
        storage.create(key, changed)
        with pytest.raises(InputError, match="changed since commit 1"):
            read_latest(storage.uri, "home")
