"""The tasks of prepare's two passes over the log; any process can run one, and none needs another.

A task of the first pass reads pieces of the log, checks their rows and sets the good ones aside by user bucket, some
`rows_per_task` at a time. A task of the second gathers one bucket, cleans it and writes its histories. Each claims what
it did, and a task that is claimed is not done again.
"""

import functools
from collections import Counter
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.catalog import index_catalogue
from pipeline.data.cleaning import MALFORMED, REJECTED, Period, clean_rows, first_rejected, malformed_lines
from pipeline.data.columns import DAY_US, EPOCH
from pipeline.data.histories import user_bucket
from pipeline.data.lists import Int64
from pipeline.data.splitting import clean_bucket, item_counts
from pipeline.errors import InfrastructureError, InputError
from pipeline.io.histories import read_bucket, write_bucket
from pipeline.io.inputs import Files, Log, day_of
from pipeline.io.night import Night
from pipeline.io.parquet import read_parquet_bytes
from pipeline.io.rows import LogColumns, read_rows
from pipeline.io.storage import open_storage
from pipeline.io.storage.base import ObjectNotFoundError, Storage
from pipeline.settings import Settings
from pipeline.stages.prepare.report import MAX_REJECTED
from pipeline.stages.prepare.segments import (
    MapResult,
    ReduceResult,
    Segment,
    map_claims,
    read_segment,
    reduce_claims,
    scratch_prefix,
    write_segments,
)

TEXT_ROW_BYTES = 32  # of a text file, to guess how many rows it has
ROWS_READ, LATE = "rows_read", "late"


@dataclass(frozen=True)
class Piece:
    """Part of one log file: some row groups, or all of a text file (`row_groups` None)."""

    file: int  # its place in the order of the log
    first_row: int
    row_groups: tuple[int, ...] | None
    num_rows: int  # of a text file a guess


@dataclass(frozen=True)
class Job:
    """What every task is given: the night, the settings, and what the heads of the log's files said."""

    night: Night
    settings: Settings
    columns: LogColumns

    @property
    def storage(self) -> Storage:
        return self.night.storage

    @property
    def log(self) -> Log:
        return self.night.inputs.log

    @property
    def map_scratch(self) -> str:
        """Where the first pass writes; other task sizes cut the log elsewhere and must not be mixed."""
        return f"{scratch_prefix(self.night.histories)}/rows-{self.settings.prepare.rows_per_task}"

    @property
    def item_ids_key(self) -> str:
        return f"{scratch_prefix(self.night.histories)}/item-ids.parquet"


def read_catalogue(items: Files, item_type: pa.DataType) -> pa.Table:
    """The catalogue in ascending order of `item_id`. Raises InputError when it does not fit the log."""
    tables = []
    for file in items.files:
        with items.open(file) as source:
            tables.append(read_parquet_bytes(source, items.origin(file)))
    try:
        catalogue = pa.concat_tables(tables)
    except pa.ArrowInvalid as error:
        raise InputError(f"{items.uri}: the files of the catalogue differ in their columns ({error})") from None
    return index_catalogue(catalogue, item_type, items.uri)


