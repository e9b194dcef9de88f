"""Write the simulated log: the catalogue, one partition after the other, and the manifest last."""

import logging

from pipeline.artifacts import Artifact, FileEntry, Manifest
from pipeline.data.simulation.log import simulate_days, simulate_items, simulated_prefix
from pipeline.io.artifacts import read_manifest, seal, write_file
from pipeline.io.parquet import write_parquet_bytes
from pipeline.io.storage.base import Storage
from pipeline.schema import SCHEMA_VERSION
from pipeline.settings import SimulateSettings

log = logging.getLogger("nightrails")
FOOTER = {"schema_version": str(SCHEMA_VERSION)}


def write_simulated_log(storage: Storage, settings: SimulateSettings) -> tuple[Manifest, bool]:
    """Write the log; returns its manifest, and whether it existed before. The same settings give the same bytes."""
    prefix = simulated_prefix(settings)
    existing = read_manifest(storage, prefix)
    if existing is not None:
        return existing, True
    items = simulate_items(settings)
    item_bytes = write_parquet_bytes(items, FOOTER)
    files: list[FileEntry] = [write_file(storage, prefix, "items.parquet", item_bytes, items.num_rows)]
    num_events = 0
    for num_done, (day, events) in enumerate(simulate_days(settings), start=1):
        key = f"log/ds={day.isoformat()}/part-00000.parquet"
        files.append(write_file(storage, prefix, key, write_parquet_bytes(events, FOOTER), events.num_rows))
        num_events += events.num_rows
        if num_done % 10 == 0 or num_done == settings.num_days:
            log.info("simulated %d of %d days, %d events", num_done, settings.num_days, num_events)
    folder, _, name = prefix.rpartition("/")
    manifest = seal(
        storage,
        Artifact(folder, name),
        kind="simulated_log",
        lineage={},
        settings=settings.model_dump(mode="json"),
        files=files,
        counts={"events": num_events, "items": items.num_rows, "days": settings.num_days},
    )
    return manifest, False
