"""Prepare, in two passes over the log.

A task holds `rows_per_task` rows or one bucket, and this process the item index and counts: nothing grows with the log.
A rerun after a crash does only the tasks that were not done.
"""

from collections import Counter
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.artifacts import Manifest
from pipeline.data.cleaning import REJECTED, first_rejected
from pipeline.errors import InputError
from pipeline.io.night import Night
from pipeline.io.parquet import write_parquet_bytes
from pipeline.io.rows import check_columns
from pipeline.io.storage.base import put
from pipeline.settings import Settings
from pipeline.stages.prepare.report import MAX_REJECTED, Prepared, check_bad_share, check_orphans, write_histories
from pipeline.stages.prepare.segments import MapResult, Segment, read_segment, remove_scratch
from pipeline.stages.prepare.tasks import Job, cut_pieces, map_pieces, read_catalogue, reduce_bucket
from pipeline.stages.runner import Runner


def open_job(night: Night, settings: Settings) -> Job:
    """Check the head of every file of the log. Raises InputError for what cannot be read."""
    return Job(night, settings, check_columns(night.inputs.log))


def prepare(runner: Runner, job: Job) -> Manifest:
    """Make the histories; their manifest is written last.

    Raises InputError when too many rows are bad, or on items that the catalogue lacks.
    """
    night, log = job.night, job.log
    items = night.inputs.items
    catalogue = read_catalogue(items, job.columns.item_type) if items else None
    mapped = _first_pass(runner, job)
    check_bad_share(log, job.settings, mapped.counts, mapped.rejected)
    if catalogue is None:
        catalogue = pa.table({"item_id": mapped.item_ids})
    if not catalogue.num_rows:
        raise InputError(f"{log.uri}: no row of the log is left to learn from; counts: {dict(mapped.counts)}")
    put(night.storage, job.item_ids_key, write_parquet_bytes(catalogue.select(["item_id"])))
    prepared = _second_pass(runner, job, mapped, catalogue)
    check_orphans(log, job.settings, prepared.counts, prepared.rejected)
    manifest = write_histories(night, job.settings, job.columns, prepared)
    remove_scratch(night.storage, night.histories)
    return manifest


@dataclass(frozen=True)
class Mapped:
    """The sums of the first pass, and where its rows lie."""

    counts: Counter[str]
    rejected: pa.Table
    item_ids: pa.Array  # distinct, ascending; empty with a catalogue
    segments: dict[int, list[Segment]]  # by bucket, in the order of the log


def _first_pass(runner: Runner, job: Job) -> Mapped:
    """Run the tasks of the first pass, adding up results as they come."""
    tasks = cut_pieces(job.log, job.columns, job.settings.prepare.rows_per_task)
    done: dict[int, MapResult] = {}
    ids = _Distinct(job.columns.item_type)
    counts: Counter[str] = Counter()
    rejected = REJECTED.empty_table()
    total = sum(sum(rows) for rows in job.columns.group_rows)  # 0 for text: unknown
    arguments = [(job, number, pieces) for number, pieces in enumerate(tasks)]
    with closing(runner.run_tasks("reading the log", map_pieces, arguments)) as results:
        for number, result in results:
            done[number] = result
            counts.update(result.counts)
            for segment in result.item_ids:
                ids.add(read_segment(job.storage, segment)["item_id"].combine_chunks())
            if result.rejected is not None:
                rejected = first_rejected(
                    pa.concat_tables([rejected, read_segment(job.storage, result.rejected)]), MAX_REJECTED
                )
            if total:  # no need to read to the end of a log that is refused anyway
                check_bad_share(job.log, job.settings, counts, rejected, total)
    segments: dict[int, list[Segment]] = {}
    for number in sorted(done):
        for bucket, segment in done[number].buckets:
            segments.setdefault(bucket, []).append(segment)
    return Mapped(counts, rejected, ids.ascending(), segments)


def _second_pass(runner: Runner, job: Job, mapped: Mapped, catalogue: pa.Table) -> Prepared:
    """Run the tasks of the second pass, adding up results as they come."""
    totals = np.zeros((3, catalogue.num_rows), dtype=np.int64)
    files = {}
    counts, rejected = Counter(mapped.counts), mapped.rejected
    del counts["kept"]  # what the first pass kept, the second tells apart
    buckets = range(job.settings.output.num_buckets)
    arguments = [(job, bucket, mapped.segments.get(bucket, [])) for bucket in buckets]
    with closing(runner.run_tasks("writing histories", reduce_bucket, arguments)) as results:
        for bucket, result, item_rows, numbers in results:
            files[bucket] = result.file
            counts.update(result.counts)
            totals[:, item_rows] += numbers
            if result.rejected is not None:
                rejected = first_rejected(
                    pa.concat_tables([rejected, read_segment(job.storage, result.rejected)]), MAX_REJECTED
                )
    return Prepared(counts, rejected, tuple(files[bucket] for bucket in buckets), catalogue, totals)


class _Distinct:
    """Distinct ids, merged whenever the new ones outnumber those merged before."""

    def __init__(self, kind: pa.DataType) -> None:
        self.merged = pa.array([], kind)
        self.waiting: list[pa.Array] = []

    def add(self, ids: pa.Array) -> None:
        self.waiting.append(ids)
        if sum(map(len, self.waiting)) > max(len(self.merged), 1_000_000):
            self._merge()

    def ascending(self) -> pa.Array:
        self._merge()
        return self.merged.take(pc.sort_indices(self.merged))

    def _merge(self) -> None:
        self.merged = pc.unique(pa.concat_arrays([self.merged, *self.waiting]))
        self.waiting = []
