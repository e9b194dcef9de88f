"""The units of a candidate run. A unit has two tables and a sidecar, which is written last and makes it done."""

import pyarrow as pa

from pipeline.artifacts import CandidateRun, FileEntry
from pipeline.config import Config
from pipeline.errors import InputError
from pipeline.io.artifacts import Claims, sizes_of, write_file
from pipeline.io.parquet import write_parquet_bytes
from pipeline.io.storage.base import Storage
from pipeline.schema import SCHEMA_VERSION


class Sidecar(Config):
    """The files and counts of a finished unit; keys are relative to the table's root (`run.table_prefix`)."""

    candidates: FileEntry
    users: FileEntry
    num_candidates: int  # user-item pairs, in either layout
    statuses: dict[str, int]  # number of users by status
    backends: tuple[str, ...] = ()  # that searched for its users, as `retrieval.backends.Backend` writes itself

    @property
    def files(self) -> tuple[FileEntry, FileEntry]:
        return self.candidates, self.users


def units_of(storage: Storage, run: CandidateRun) -> Claims[Sidecar]:
    """The claims of a run's units: part n is unit n."""
    return Claims(storage, run.prefix, "unit", Sidecar, lambda sidecar: sizes_of(run.table_prefix, *sidecar.files))


def write_unit(
    storage: Storage,
    run: CandidateRun,
    unit: int,
    candidates: pa.Table,
    users: pa.Table,
    num_candidates: int,
    statuses: dict[str, int],
    backends: tuple[str, ...] = (),
) -> Sidecar:
    """Write a unit's tables, then its sidecar. Returns the sidecar of the first attempt, which stands."""
    sidecar = Sidecar(
        candidates=_write_table(storage, run, f"candidates-{unit:05d}", candidates),
        users=_write_table(storage, run, f"users-{unit:05d}", users),
        num_candidates=num_candidates,
        statuses=statuses,
        backends=backends,
    )
    return units_of(storage, run).claim(unit, sidecar)


def finished_units(storage: Storage, run: CandidateRun, num_units: int) -> dict[int, Sidecar]:
    """Read the sidecar of every unit, by unit. Raises InputError when units are missing."""
    done = units_of(storage, run).done()
    missing = [unit for unit in range(num_units) if unit not in done]
    if missing:
        raise InputError(
            f"{storage.uri}/{run.prefix}: {len(missing)} of {num_units} units are not there "
            f"(the first is {missing[0]}); run jobs/retrieve.py first"
        )
    return {unit: done[unit] for unit in range(num_units)}


def _write_table(storage: Storage, run: CandidateRun, name: str, table: pa.Table) -> FileEntry:
    footer = {
        "table": run.table,
        "ds": run.ds.isoformat(),
        "run_id": run.run_id,
        "schema_version": str(SCHEMA_VERSION),
    }
    data = write_parquet_bytes(table, footer)
    folder = run.prefix.removeprefix(f"{run.table_prefix}/")
    return write_file(storage, run.table_prefix, f"{folder}/{name}.parquet", data, table.num_rows)
