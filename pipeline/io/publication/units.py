"""Candidate runs: their units of work, each made durable by a sidecar written after its data; and how to read them."""

import hashlib
import json
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa

from pipeline.artifacts import CandidateRun
from pipeline.errors import InputError
from pipeline.io.parquet import write_parquet_bytes
from pipeline.io.storage.base import ObjectNotFoundError, Storage, put
from pipeline.schema import SCHEMA_VERSION

Sidecar = dict[str, Any]
SIDECAR = re.compile(r"unit-(\d{5,})\.json")
READERS = 16  # sidecars are small: reading them is waiting


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
