"""Preparing the log in two passes.

Memory does not grow with the log: a task holds `rows_per_task` rows or one bucket, and this process holds the item
index and counts. A rerun after a crash does only the tasks that are not done.
"""

import logging
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from datetime import date, timedelta

import numpy as np
import pyarrow as pa

from pipeline.artifacts import Manifest
from pipeline.data.availability import is_eligible
from pipeline.data.cleaning import REJECTED
from pipeline.data.columns import EPOCH, DistinctIds, Mask
from pipeline.data.days import looks_like_a_day
from pipeline.data.item_events import ItemEvents
from pipeline.data.period import Period
from pipeline.data.volume import Finding
from pipeline.errors import InputError
from pipeline.io.artifacts import READERS, write_file
from pipeline.io.newest import SLACK
from pipeline.io.night import Night
from pipeline.io.parquet import write_parquet_bytes
from pipeline.settings import Settings
from pipeline.stages.prepare.job import Job, MapTask, cut_pieces, read_catalogue
from pipeline.stages.prepare.limits import (
    check_bad_share,
    check_duplicates,
    check_orphans,
    check_seen_types,
    check_volume,
    check_words,
)
from pipeline.stages.prepare.parts import columns_of, parts_of, remove_old
from pipeline.stages.prepare.report import Prepared, write_histories
from pipeline.stages.prepare.segments import (
    MapResult,
    Quarantine,
    Segment,
    add_rejected,
    map_claims,
    read_segment,
    remove_scratch,
    scratch_prefix,
)
from pipeline.stages.prepare.tasks import map_pieces, reduce_bucket
from pipeline.stages.runner import Runner

log = logging.getLogger("nightrails")


def open_job(night: Night, settings: Settings) -> Job:
    """Check the columns of every file of the log. Raises InputError for a file that cannot be read."""
    parts = parts_of(night, settings)
    columns = columns_of(night.inputs.log, parts, night.storage)
    if columns.num_unverifiable:
        log.info(
            "   %d of the log's %d files have no page checksums, so damage in them cannot be noticed (pyarrow writes "
            "them with write_page_checksum=True, Spark with parquet.page.write-checksum.enabled)",
            *(columns.num_unverifiable, len(night.inputs.log.files)),
        )
    return Job(night, settings, columns, tuple(parts))


def prepare(runner: Runner, job: Job) -> Manifest:
    """Make the histories and return the manifest of the Histories artifact.

    Raises InputError when no row is left, too many rows are bad, or the catalogue lacks the items of too many events.
    """
    night, log = job.night, job.log
    items = night.inputs.items
    catalogue = pa.table({"item_id": []})
    if items is not None:
        limit = job.settings.items.max_gigabytes
        catalogue = read_catalogue(items, job.columns.item_type, log.source.item_id_type, limit)
        if not catalogue.num_rows:
            raise InputError(f"{items.name}: the catalogue has no items; write it again, or leave items.uri out")
    eligible = is_eligible(catalogue, job.settings.items, night.ds, items.name if items else "")
    mapped = _first_pass(runner, job)
    if items is None:
        catalogue = pa.table({"item_id": mapped.item_ids})
        eligible = np.ones(catalogue.num_rows, dtype=bool)
    if not catalogue.num_rows:
        raise InputError(f"{log.name}: no row of the log is left to learn from; counts: {dict(mapped.counts)}")
    prepared = _second_pass(runner, job, mapped, catalogue, eligible)
    check_orphans(log, job.settings, prepared.counts, prepared.rejected)
    check_seen_types(log, job.settings, prepared.counts)
    check_duplicates(log, job.settings, prepared.counts)
    manifest = write_histories(night, job.settings, job.columns, prepared)
    remove_scratch(night.storage, night.histories)
    remove_old(night, job.settings, job.parts)
    return manifest


@dataclass(frozen=True)
class Mapped:
    """The result of the first pass: sums, and the segments that hold the rows."""

    period: Period  # what the night sees
    odd: list[Finding]  # about the day's events
    counts: Counter[str]
    rejected: pa.Table  # the first bad rows of each reason
    quarantine: Quarantine  # all of them
    item_ids: pa.Array  # distinct, ascending; empty with a catalogue
    segments: dict[
        int, list[tuple[int, Segment]]
    ]  # by bucket, in the order of the log; each with its part's first file


