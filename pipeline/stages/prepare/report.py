"""The end of prepare: refusing a log with too many bad rows, and writing the Histories artifact."""

import json
from collections import Counter
from dataclasses import dataclass
from datetime import date
from typing import Any

import pyarrow as pa

from pipeline.artifacts import FileEntry, Manifest
from pipeline.data.catalog import items_table
from pipeline.data.cleaning import LEFT_OUT, MALFORMED, ORPHAN, REASONS
from pipeline.data.columns import Mask, suspected_unit
from pipeline.data.lists import Int64
from pipeline.errors import InputError
from pipeline.io.artifacts import seal, write_file
from pipeline.io.histories import footer, write_items
from pipeline.io.inputs import Log
from pipeline.io.night import Night
from pipeline.io.parquet import write_parquet_bytes
from pipeline.io.rows import LogColumns
from pipeline.settings import Settings

BAD = (*REASONS, MALFORMED)
IN_WORDS = {
    "user_id_null": "null or empty",
    "user_id_unreadable": "not readable as an id (not UTF-8, or no int64)",
    "item_id_null": "null or empty",
    "item_id_unreadable": "not readable as an id (not UTF-8, or no int64)",
    "event_ts_null": "null or empty",
    "event_ts_unreadable": "not readable as a time",
    "event_ts_too_old": "before 1990",
    "event_ts_in_future": "in the future",
    "event_type_unknown": "unknown: event_weights lacks it",
    MALFORMED: "without the columns of their file",
}


@dataclass(frozen=True)
class Prepared:
    """The result of both passes. The bucket files lie in the store already."""

    counts: Counter[str]  # number of rows: read, late, kept, and rejected by reason
    rejected: pa.Table  # the first bad rows of each reason
    files: tuple[FileEntry, ...]  # by bucket
    catalogue: pa.Table  # in ascending order of item_id
    is_eligible: Mask  # whether each item may be shown tonight
    item_counts: Int64  # (3, items): events in all, for training, for validation


def check_bad_share(log: Log, settings: Settings, counts: Counter[str], rejected: pa.Table, num_rows: int) -> None:
    """Raise InputError when more than `prepare.max_bad_share` of the log's `num_rows` rows are bad."""
    num_bad = sum(counts[reason] for reason in BAD)
    if num_bad <= settings.prepare.max_bad_share * num_rows:
        return
    reason = max(BAD, key=lambda name: counts[name])
    first = next(row for row in rejected.to_pylist() if row["reason"] == reason)
    column = next((name for name in log.source.columns.named if reason.startswith(name)), "")
    log_column = log.source.columns.named.get(column, "")
    value = first["line"] if reason == MALFORMED else first.get(column)
    subject = f"column {log_column!r}: {counts[reason]} values are" if column else f"{counts[reason]} lines are"
    is_absurd = reason in ("event_ts_too_old", "event_ts_in_future")
    hint = suspected_unit(str(value), log.source.time_unit) if is_absurd else ""
    raise InputError(
        f"{log.origin(log.files[first['file']])}, {subject} {IN_WORDS[reason]}, for example {value!r} in row "
        f"{first['row']}; {num_bad} of {num_rows} rows are bad and prepare.max_bad_share is "
        f"{settings.prepare.max_bad_share}" + (f"; {hint} in {log.source_file}" if hint else "")
    )


def check_orphans(log: Log, settings: Settings, counts: Counter[str], rejected: pa.Table) -> None:
    """Raise InputError when the catalogue lacks the items of more than `prepare.max_orphan_share` of the events."""
    num_events = counts["kept"] + counts[ORPHAN] + counts["bot_events"]
    if counts[ORPHAN] <= settings.prepare.max_orphan_share * num_events:
        return
    first = next(row for row in rejected.to_pylist() if row["reason"] == ORPHAN)
    raise InputError(
        f"{log.origin(log.files[first['file']])}, column {log.source.columns.item_id!r}: {counts[ORPHAN]} of "
        f"{num_events} events are on items that the catalogue lacks, for example {first['item_id']!r}, and "
        f"prepare.max_orphan_share is {settings.prepare.max_orphan_share}; is items.uri the catalogue of this log?"
    )


def write_histories(night: Night, settings: Settings, columns: LogColumns, prepared: Prepared) -> Manifest:
    """Write the item index, the quarantine and the validation beside the buckets, and last the manifest."""
    log, histories = night.inputs.log, night.histories
    validation = describe(night.ds, log, columns, prepared)
    items = items_table(prepared.catalogue, prepared.item_counts, prepared.is_eligible)
    names = pa.array([file.key for file in log.files])
    quarantine = prepared.rejected.set_column(0, "file", names.take(prepared.rejected["file"].combine_chunks()))

    def write(name: str, data: bytes, rows: int) -> FileEntry:
        return write_file(night.storage, histories.prefix, name, data, rows)

    return seal(
        night.storage,
        histories,
        kind="histories",
        lineage={"log": log.uri},
        settings={
            "ds": night.ds.isoformat(),
            "source": log.source.model_dump(mode="json"),
            "num_buckets": settings.output.num_buckets,
            **settings.model_dump(mode="json", include={"prepare", "split"}),
        },
        files=(
            *prepared.files,
            write_items(night.storage, histories, items),
            write("quarantine.parquet", write_parquet_bytes(quarantine, footer(histories)), quarantine.num_rows),
            write("validation.json", json.dumps(validation, indent=1).encode(), 0),
        ),
        counts={name: value for name, value in validation.items() if isinstance(value, int)},
    )


def describe(ds: date, log: Log, columns: LogColumns, prepared: Prepared) -> dict[str, Any]:
    """The content of `validation-….json`. Each row of the log is counted in exactly one entry of `rows`."""
    counts = prepared.counts
    rows = {name: counts[name] for name in ("kept", "duplicates", "bot_events", *LEFT_OUT)}
    quarantined = {reason: counts[reason] for reason in (*BAD, ORPHAN) if counts[reason]}
    rows["quarantined"] = sum(quarantined.values())
    assert sum(rows.values()) == counts["rows_read"], f"rows went missing: {rows} of {counts['rows_read']}"
    num_events, num_train, num_validation = (int(number) for number in prepared.item_counts.sum(axis=1))
    return {
        "ds": ds.isoformat(),
        "files": len(log.files),
        "rows_read": counts["rows_read"],
        "rows": rows,
        "quarantined": quarantined,
        "bot_users": counts["bot_users"],
        "late_rows": counts["late"],
        "users": sum(file.rows for file in prepared.files) - counts["bot_users"],
        "items": prepared.catalogue.num_rows,
        "hidden_items": int((~prepared.is_eligible).sum()),
        "events": num_events,
        "train_events": num_train,
        "validation_events": num_validation,
        "test_events": num_events - num_train - num_validation,
        "columns_not_read": list(columns.extra),
    }
