"""Candidate runs: their units of work, each made durable by a sidecar written after its data; and how to read them."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from typing import Any, Literal

import pyarrow as pa

from pipeline.artifacts import CandidateRun
from pipeline.command import parse_day
from pipeline.errors import InputError
from pipeline.io.commits import RunFile, published, read_run_manifest, table_prefix
from pipeline.io.parquet import read_parquet_bytes, write_parquet_bytes
from pipeline.io.storage import ObjectNotFoundError, Storage, open_storage, put
from pipeline.schema import SCHEMA_VERSION

Sidecar = dict[str, Any]
SIDECAR = re.compile(r"unit-(\d{5,})\.json")
READERS = 16  # sidecars are small: reading them is waiting
FILE_READERS = 4


def write_unit(
    storage: Storage,
    run: CandidateRun,
    unit: int,
    candidates: pa.Table,
    users: pa.Table,
    counts: Mapping[str, float],
) -> Sidecar:
    """Write a unit's tables, then its sidecar. When another attempt was first, its sidecar stands and is returned.

    File keys in the sidecar are relative to the table's root (`run.table_prefix`).
    """
    files = [_write_table(storage, run, unit, name, t) for name, t in (("candidates", candidates), ("users", users))]
    sidecar = {"unit": unit, "files": files, "counts": dict(counts)}
    key = sidecar_key(run, unit)
    data = json.dumps(sidecar, indent=1, sort_keys=True).encode()
    while not storage.create(key, data):
        first = _read_sidecar(storage, key, _sizes(storage, run))
        if first is not None:
            return first
        storage.delete(key)  # it names files that are gone: nothing can be read through it
    return sidecar


def done_units(storage: Storage, run: CandidateRun) -> dict[int, Sidecar]:
    """The units with a valid sidecar: it parses, and each file it names exists with the right size."""
    sizes = _sizes(storage, run)
    keys = [key for key in sizes if SIDECAR.fullmatch(key.removeprefix(f"{run.prefix}/"))]
    with ThreadPoolExecutor(READERS) as pool:
        sidecars = pool.map(lambda key: _read_sidecar(storage, key, sizes), keys)
        return {sidecar["unit"]: sidecar for sidecar in sidecars if sidecar is not None}


def finished_units(storage: Storage, run: CandidateRun, num_units: int) -> dict[int, Sidecar]:
    """The sidecar of every unit. Raises InputError when some are missing."""
    done = done_units(storage, run)
    missing = [unit for unit in range(num_units) if unit not in done]
    if missing:
        raise InputError(
            f"{storage.uri}/{run.prefix}: {len(missing)} of {num_units} units are not there "
            f"(the first is {missing[0]}); run jobs/retrieve.py first"
        )
    return {unit: done[unit] for unit in range(num_units)}


def sidecar_key(run: CandidateRun, unit: int) -> str:
    """Where the sidecar of a unit lies."""
    return f"{run.prefix}/unit-{unit:05d}.json"


def latest_files(
    root: str, name: str, ds: date | str | None = None, table: Literal["candidates", "users"] = "candidates"
) -> list[str]:
    """Paths or URIs of the files that make up a published table, for any reader of Parquet.

    `ds` None is the newest published day. Each file was found with its size. Raises InputError when nothing is
    published or a file is gone.
    """
    storage, files = _published_files(root, name, ds, table)
    return [f"{storage.uri}/{table_prefix(name)}/{file.key}" for file in files]


def read_latest(
    root: str,
    name: str,
    ds: date | str | None = None,
    table: Literal["candidates", "users"] = "candidates",
    columns: Sequence[str] | None = None,
) -> pa.Table:
    """A published table, every file checked against the hash that was published.

    `table="users"` is the accounting. `ds` None is the newest published day. Raises InputError.
    """
    storage, files = _published_files(root, name, ds, table)
    with ThreadPoolExecutor(FILE_READERS) as pool:
        keys = [f"{table_prefix(name)}/{file.key}" for file in files]
        parts = pool.map(lambda key, file: _read_checked(storage, key, file, columns), keys, files)
        return pa.concat_tables(list(parts))


def read_file(storage: Storage, key: str, sha256: str) -> bytes:
    """A file of a run. Raises InputError when it is gone or is not what was written."""
    place = f"{storage.uri}/{key}"
    try:
        data = storage.read(key)
    except ObjectNotFoundError:
        raise InputError(f"{place}: gone since it was written; run jobs/retrieve.py again") from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise InputError(f"{place}: damaged since it was written: its SHA-256 is another; remove it and run again")
    return data


def _read_checked(storage: Storage, key: str, file: RunFile, columns: Sequence[str] | None) -> pa.Table:
    table = read_parquet_bytes(read_file(storage, key, file.sha256), f"{storage.uri}/{key}", columns)
    return table.replace_schema_metadata(None)


def _published_files(root: str, name: str, ds: date | str | None, table: str) -> tuple[Storage, list[RunFile]]:
    storage = open_storage(root)
    day = parse_day(ds) if isinstance(ds, str) else ds
    commit = published(storage, name, day)
    place = f"{storage.uri}/{table_prefix(name)}" + (f" ds={day}" if day else "")
    if commit is None or commit.kind == "retract":
        raise InputError(f"{place}: nothing is published there" + (", it was retracted" if commit else ""))
    files = [file for file in read_run_manifest(storage, name, commit).files if file.table == table]
    folder = f"{table_prefix(name)}/ds={commit.ds.isoformat()}/"
    sizes = {info.key: info.size for info in storage.list(f"{folder}{commit.run_id}/")}
    for file in files:
        found = sizes.get(f"{table_prefix(name)}/{file.key}")
        if found != file.bytes:
            state = "is gone" if found is None else f"has {found} bytes"
            raise InputError(f"{place}: {file.key} {state}; commit {commit.seq} published it with {file.bytes} bytes")
    return storage, files


def _write_table(storage: Storage, run: CandidateRun, unit: int, name: str, table: pa.Table) -> dict[str, Any]:
    footer = {
        "table": run.table,
        "ds": run.ds.isoformat(),
        "run_id": run.run_id,
        "schema_version": str(SCHEMA_VERSION),
    }
    data = write_parquet_bytes(table, footer)
    sha256 = hashlib.sha256(data).hexdigest()
    key = f"{run.prefix}/{name}-{unit:05d}-{sha256[:16]}.parquet"
    put(storage, key, data)
    relative = key.removeprefix(f"{run.table_prefix}/")
    return {"table": name, "key": relative, "bytes": len(data), "rows": table.num_rows, "sha256": sha256}


def _sizes(storage: Storage, run: CandidateRun) -> dict[str, int]:
    return {info.key: info.size for info in storage.list(f"{run.prefix}/")}


def _read_sidecar(storage: Storage, key: str, sizes: Mapping[str, int]) -> Sidecar | None:
    """The sidecar at `key` when it can be trusted, else None: its unit is then computed again."""
    table_prefix = key.partition("/ds=")[0]
    try:
        sidecar: Sidecar = json.loads(storage.read(key))
        sound = all(sizes.get(f"{table_prefix}/{file['key']}") == file["bytes"] for file in sidecar["files"])
        named = {file["table"] for file in sidecar["files"]}
        unit = int(SIDECAR.fullmatch(key.rpartition("/")[2])[1])  # type: ignore[index]
    except (ObjectNotFoundError, ValueError, KeyError, TypeError):
        return None
    return sidecar if sound and named == {"candidates", "users"} and sidecar.get("unit") == unit else None