def cut_pieces(log: Log, columns: LogColumns, rows_per_task: int) -> list[tuple[Piece, ...]]:
    """The log, in order, as tasks of about `rows_per_task` rows; a row group or a text file is never cut."""
    pieces = []
    for number, (file, group_rows) in enumerate(zip(log.files, columns.group_rows, strict=True)):
        if log.source.format == "csv":
            pieces.append(Piece(number, 0, None, file.size // TEXT_ROW_BYTES))
        first = 0
        for group, rows in enumerate(group_rows):
            pieces.append(Piece(number, first, (group,), rows))
            first += rows
    tasks: list[list[Piece]] = []
    room = 0
    for piece in pieces:
        if not tasks or piece.num_rows > room:
            tasks.append([])
            room = rows_per_task
        tasks[-1].append(piece)
        room -= piece.num_rows
    return [tuple(task) for task in tasks]


def map_pieces(job: Job, number: int, pieces: tuple[Piece, ...]) -> tuple[int, MapResult]:
    """First pass, one task: check the rows of some pieces and set them aside by bucket."""
    claims = map_claims(job.storage, job.map_scratch)
    done = claims.read(number)
    if done is not None:
        return number, done
    writer = _SegmentWriter(job, f"{job.map_scratch}/task-{number:06d}")
    period = Period.until(job.night.ds, job.settings.prepare.lookback_days, job.log.is_partitioned)
    types = (job.columns.user_type, job.columns.item_type)
    counts: Counter[str] = Counter()
    rejected = REJECTED.empty_table()
    for piece in pieces:
        row = piece.first_row
        file = job.log.files[piece.file]
        for raw in read_rows(job.log, file, piece.row_groups, job.columns.names):
            cleaned = clean_rows(_numbered(raw.table, piece.file, row), job.log.source, types, period, MAX_REJECTED)
            row += raw.table.num_rows
            counts.update(cleaned.counts)
            num_late = _num_late(cleaned.events, file.key)
            counts.update({ROWS_READ: raw.table.num_rows + raw.num_malformed, LATE: num_late})
            if raw.num_malformed:
                counts[MALFORMED] += raw.num_malformed
                rejected = pa.concat_tables([rejected, malformed_lines(raw.malformed, piece.file, row)])
            if cleaned.rejected.num_rows:
                rejected = pa.concat_tables([rejected, cleaned.rejected])
            if rejected.num_rows > MAX_REJECTED:
                rejected = first_rejected(rejected, MAX_REJECTED)
            writer.add(cleaned.events)
    result = claims.claim(number, writer.finish(rejected, counts))
    pa.default_memory_pool().release_unused()  # the worker stays, the memory need not
    return number, result


def reduce_bucket(job: Job, bucket: int, segments: list[Segment]) -> tuple[int, ReduceResult, Int64, Int64]:
    """Second pass, one task: the histories of one bucket, and the counts of its items."""
    storage, histories = job.storage, job.night.histories
    claims = reduce_claims(storage, histories)
    done = claims.read(bucket)
    if done is not None:
        return bucket, done, *item_counts(read_bucket(storage, histories, bucket))
    events = pa.concat_tables([event_table(job.columns), *(read_segment(storage, segment) for segment in segments)])
    clean = clean_bucket(
        events,
        _item_ids(storage.uri, job.item_ids_key),
        job.settings.split,
        job.night.ds,
        job.settings.prepare.max_user_events_per_day,
        MAX_REJECTED,
    )
    rejected = None
    if clean.rejected.num_rows:
        (rejected,) = write_segments(storage, f"{claims.prefix}/rejected-{bucket:05d}.arrows", [clean.rejected])
    file = write_bucket(storage, histories, bucket, clean.bucket)
    result = claims.claim(bucket, ReduceResult(file=file, rejected=rejected, counts=clean.counts))
    counted = item_counts(clean.bucket)
    del events, clean
    pa.default_memory_pool().release_unused()
    return bucket, result, *counted


def event_table(columns: LogColumns) -> pa.Table:
    """No rows, in the shape of those that the first pass sets aside."""
    return pa.schema(
        [
            ("user_id", columns.user_type),
            ("item_id", columns.item_type),
            ("event_ts", pa.int64()),
            ("weight", pa.float32()),
            ("event_type", pa.string()),
            ("event_id", pa.string()),
            ("file", pa.int32()),
            ("row", pa.int64()),
        ]
    ).empty_table()


class _SegmentWriter:
    """Collects clean rows and writes them by bucket whenever there are `rows_per_task` of them."""

    def __init__(self, job: Job, prefix: str) -> None:
        self.job, self.prefix = job, prefix
        self.waiting: list[pa.Table] = []
        self.num_waiting = self.num_written = 0
        self.buckets: list[tuple[int, Segment]] = []
        self.item_ids: list[Segment] = []

    def add(self, events: pa.Table) -> None:
        self.waiting.append(events)
        self.num_waiting += events.num_rows
        if self.num_waiting >= self.job.settings.prepare.rows_per_task:
            self._write()

    def finish(self, rejected: pa.Table, counts: Counter[str]) -> MapResult:
        if self.num_waiting:
            self._write()
        kept = first_rejected(rejected, MAX_REJECTED)
        written = (
            write_segments(self.job.storage, f"{self.prefix}-rejected.arrows", [kept]) if kept.num_rows else [None]
        )
        return MapResult(
            buckets=tuple(self.buckets), item_ids=tuple(self.item_ids), rejected=written[0], counts=dict(counts)
        )

    def _write(self) -> None:
        events = pa.concat_tables(self.waiting).combine_chunks()
        self.waiting, self.num_waiting = [], 0
        buckets = user_bucket(events["user_id"], self.job.settings.output.num_buckets)
        order = np.argsort(buckets, kind="stable")  # within a bucket the order of the log stays
        present, sizes = np.unique(buckets, return_counts=True)
        events = events.take(pa.array(order))
        starts = np.cumsum(sizes) - sizes
        tables = [events.slice(start, size) for start, size in zip(starts.tolist(), sizes.tolist(), strict=True)]
        if self.job.night.inputs.items is None:
            tables.append(pa.table({"item_id": pc.unique(events["item_id"])}))
        key = f"{self.prefix}-{self.num_written:04d}.arrows"
        segments = write_segments(self.job.storage, key, tables)
        self.num_written += 1
        if self.job.night.inputs.items is None:
            self.item_ids.append(segments.pop())
        self.buckets += zip(present.tolist(), segments, strict=True)


def _numbered(table: pa.Table, file: int, first_row: int) -> pa.Table:
    numbers = pa.array(np.arange(first_row, first_row + table.num_rows))
    return table.append_column("file", pa.array(np.full(table.num_rows, file, np.int32))).append_column("row", numbers)


def _num_late(events: pa.Table, key: str) -> int:
    """Events that happened before the day of their partition."""
    day = day_of(key)
    if day is None:
        return 0
    return int((events["event_ts"].to_numpy() < (day - EPOCH) // timedelta(days=1) * DAY_US).sum())


@functools.lru_cache(maxsize=1)
def _item_ids(root: str, key: str) -> pa.Array:
    """All item ids in ascending order, kept by the worker for its next bucket."""
    try:
        source = open_storage(root).open(key)
    except ObjectNotFoundError:
        raise InfrastructureError(f"{root}/{key}: removed while it was needed; run again") from None
    with source:
        return read_parquet_bytes(source, f"{root}/{key}")["item_id"].combine_chunks()
