"""Publication: a manifest lists the files of a run, and a numbered commit makes the run the table of its day.

A commit is one create-if-absent of the next number; the second writer loses. Readers see only the last commit.
"""

import getpass
import hashlib
import logging
import os
import re
import socket
import uuid
from datetime import date
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field

from pipeline.artifacts import FORMAT, CandidateRun, Count, FileEntry
from pipeline.config import Config
from pipeline.errors import ConflictError, InputError, MismatchError, NightrailsError
from pipeline.io.artifacts import now, parse
from pipeline.io.storage.base import ObjectNotFoundError, Storage, check_key, put_hashed
from pipeline.settings import TABLE_NAME

COMMIT = re.compile(r".*/_commits/ds=\d{4}-\d{2}-\d{2}/\d{12}\.json")
REMEDY = "read the table with the version of nightrails that published it, or publish the night again"

log = logging.getLogger("nightrails")


class RunFile(FileEntry):
    """One file of a run; `key` is relative to the table's root."""

    table: Literal["candidates", "users"]
    unit: int
    min_user_id: str | int | None  # None when the file has no rows
    max_user_id: str | int | None


class RunManifest(Config):
    """The files and figures of a run. It holds no time, so that the same run has the same manifest."""

    format: int = FORMAT
    table: str
    ds: date
    fp: str
    run_id: str
    files: tuple[RunFile, ...]
    rows: int  # of candidates, in the layout that was written
    schemas: dict[str, dict[str, Any]]  # by table, as `describe_schema` writes them
    counts: dict[str, Count]
    backends: dict[str, Count] = Field(default_factory=dict)  # number of units that each backend searched for
    lineage: dict[str, str]
    settings: dict[str, Any]
    audits: tuple[dict[str, Any], ...]
    warnings: tuple[str, ...] = ()  # about the quality of the run, for people
    versions: dict[str, str]


class Commit(Config):
    """Makes one manifest the table of its day."""

    format: int = FORMAT
    seq: int = Field(ge=1)
    parent: int = Field(ge=0)  # the commit it replaces; 0: none
    ds: date
    fp: str
    run_id: str
    uuid: str  # tells our own commit from another's when the store's answer was lost
    manifest: str  # key relative to the table's root
    manifest_sha256: str
    kind: Literal["publish", "rollback", "retract"] = "publish"
    actor: str
    created_at: str

    def offers(self, run: CandidateRun) -> bool:
        """Whether readers who follow this commit see the run."""
        return self.fp == run.fp and self.kind != "retract"


def table_prefix(table: str) -> str:
    """The key prefix of a table. Raises InputError when `table` cannot be the name of a table."""
    if not TABLE_NAME.fullmatch(table):
        raise InputError(f"{table!r} is no name of a table: use lower-case letters, digits, - and _, at most 63")
    return f"candidates/{table}"


def published(storage: Storage, table: str, ds: date | None = None) -> Commit | None:
    """Read the last commit of a day, or of the newest day with a commit; None when there is no commit."""
    keys = _commit_keys(storage, table, f"ds={ds.isoformat()}/" if ds else "")
    return read_commit(storage, max(keys)) if keys else None


def published_before(storage: Storage, table: str, ds: date) -> Commit | None:
    """Read the last commit of the newest day before `ds` that has a table; None when there is none.

    A day whose last commit retracts its table has none.
    """
    last_of_day = {key.rpartition("/")[0]: key for key in _commit_keys(storage, table)}
    end = commit_key(table, ds, 0)
    for key in sorted((key for key in last_of_day.values() if key < end), reverse=True):
        commit = read_commit(storage, key)
        if commit.kind != "retract":
            return commit
    return None


def _commit_keys(storage: Storage, table: str, day: str = "") -> list[str]:
    """The keys of the commits, in ascending order of day and number."""
    listed = storage.list(f"{table_prefix(table)}/_commits/{day}")
    return [info.key for info in listed if COMMIT.fullmatch(info.key)]


def commit_key(table: str, ds: date, seq: int) -> str:
    """The key of a commit."""
    return f"{table_prefix(table)}/_commits/ds={ds.isoformat()}/{seq:012d}.json"


def read_commit(storage: Storage, key: str) -> Commit:
    """Read the commit at a key from a listing. Raises InputError when it is damaged."""
    return parse(Commit, storage.read(key), f"{storage.uri}/{key}", REMEDY)