def _first_pass(runner: Runner, job: Job) -> Mapped:
    """Run the first pass and add up the results as they come. Raises InputError for too many bad rows."""
    results: dict[tuple[int, int], MapResult] = {}  # by (first file of the part, number of the task)
    counts: Counter[str] = Counter()
    rejected = REJECTED.empty_table()
    num_rows = sum(sum(rows) for rows in job.columns.group_rows)  # 0 for text files, which do not say
    with closing(_map_results(runner, job)) as finished:
        for task, result in finished:
            results[task.part.first_file, task.number] = result
            counts.update(result.counts)
            rejected = add_rejected(job.storage, rejected, result.rejected, task.part.first_file)
            if num_rows:  # a log with too many bad rows is refused before its end is read
                check_bad_share(job.log, job.settings, counts, rejected, num_rows)
    check_bad_share(job.log, job.settings, counts, rejected, counts["rows_read"])
    check_words(job.log, job.settings, counts)
    events = _events_by_day(results.values())
    period = _period(job, {day: kinds.total() for day, kinds in events.items()})
    odd = check_volume(job.log, job.settings, events, job.night.ds)
    ids = DistinctIds(job.columns.item_type)
    for result in results.values() if job.night.inputs.items is None else ():
        for item_ids in _item_ids(job, result, period):
            ids.add(item_ids)
    segments: dict[int, list[tuple[int, Segment]]] = {}
    quarantine: list[tuple[int, Segment]] = []
    for (first_file, _), result in sorted(results.items(), key=lambda entry: entry[0]):
        quarantine += [(first_file, result.rejected)] if result.rejected else []
        for bucket, segment in result.buckets:
            segments.setdefault(bucket, []).append((first_file, segment))
    return Mapped(period, odd, counts, rejected, quarantine, ids.ascending(), segments)


def _map_results(runner: Runner, job: Job) -> Generator[tuple[MapTask, MapResult], None, None]:
    """Yield each task of the first pass with its result: first those that are done, then the others as they finish."""
    rows_per_task = job.settings.prepare.rows_per_task
    tasks = [
        MapTask(part, number, pieces)
        for part in job.parts
        for number, pieces in enumerate(cut_pieces(job.log, job.columns, part, rows_per_task))
    ]
    with ThreadPoolExecutor(READERS) as pool:
        done = list(pool.map(lambda task: map_claims(job.storage, task.part.prefix).read(task.number), tasks))
    missing = [task for task, result in zip(tasks, done, strict=True) if result is None]
    if len(missing) < len(tasks):
        log.info("   %d of %d tasks of reading the log are done already", len(tasks) - len(missing), len(tasks))
    yield from ((task, result) for task, result in zip(tasks, done, strict=True) if result is not None)
    yield from runner.run_tasks("reading the log", map_pieces, [(job, task) for task in missing])


def _events_by_day(results: Iterable[MapResult]) -> dict[date, Counter[str]]:
    events: dict[date, Counter[str]] = {}
    for result in results:
        for day, kind, number in result.days:
            events.setdefault(EPOCH + timedelta(days=day), Counter())[kind] += number
    return events


def _period(job: Job, numbers: Mapping[date, int]) -> Period:
    """What the night sees of a log with so many events by day. Raises InputError when none of them is of its day."""
    ds = job.night.ds
    if not job.log.is_partitioned and numbers and ds not in numbers:
        raise InputError(f"log.uri {job.log.uri}: no event of the day {ds} (--ds); the newest is of {max(numbers)}")
    newest = job.storage.clock().date() + SLACK
    goes_on = any(ds < day <= newest and looks_like_a_day(day, numbers) for day in numbers)
    return job.period.going_on() if goes_on else job.period


def _item_ids(job: Job, result: MapResult, period: Period) -> Iterator[pa.Array]:
    """The items of a task's events that the night learns from, with repeats."""
    if result.oldest_ts >= period.oldest and result.newest_ts < period.newest:
        for segment in result.item_ids:
            yield read_segment(job.storage, segment)["item_id"].combine_chunks()
        return
    for _, segment in result.buckets:
        events, _, _ = period.cut(read_segment(job.storage, segment))
        yield events["item_id"].combine_chunks()


def _second_pass(runner: Runner, job: Job, mapped: Mapped, catalogue: pa.Table, eligible: Mask) -> Prepared:
    """Run the second pass and add up the results as they come."""
    night, ids = job.night, write_parquet_bytes(catalogue.select(["item_id"]))
    prefix = scratch_prefix(night.histories)
    item_ids = write_file(night.storage, prefix, "item-ids.parquet", ids, catalogue.num_rows)
    item_events = ItemEvents.none_of(catalogue.num_rows)
    files = {}
    of_buckets: dict[int, Segment] = {}
    counts, rejected = Counter(mapped.counts), mapped.rejected
    del counts["kept"]  # the second pass counts these rows again, as kept or rejected
    buckets = range(job.settings.output.num_buckets)
    key = f"{prefix}/{item_ids.key}"
    arguments = [(job, bucket, mapped.segments.get(bucket, []), key, mapped.period) for bucket in buckets]
    with closing(runner.run_tasks("writing histories", reduce_bucket, arguments)) as finished:
        for bucket, result, of_bucket in finished:
            files[bucket] = result.file
            counts.update(result.counts)
            item_events.add(of_bucket)
            rejected = add_rejected(job.storage, rejected, result.rejected)
            of_buckets |= {bucket: result.rejected} if result.rejected else {}
    quarantine = [*mapped.quarantine, *((0, of_buckets[bucket]) for bucket in sorted(of_buckets))]
    in_order = tuple(files[bucket] for bucket in buckets)
    return Prepared(counts, rejected, quarantine, mapped.odd, in_order, catalogue, eligible, item_events)
