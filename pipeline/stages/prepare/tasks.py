"""The tasks of prepare's two passes over the log. They are independent, so that any process can run any of them.

A task of the first pass reads pieces of the log, checks their rows and writes the good rows to the scratch by user
bucket, about `rows_per_task` rows at a time. A task of the second pass gathers the rows of one bucket, cleans them and
writes the histories. A task claims its result at the end, and a claimed task is not done again.
"""

import functools
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.cleaning import (
    MALFORMED,
    MALFORMED_BYTES,
    Cleaned,
    clean_rows,
    malformed_lines,
)
from pipeline.data.columns import TEXT, numpy_of
from pipeline.data.days import day_numbers, midnight
from pipeline.data.histories import user_bucket
from pipeline.data.item_events import ItemEvents
from pipeline.data.lists import Int64
from pipeline.data.period import Period
from pipeline.data.seen import OF_TYPE, SeenRule
from pipeline.data.sources import SourceSpec
from pipeline.data.splitting import clean_bucket
from pipeline.data.times import NEWEST_US
from pipeline.data.volume import OTHER
from pipeline.errors import InfrastructureError
from pipeline.evaluation.targets import evaluable_users
from pipeline.io.histories import read_bucket, write_bucket
from pipeline.io.inputs import day_of
from pipeline.io.parquet import read_parquet_bytes
from pipeline.io.rows import read_rows
from pipeline.io.storage import open_storage
from pipeline.io.storage.base import ObjectNotFoundError
from pipeline.stages.prepare.job import Job, MapTask, Piece, event_table
from pipeline.stages.prepare.parts import Part
from pipeline.stages.prepare.segments import (
    MapResult,
    ReduceResult,
    Segment,
    map_claims,
    read_segment,
    reduce_claims,
    renumbered,
    write_segments,
)

MAX_WAITING_BYTES = 1 << 29  # of rows that wait to be written; ids may be long
ROWS_READ, LATE = "rows_read", "late"
USERS, TRAINABLE, EVALUABLE = "users", "trainable_users", "evaluable_users"


def map_pieces(job: Job, task: MapTask) -> tuple[MapTask, MapResult]:
    """Run one task of the first pass: check the rows of its pieces and write the good rows by bucket.

    Returns the task and its result. Raises InputError for a file that cannot be read.
    """
    claims = map_claims(job.storage, task.part.prefix)
    existing = claims.read(task.number)
    if existing is not None:
        return task, existing
    writer = _SegmentWriter(job, task)
    for piece in task.pieces:
        for cleaned in _clean_piece(job, task.part, piece):
            writer.add(cleaned)
    result = claims.claim(task.number, writer.finish())
    pa.default_memory_pool().release_unused()  # the worker process lives on, without this memory
    return task, result


def _clean_piece(job: Job, part: Part, piece: Piece) -> Iterator[Cleaned]:
    """Read and check a piece, some rows at a time; files are numbered within the part."""
    newest_us = part.newest_us(job.settings.log.time_zone)
    types = (job.columns.user_type, job.columns.item_type)
    row, file = piece.first_row, job.log.files[part.first_file + piece.file]
    for raw in read_rows(job.log, file, piece.row_groups, job.columns.names):
        cleaned = clean_rows(_numbered(raw.table, piece.file, row), job.log.source, types, newest_us)
        row += raw.table.num_rows
        malformed = malformed_lines(raw.malformed, piece.file, row)
        counts = {
            ROWS_READ: raw.table.num_rows + raw.num_malformed,
            LATE: _num_late(cleaned.events, file.key, job.settings.log.time_zone),
            MALFORMED: raw.num_malformed,
            MALFORMED_BYTES: raw.malformed_bytes,
        }
        yield Cleaned(cleaned.events, pa.concat_tables([malformed, cleaned.rejected]), cleaned.counts | counts)


def reduce_bucket(
    job: Job, bucket: int, segments: list[tuple[int, Segment]], item_ids_key: str, period: Period
) -> tuple[int, ReduceResult, ItemEvents]:
    """Run one task of the second pass: make the histories of a bucket from its segments, each with the number of its
    part's first file; the item ids lie at `item_ids_key`, and `period` is what the night sees.

    Returns the bucket, the result, and what the bucket's events say of its items. Raises InfrastructureError when a
    segment is gone or damaged.
    """
    storage, histories = job.storage, job.night.histories
    claims = reduce_claims(storage, histories)
    existing = claims.read(bucket)
    if existing is not None:
        return bucket, existing, ItemEvents.of(read_bucket(storage, histories, bucket))
    rows = (renumbered(read_segment(storage, segment), first_file) for first_file, segment in segments)
    read = pa.concat_tables([event_table(job.columns), *rows])
    events, seen, left_out = period.cut(read)
    clean = clean_bucket(
        events,
        seen,
        _item_ids(storage.uri, item_ids_key),
        job.settings.split,
        job.night.ds,
        job.settings.log.time_zone,
        SeenRule.of(job.settings.prepare),
        job.settings.prepare.max_user_events_per_day,
    )
    rejected = None
    if clean.rejected.num_rows:
        (rejected,) = write_segments(storage, claims.prefix, f"rejected-{bucket:05d}.arrows", [clean.rejected])
    file = write_bucket(storage, histories, bucket, clean.bucket)
    evaluable = evaluable_users(clean.bucket)
    counts = clean.counts | left_out | _of_types(read, job.settings.prepare.seen_event_types or ())
    counts |= {
        USERS: int((np.diff(clean.bucket.offsets) > 0).sum()),
        TRAINABLE: int((clean.bucket.num_train >= 2).sum()),
        EVALUABLE: len(evaluable),
    }
    result = claims.claim(bucket, ReduceResult(file=file, rejected=rejected, counts=counts))
    item_events = ItemEvents.of(clean.bucket)
    del read, events, seen, clean
    pa.default_memory_pool().release_unused()
    return bucket, result, item_events