def write_run_manifest(storage: Storage, run: CandidateRun, manifest: RunManifest) -> tuple[str, str]:
    """Write the manifest under its own hash. Returns its key, relative to the table's root, and the hash."""
    data = manifest.model_dump_json(indent=1).encode()
    sha256 = hashlib.sha256(data).hexdigest()
    key = f"_manifests/ds={run.ds.isoformat()}/{sha256}.json"
    put_hashed(storage, f"{run.table_prefix}/{key}", data)
    return key, sha256


def read_run_manifest(storage: Storage, table: str, commit: Commit) -> RunManifest:
    """Read the manifest that a commit names.

    Raises InputError when it is gone, or when a key leads out of the table, and MismatchError when it was changed.
    """
    _check_below(table, commit.manifest, f"{storage.uri}/{commit_key(table, commit.ds, commit.seq)}")
    origin = f"{storage.uri}/{table_prefix(table)}/{commit.manifest}"
    try:
        data = storage.read(f"{table_prefix(table)}/{commit.manifest}")
    except ObjectNotFoundError:
        raise InputError(
            f"{origin}: commit {commit.seq} of ds={commit.ds} names this manifest, but it is gone"
        ) from None
    if hashlib.sha256(data).hexdigest() != commit.manifest_sha256:
        raise MismatchError(f"{origin}: changed since commit {commit.seq} of ds={commit.ds} named it; restore it")
    manifest = parse(RunManifest, data, origin, REMEDY)
    for file in manifest.files:
        _check_below(table, file.key, origin)
    return manifest


def propose(run: CandidateRun, head: Commit | None, manifest_key: str, manifest_sha256: str) -> Commit:
    """Build the commit of a run that would follow `head`, the last commit of the day."""
    parent = head.seq if head else 0
    return Commit(
        seq=parent + 1,
        parent=parent,
        ds=run.ds,
        fp=run.fp,
        run_id=run.run_id,
        uuid=uuid.uuid4().hex,
        manifest=manifest_key,
        manifest_sha256=manifest_sha256,
        actor=_actor(),
        created_at=now(),
    )


def commit(storage: Storage, run: CandidateRun, proposal: Commit) -> Commit:
    """Publish the run. Returns the commit that offers it: the proposal, or another process's commit of the same run.

    Raises ConflictError when another run was published since the proposal's parent was read.
    """
    head = published(storage, run.table, run.ds)
    if (head.seq if head else 0) == proposal.parent:
        key = commit_key(run.table, run.ds, proposal.seq)
        if storage.create(key, proposal.model_dump_json(indent=1).encode()):
            return proposal
        head = read_commit(storage, key)
    if head and (head.uuid == proposal.uuid or head.offers(run)):
        return head
    winner = f"{head.run_id} by {head.actor} at {head.created_at} (commit {head.seq})" if head else "a removed commit"
    raise ConflictError(
        f"{storage.uri}/{run.table_prefix} ds={run.ds}: expected commit {proposal.parent} to be the last one, but "
        f"found {winner}; nothing of {run.run_id} was published: wait for the other run, then run again"
    )


def refresh_latest(storage: Storage, table: str) -> None:
    """Copy the newest day's commit to `latest.json`, for people. Readers never use it, so a failure is only logged."""
    try:
        head = published(storage, table)
        if head is None:
            return
        key = f"{table_prefix(table)}/latest.json"
        data = head.model_dump_json(indent=1).encode()
        try:
            if storage.read(key) == data:
                return
        except ObjectNotFoundError:
            pass
        storage.delete(key)
        storage.create(key, data)
    except NightrailsError as error:
        log.warning("latest.json is not up to date: %s", error)


def describe_schema(schema: pa.Schema) -> dict[str, Any]:
    """Describe the columns (name, type, nullable) as plain values, with a hash."""
    columns = [{"name": field.name, "type": str(field.type), "nullable": field.nullable} for field in schema]
    return {"columns": columns, "sha256": hashlib.sha256(repr(columns).encode()).hexdigest()}


def _check_below(table: str, key: str, origin: str) -> None:
    """Raise InputError that names the file `origin` when a key in it, relative to the table, leads out of the table."""
    try:
        check_key(f"{table_prefix(table)}/{key}")
    except InputError:
        raise InputError(
            f"{origin}: it names {key!r}, which is not below the table, so nightrails did not write it; restore it, or "
            "publish the night again"
        ) from None


def _actor() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container's user often has no name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}:{os.getpid()}"
