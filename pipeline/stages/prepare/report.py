"""The end of prepare: saying what was left out of the log, and writing the Histories artifact."""

import json
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from typing import Any

import pyarrow as pa

from pipeline.artifacts import FileEntry, Manifest
from pipeline.data.catalog import items_table
from pipeline.data.cleaning import (
    AFTER_DS,
    IGNORED_TYPE,
    LEFT_OUT,
    MALFORMED_BYTES,
    NOBODY,
    ORPHAN,
    OUT_OF_LOOKBACK,
    REJECTED,
    WORD,
)
from pipeline.data.columns import TEXT, Mask
from pipeline.data.item_events import ItemEvents
from pipeline.data.splitting import REUSED
from pipeline.data.volume import Finding
from pipeline.io.artifacts import seal, write_file
from pipeline.io.histories import footer, write_items
from pipeline.io.inputs import Log
from pipeline.io.night import Night
from pipeline.io.parquet import write_parquet_bytes
from pipeline.io.rows import LogColumns
from pipeline.settings import Settings
from pipeline.stages.prepare.limits import BAD, in_words
from pipeline.stages.prepare.segments import Quarantine, read_segment, renumbered

logger = logging.getLogger("nightrails")


@dataclass(frozen=True)
class Prepared:
    """The result of both passes. The bucket files lie in the store already."""

    counts: Counter[str]  # number of rows: read, late, kept, and rejected by reason
    rejected: pa.Table  # the first bad rows of each reason
    quarantine: Quarantine  # all of them
    odd: list[Finding]  # about the day's events
    files: tuple[FileEntry, ...]  # by bucket
    catalogue: pa.Table  # in ascending order of item_id
    is_eligible: Mask  # whether each item may be shown tonight
    item_events: ItemEvents  # of all items


# What is said on the terminal of rows that nothing is learned from, and of rows that look odd.
TOLD = {
    OUT_OF_LOOKBACK: "older than prepare.lookback_days; they still count as seen",
    AFTER_DS: "after the day of this night",
    IGNORED_TYPE: "of a type that event_weights lacks (unknown_event_types: ignore); they still count as seen",
    NOBODY: "of nobody (null_words)",
    "duplicates": "delivered again",
    "bot_events": "of users above prepare.max_user_events_per_day",
    ORPHAN: "on items that the catalogue lacks",
    "quarantined": "bad; quarantine-….parquet has them with the reason",
}
QUARANTINE_ROWS = 500_000  # about, of a file
WHISPER = 0.001  # a smaller share of the rows is only in validation-….json


def tell(counts: Counter[str]) -> list[str]:
    """Say in one line each what was left out of the log, in rows and share, where it is more than a whisper."""
    num_rows = counts["rows_read"]
    numbers = {name: counts[name] for name in TOLD} | {"quarantined": sum(counts[reason] for reason in BAD)}
    lines = [f"left out: {_share(n, num_rows)} {TOLD[name]}" for name, n in numbers.items() if n > WHISPER * num_rows]
    if counts[REUSED]:
        lines.append(f"kept: {_share(counts[REUSED], num_rows)} whose event_id another event of the user has")
    words = Counter({name.removeprefix(WORD): number for name, number in counts.items() if name.startswith(WORD)})
    if words:
        lines.append(f"kept: {_share(words.total(), num_rows)} whose id usually means nobody: {in_words(words)}")
    return lines


def _share(number: int, num_rows: int) -> str:
    return f"{number:,} of {num_rows:,} rows ({number / num_rows:.2%})"


def write_histories(night: Night, settings: Settings, columns: LogColumns, prepared: Prepared) -> Manifest:
    """Write the item index, the quarantine and the validation beside the buckets, and last the manifest."""
    log, histories = night.inputs.log, night.histories
    validation = describe(night.ds, log, columns, prepared)
    for line in tell(prepared.counts):
        logger.info("   %s", line)
    items = items_table(prepared.catalogue, prepared.item_events, prepared.is_eligible)

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
            *(
                write(f"quarantine-{number:05d}.parquet", write_parquet_bytes(rows, footer(histories)), rows.num_rows)
                for number, rows in enumerate(_quarantined(night, prepared.quarantine))
            ),
            write("validation.json", json.dumps(validation, indent=1).encode(), 0),
        ),
        counts={name: value for name, value in validation.items() if isinstance(value, int)},
    )


def _quarantined(night: Night, quarantine: Quarantine) -> Iterator[pa.Table]:
    """All bad rows with the names of their files, in the order of the log, in tables of bounded size; at least one."""
    names = pa.array([file.key for file in night.inputs.log.files], TEXT)
    waiting: list[pa.Table] = [REJECTED.empty_table()]
    for first_file, segment in quarantine:
        waiting.append(renumbered(read_segment(night.storage, segment), first_file))
        if sum(rows.num_rows for rows in waiting) >= QUARANTINE_ROWS:
            yield _with_names(pa.concat_tables(waiting), names)
            waiting = []
    if waiting:
        yield _with_names(pa.concat_tables(waiting), names)


def _with_names(rows: pa.Table, names: pa.Array) -> pa.Table:
    return rows.set_column(0, "file", names.take(rows["file"].combine_chunks()))


def describe(ds: date, log: Log, columns: LogColumns, prepared: Prepared) -> dict[str, Any]:
    """The content of `validation-….json`. Each row of the log is counted in exactly one entry of `rows`."""
    counts = prepared.counts
    rows = {name: counts[name] for name in ("kept", "duplicates", "bot_events", *LEFT_OUT)}
    quarantined = {reason: counts[reason] for reason in (*BAD, ORPHAN) if counts[reason]}
    rows["quarantined"] = sum(quarantined.values())
    assert sum(rows.values()) == counts["rows_read"], f"rows went missing: {rows} of {counts['rows_read']}"
    num_events, num_train, num_validation = (int(number) for number in prepared.item_events.counts_3R.sum(axis=1))
    return {
        "ds": ds.isoformat(),
        "files": len(log.files),
        "rows_read": counts["rows_read"],
        "rows": rows,
        "quarantined": quarantined,
        "malformed_bytes": counts[MALFORMED_BYTES],
        "bot_users": counts["bot_users"],
        "trainable_users": counts["trainable_users"],
        "evaluable_users": counts["evaluable_users"],
        "reused_event_ids": counts[REUSED],
        "words_for_nobody": {name.removeprefix(WORD): n for name, n in counts.items() if name.startswith(WORD)},
        "late_rows": counts["late"],
        "users": counts["users"],
        "items": prepared.catalogue.num_rows,
        "hidden_items": int((~prepared.is_eligible).sum()),
        "events": num_events,
        "train_events": num_train,
        "validation_events": num_validation,
        "test_events": num_events - num_train - num_validation,
        "columns_not_read": list(columns.extra),
        "odd": [finding.plain() for finding in prepared.odd],
    }
