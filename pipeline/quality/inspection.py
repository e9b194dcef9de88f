"""Reads a finished run back as its readers will, and audits it unit by unit."""

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Literal

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.artifacts import CandidateRun, FileEntry
from pipeline.errors import InvalidRunError
from pipeline.io.artifacts import read_file, versions
from pipeline.io.histories import read_bucket, read_eligible, read_item_ids
from pipeline.io.night import Night, training_of
from pipeline.io.parquet import read_parquet_bytes
from pipeline.io.publication.commits import RunFile, RunManifest, describe_schema
from pipeline.io.publication.units import Sidecar
from pipeline.io.storage.base import Storage
from pipeline.io.tuning import TuningRecord
from pipeline.quality.gates import Verdict
from pipeline.quality.promises import Expected, UnitAudit, audit_unit, require_sound
from pipeline.schema import SCHEMA_VERSION
from pipeline.settings import Settings
from pipeline.stages.item_columns import published_columns
from pipeline.stages.queries import TonightsUsers
from pipeline.stages.row_rules import PublishedLists, RowRules

UNITS_AT_A_TIME = 2  # a unit in work holds a bucket's tables in memory


@dataclass(frozen=True)
class Inspection:
    """The result of an inspection: files and audits in order of unit, schemas by table, number of units by backend."""

    files: tuple[RunFile, ...]
    audits: tuple[UnitAudit, ...]
    schemas: dict[str, pa.Schema]
    backends: dict[str, int]

    @property
    def counts(self) -> Counter[str]:
        """The numbers of candidates and of users, and of users by status."""
        counts: Counter[str] = Counter()
        for audit in self.audits:
            counts.update({"candidates": audit.num_rows, "users": audit.num_users, **audit.statuses})
        return counts


def inspect_run(night: Night, settings: Settings, sidecars: Mapping[int, Sidecar]) -> Inspection:
    """Read every file that the sidecars (by unit) name, check its hash and audit its rows.

    Raises InputError for a damaged file and InvalidRunError for the first unit that breaks a promise.
    """
    storage = night.storage
    item_ids = read_item_ids(storage, night.histories)
    is_eligible_N = read_eligible(storage, night.histories)
    users = TonightsUsers.of(night, settings.output.num_buckets)
    item_columns = published_columns(night, settings)
    rules, of_lists = RowRules(night, settings), PublishedLists(night, settings)

    def inspect(unit: int) -> _InspectedUnit:
        bucket = read_bucket(storage, night.histories, unit)
        expected = Expected(
            requested=users.select(unit, bucket).user_ids,
            histories=bucket,
            item_ids=item_ids,
            is_eligible_N=is_eligible_N,
            item_columns=item_columns,
            broken_rules=partial(rules.broken, unit),
            broken_list_rules=of_lists.broken,
            k=settings.search.k,
            layout=settings.output.layout,
            surface=settings.output.surface,
            ds=night.ds,
            model_version=night.checkpoint.id,
            run_id=night.run.run_id,
        )
        sidecar = sidecars[unit]
        candidates, accounting = (_read_table(storage, night.run, file) for file in sidecar.files)
        audit = audit_unit(candidates, accounting, expected)
        require_sound(audit, " and ".join(f"{night.run.table_prefix}/{file.key}" for file in sidecar.files))
        files = (
            _run_file(unit, "candidates", sidecar.candidates, candidates),
            _run_file(unit, "users", sidecar.users, accounting),
        )
        return _InspectedUnit(files, audit, {"candidates": candidates.schema, "users": accounting.schema})

    with ThreadPoolExecutor(UNITS_AT_A_TIME) as pool:
        units = list(pool.map(inspect, sorted(sidecars)))
    files = tuple(file for unit in units for file in unit.files)
    backends = Counter(name for sidecar in sidecars.values() for name in sidecar.backends)
    return Inspection(files, tuple(unit.audit for unit in units), units[0].schemas, dict(sorted(backends.items())))


@dataclass(frozen=True)
class _InspectedUnit:
    files: tuple[RunFile, RunFile]
    audit: UnitAudit
    schemas: dict[str, pa.Schema]  # by table


def describe_run(
    night: Night,
    settings: Settings,
    inspection: Inspection,
    verdicts: Sequence[Verdict],
    warnings: Sequence[str] = (),
    tuning: TuningRecord | None = None,
) -> RunManifest:
    """Build the manifest of a run that passed; `tuning` is given when its search was chosen by measuring."""
    counts = inspection.counts
    every_row = {"audit": "every row", "units": len(inspection.audits), "rows": counts["candidates"]}
    return RunManifest(
        table=night.run.table,
        ds=night.ds,
        fp=night.run.fp,
        run_id=night.run.run_id,
        files=inspection.files,
        rows=sum(file.rows for file in inspection.files if file.table == "candidates"),
        schemas={name: describe_schema(schema) for name, schema in sorted(inspection.schemas.items())},
        counts=dict(sorted(counts.items())),
        backends=inspection.backends,
        lineage={
            "histories": night.histories.id,
            "selected": night.selected.id,
            "measured": night.measured.id,
            "model": night.checkpoint.id,
            "memory": night.memory.id,
            "neighbours": night.neighbours.id,
            "corpus": night.corpus.id,
            "evaluation": night.evaluation.id,
        }
        | (night.earlier.lineage() if night.earlier else {}),
        settings=settings.model_dump(mode="json", include={"search", "memory", "output", "gates"})
        | {"training": training_of(settings)}
        | ({"tuning": tuning.model_dump(mode="json")} if tuning else {}),
        audits=(every_row, *(verdict.plain() for verdict in verdicts)),
        warnings=tuple(warnings),
        versions=versions(),
    )


def _read_table(storage: Storage, run: CandidateRun, file: FileEntry) -> pa.Table:
    """Read a file of the run. Raises InvalidRunError when its footer names another run, or when rows are missing."""
    origin = f"{storage.uri}/{run.table_prefix}/{file.key}"
    table = read_parquet_bytes(read_file(storage, run.table_prefix, file, "remove it and run jobs/retrieve.py"), origin)
    footer = table.schema.metadata or {}
    provenance = {name: footer.get(name.encode(), b"").decode() for name in ("run_id", "schema_version")}
    if provenance != {"run_id": run.run_id, "schema_version": str(SCHEMA_VERSION)}:
        raise InvalidRunError(
            f"{origin}: its footer says {provenance}, so it is not of {run.run_id}; remove it and run again"
        )
    if table.num_rows != file.rows:
        raise InvalidRunError(f"{origin}: {table.num_rows} rows, but {file.rows} were written; remove it")
    return table


def _run_file(unit: int, table: Literal["candidates", "users"], file: FileEntry, rows: pa.Table) -> RunFile:
    bounds = pc.min_max(rows["user_id"]).as_py()
    return RunFile(**file.model_dump(), table=table, unit=unit, min_user_id=bounds["min"], max_user_id=bounds["max"])
