"""Writing the simulated log: one partition at a time, the catalogue, and the manifest last."""

import logging

from pipeline.artifacts import FileEntry, Manifest
from pipeline.data.simulation.log import simulate_days, simulate_items, simulated_prefix
from pipeline.io.artifacts import file_entry, now, read_manifest, versions, write_manifest
from pipeline.io.parquet import write_parquet_bytes
from pipeline.io.storage.base import Storage, put
from pipeline.schema import SCHEMA_VERSION
from pipeline.settings import SimulateSettings

log = logging.getLogger("nightrails")
FOOTER = {"schema_version": str(SCHEMA_VERSION)}


def write_simulated_log(storage: Storage, settings: SimulateSettings) -> tuple[Manifest, bool]:
    """The simulated log's manifest, and whether the log was already there. The same settings give the same bytes."""
    prefix = simulated_prefix(settings)
    existing = read_manifest(storage, prefix)
    if existing is not None:
        return existing, True
    files: list[FileEntry] = []
    items = simulate_items(settings)
    files.append(_write(storage, prefix, "items.parquet", write_parquet_bytes(items, FOOTER), items.num_rows))
    num_events = 0
    for done, (day, events) in enumerate(simulate_days(settings), start=1):
        key = f"log/ds={day.isoformat()}/part-00000.parquet"
        files.append(_write(storage, prefix, key, write_parquet_bytes(events, FOOTER), events.num_rows))
        num_events += events.num_rows
        if done % 10 == 0 or done == settings.num_days:
            log.info("simulated %d of %d days, %d events", done, settings.num_days, num_events)
    manifest = Manifest(
        kind="simulated_log",
        id=prefix.rpartition("/")[2],
        lineage={},
        settings=settings.model_dump(mode="json"),
        files=tuple(files),
        counts={"events": num_events, "items": items.num_rows, "days": settings.num_days},
        created_at=now(),
        versions=versions(),
    )
    write_manifest(storage, prefix, manifest)
    return manifest, False


def _write(storage: Storage, prefix: str, key: str, data: bytes, rows: int) -> FileEntry:
    put(storage, f"{prefix}/{key}", data)
    return file_entry(key, data, rows)