class _SegmentWriter:
    """Collects the clean rows of a task and writes them by bucket, `rows_per_task` rows at a time."""

    def __init__(self, job: Job, task: MapTask) -> None:
        self._job, self._prefix, self._task = job, task.part.prefix, f"task-{task.number:06d}"
        self._waiting: list[pa.Table] = []
        self._num_waiting = self._num_written = self._waiting_bytes = 0
        self._buckets: list[tuple[int, Segment]] = []
        self._item_ids: list[Segment] = []
        self._rejected: list[pa.Table] = []
        self._counts: Counter[str] = Counter()
        self._oldest_ts, self._newest_ts = NEWEST_US, -NEWEST_US
        self._days: Counter[tuple[int, str]] = Counter()

    def add(self, cleaned: Cleaned) -> None:
        self._counts.update(cleaned.counts)
        if cleaned.rejected.num_rows:
            self._rejected.append(cleaned.rejected)
        learned = _learned(cleaned.events)
        times = learned["event_ts"].to_numpy()
        if len(times):
            self._oldest_ts = min(self._oldest_ts, int(times.min()))
            self._newest_ts = max(self._newest_ts, int(times.max()))
            days = day_numbers(times, self._job.settings.log.time_zone)
            self._days.update(_by_day_and_type(days, learned["event_type"], self._job.log.source))
        self._waiting.append(cleaned.events)
        self._num_waiting += cleaned.events.num_rows
        self._waiting_bytes += cleaned.events.nbytes
        is_large = self._waiting_bytes >= MAX_WAITING_BYTES
        if is_large or self._num_waiting >= self._job.settings.prepare.rows_per_task:
            self._write()

    def finish(self) -> MapResult:
        """Write the rows that are left and return the task's result."""
        if self._num_waiting:
            self._write()
        rejected = None
        if self._rejected:
            rows = pa.concat_tables(self._rejected)
            (rejected,) = write_segments(self._job.storage, self._prefix, f"{self._task}-rejected.arrows", [rows])
        return MapResult(
            buckets=tuple(self._buckets),
            item_ids=tuple(self._item_ids),
            rejected=rejected,
            counts=dict(self._counts),
            oldest_ts=self._oldest_ts,
            newest_ts=self._newest_ts,
            days=tuple((day, kind, number) for (day, kind), number in sorted(self._days.items())),
        )

    def _write(self) -> None:
        events = pa.concat_tables(self._waiting).combine_chunks()
        self._waiting, self._num_waiting, self._waiting_bytes = [], 0, 0
        buckets = user_bucket(events["user_id"], self._job.settings.output.num_buckets)
        order = np.argsort(buckets, kind="stable")  # within a bucket the order of the log stays
        present, sizes = np.unique(buckets, return_counts=True)
        by_bucket = events.take(pa.array(order))
        starts = np.cumsum(sizes) - sizes
        tables = [by_bucket.slice(start, size) for start, size in zip(starts.tolist(), sizes.tolist(), strict=True)]
        tables.append(pa.table({"item_id": pc.unique(_learned(by_bucket)["item_id"])}))
        name = f"{self._task}-{self._num_written:04d}.arrows"
        segments = write_segments(self._job.storage, self._prefix, name, tables)
        self._num_written += 1
        self._item_ids.append(segments.pop())
        self._buckets += zip(present.tolist(), segments, strict=True)


def _of_types(events: pa.Table, event_types: tuple[str, ...]) -> dict[str, int]:
    """The number of events of each of these types."""
    return {f"{OF_TYPE}{name}": pc.sum(pc.equal(events["event_type"], name)).as_py() or 0 for name in event_types}


def _by_day_and_type(days: Int64, event_types: pa.ChunkedArray, spec: SourceSpec) -> dict[tuple[int, str], int]:
    """The number of events by day and type; types that the source does not name count together."""
    named = [*spec.event_weights, *([spec.event_type] if spec.event_type else [])]
    kinds = [*dict.fromkeys(named), OTHER]
    of_event = pc.fill_null(pc.index_in(event_types.combine_chunks(), pa.array(kinds[:-1], TEXT)), len(kinds) - 1)
    first = int(days.min())
    codes, numbers = np.unique((days - first) * len(kinds) + numpy_of(of_event), return_counts=True)
    return {
        (first + code // len(kinds), kinds[code % len(kinds)]): number
        for code, number in zip(codes.tolist(), numbers.tolist(), strict=True)
    }


def _numbered(table: pa.Table, file: int, first_row: int) -> pa.Table:
    """Add the columns `file` and `row`, which say where in the log a row is."""
    numbers = pa.array(np.arange(first_row, first_row + table.num_rows))
    return table.append_column("file", pa.array(np.full(table.num_rows, file, np.int32))).append_column("row", numbers)


def _learned(events: pa.Table) -> pa.Table:
    return events.filter(events["is_learned"])


def _num_late(events: pa.Table, key: str, zone: str) -> int:
    """The number of events that happened before the day of their partition."""
    day = day_of(key)
    if day is None:
        return 0
    return int((_learned(events)["event_ts"].to_numpy() < midnight(day, zone)).sum())


@functools.lru_cache(maxsize=1)
def _item_ids(root: str, key: str) -> pa.Array:
    """All item ids in ascending order, cached because a worker process needs them again for its next bucket."""
    try:
        source = open_storage(root).open(key)
    except ObjectNotFoundError:
        raise InfrastructureError(f"{root}/{key}: removed before it was read; run again") from None
    with source:
        return read_parquet_bytes(source, f"{root}/{key}")["item_id"].combine_chunks()
