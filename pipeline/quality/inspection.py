"""Reads a finished run back as its readers will, and audits it unit by unit."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.artifacts import CandidateRun, Night
from pipeline.data.histories import Bucket, user_bucket
from pipeline.errors import InvalidRunError
from pipeline.io.artifacts import versions
from pipeline.io.histories import read_bucket, read_items
from pipeline.io.inputs import open_queries, read_user_ids
from pipeline.io.parquet import read_parquet_bytes
from pipeline.io.publication.commits import RunFile, RunManifest, describe_schema
from pipeline.io.publication.units import Sidecar, read_file
from pipeline.io.storage.base import Storage
from pipeline.io.tuning import TuningRecord
from pipeline.quality.gates import Verdict
from pipeline.quality.promises import Expected, UnitAudit, audit_unit, require_sound
from pipeline.schema import SCHEMA_VERSION
from pipeline.settings import Settings

UNITS_AT_A_TIME = 2  # each holds a bucket's tables in memory

RequestedUsers = Callable[[int, Bucket], pa.Array]


@dataclass(frozen=True)
class Inspection:
    """What was found: the files, in order of unit, each unit's audit, and the schemas by table."""

    files: tuple[RunFile, ...]
    audits: tuple[UnitAudit, ...]
    schemas: dict[str, pa.Schema]


def inspect_run(storage: Storage, night: Night, settings: Settings, sidecars: Mapping[int, Sidecar]) -> Inspection:
    """Re-hash and audit every file that the sidecars name.

    Raises InputError for a damaged file and InvalidRunError for the first unit that breaks a promise.
    """
    item_ids = read_items(storage, night.histories)["item_id"].combine_chunks()
    requested_users = requested_by_unit(settings, night.ds)

    def inspect(unit: int) -> tuple[list[RunFile], UnitAudit, dict[str, pa.Schema]]:
        bucket = read_bucket(storage, night.histories, unit)
        expected = Expected(
            requested=requested_users(unit, bucket),
            histories=bucket,
            item_ids=item_ids,
            k=settings.search.k,
            layout=settings.output.layout,
            surface=settings.output.surface,
            ds=night.ds,
            model_version=night.checkpoint.id,
            run_id=night.run.run_id,
        )
        tables = {file["table"]: _read_table(storage, night.run, file) for file in sidecars[unit]["files"]}
        audit = audit_unit(tables["candidates"], tables["users"], expected)
        require_sound(audit, " and ".join(f"{night.run.table_prefix}/{f['key']}" for f in sidecars[unit]["files"]))
        files = [_run_file(unit, file, tables[file["table"]]) for file in sidecars[unit]["files"]]
        return files, audit, {name: table.schema for name, table in tables.items()}

    with ThreadPoolExecutor(UNITS_AT_A_TIME) as pool:
        found = list(pool.map(inspect, sorted(sidecars)))
    files = tuple(file for unit_files, _, _ in found for file in unit_files)
    return Inspection(files, tuple(audit for _, audit, _ in found), found[0][2])


def requested_by_unit(settings: Settings, ds: date) -> RequestedUsers:
    """The users that each unit must account for: those of the queries table, else everybody with a history."""
    queries = open_queries(settings, ds)
    if queries is None:
        return lambda _, bucket: bucket.user_ids
    user_ids = read_user_ids(queries)
    units = user_bucket(user_ids, settings.output.num_buckets)
    return lambda unit, _: user_ids.filter(pa.array(units == unit))


def describe_run(
    night: Night,
    settings: Settings,
    inspection: Inspection,
    verdicts: Sequence[Verdict],
    tuning: TuningRecord | None = None,
) -> RunManifest:
    """The manifest of a run that passed; `tuning` says how its search was chosen, if it was."""
    counts: Counter[str] = Counter()
    for audit in inspection.audits:
        counts.update({"candidates": audit.num_rows, "users": audit.num_users, **audit.statuses})
    every_row = {"audit": "every row", "units": len(inspection.audits), "rows": counts["candidates"]}
    return RunManifest(
        table=night.run.table,
        ds=night.ds,
        fp=night.run.fp,
        run_id=night.run.run_id,
        files=inspection.files,
        rows=sum(file.rows for file in inspection.files if file.table == "candidates"),
        schemas={name: describe_schema(schema) for name, schema in sorted(inspection.schemas.items())},
        counts={name: float(counts[name]) for name in sorted(counts)},
        lineage={
            "histories": night.histories.id,
            "model": night.checkpoint.id,
            "corpus": night.corpus.id,
            "evaluation": night.evaluation.id,
        },
        settings=settings.model_dump(mode="json", include={"search", "output", "gates"})
        | ({"tuning": tuning.model_dump(mode="json")} if tuning else {}),
        audits=(every_row, *(verdict.plain() for verdict in verdicts)),
        versions=versions(),
    )


def _read_table(storage: Storage, run: CandidateRun, file: Mapping[str, Any]) -> pa.Table:
    """A file of the run, whose footer must say that it is of this run."""
    key = f"{run.table_prefix}/{file['key']}"
    origin = f"{storage.uri}/{key}"
    table = read_parquet_bytes(read_file(storage, key, file["sha256"]), origin)
    footer = table.schema.metadata or {}
    found = {name: footer.get(name.encode(), b"").decode() for name in ("run_id", "schema_version")}
    if found != {"run_id": run.run_id, "schema_version": str(SCHEMA_VERSION)}:
        raise InvalidRunError(
            f"{origin}: its footer says {found}, so it is not of {run.run_id}; remove it and run again"
        )
    if table.num_rows != file["rows"]:
        raise InvalidRunError(f"{origin}: {table.num_rows} rows, but {file['rows']} were written; remove it")
    return table


def _run_file(unit: int, file: Mapping[str, Any], table: pa.Table) -> RunFile:
    bounds = pc.min_max(table["user_id"]).as_py()
    return RunFile(**file, unit=unit, min_user_id=bounds["min"], max_user_id=bounds["max"])
