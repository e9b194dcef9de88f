"""Counting which item follows which, in two passes: first the pairs of each user bucket, then their sums, and the
neighbours that are kept, by range of items.

Memory does not grow with the log: a task holds the pairs of one bucket or of one range. A rerun after a crash does only
the tasks that are not done. No import of torch here, so that the tasks start fast.
"""

from collections.abc import Sequence
from contextlib import closing

import pyarrow as pa

from pipeline.artifacts import Manifest
from pipeline.config import Config
from pipeline.data.columns import numpy_of
from pipeline.data.lists import Int64
from pipeline.data.neighbours import COUNTINGS, PairCounts, count_pairs, cut_items, nearest_neighbours
from pipeline.io.artifacts import Claims, read_manifest
from pipeline.io.histories import read_bucket, read_num_events
from pipeline.io.neighbours import range_claims, seal_neighbours, write_range
from pipeline.io.night import Night
from pipeline.settings import Settings
from pipeline.stages.prepare.segments import Segment, read_segment, write_segments
from pipeline.stages.runner import Runner

# In a task of the second pass, which takes about 100 bytes for each. With another number, raise the recipe's version:
# the parts of a count that was killed would not fit.
MAX_PAIRS = 4_000_000

Ranges = Sequence[tuple[int, int]]


class BucketPairs(Config):
    """The pairs of one bucket, a segment for each range of items."""

    segments: tuple[Segment, ...]


def count_neighbours(runner: Runner, night: Night, settings: Settings, max_pairs: int = MAX_PAIRS) -> Manifest:
    """Make the night's Neighbours artifact and return its manifest: counts of the events that its model has learned.

    A task of the second pass holds at most `max_pairs` pairs, or those of one item; the artifact's lists are the same
    for any number. Raises InputError when the night is not prepared, and the errors of `Runner.run_tasks`.
    """
    manifest = read_manifest(night.storage, night.neighbours.prefix)
    if manifest is None:
        ranges = cut_items(_num_events(night), max_pairs, COUNTINGS[settings.counted_pairs])
        files = range_claims(night.storage, night.neighbours)
        missing = files.missing(range(len(ranges)))
        if missing:
            _count_buckets(runner, night, settings, ranges)
            sums = [(night, settings, number, *ranges[number]) for number in missing]
            with closing(runner.run_tasks("adding up pairs", add_up_range, sums)) as finished:
                for _ in finished:
                    pass
        manifest = seal_neighbours(night, settings, files.done())
    remove_scratch(night)
    return manifest


def _count_buckets(runner: Runner, night: Night, settings: Settings, ranges: Ranges) -> None:
    missing = pair_claims(night).missing(range(settings.output.num_buckets))
    tasks = [(night, settings, bucket, ranges) for bucket in missing]
    with closing(runner.run_tasks("counting pairs", count_bucket, tasks)) as finished:
        for _ in finished:
            pass


def count_bucket(night: Night, settings: Settings, index: int, ranges: Ranges) -> None:
    """First pass: count the pairs of one bucket and keep them by range."""
    num_items = ranges[-1][1]
    counting = COUNTINGS[settings.counted_pairs]
    pairs = count_pairs(read_bucket(night.storage, night.histories, index), night.learned_part, num_items, counting)
    parts = [pairs.within(low, high, num_items) for low, high in ranges]
    tables = [pa.table({"code": part.codes, "count": part.counts}) for part in parts]
    segments = write_segments(night.storage, _scratch_prefix(night), f"bucket-{index:05d}.arrows", tables)
    pair_claims(night).claim(index, BucketPairs(segments=tuple(segments)))


def add_up_range(night: Night, settings: Settings, number: int, low: int, high: int) -> None:
    """Second pass: add up the pairs whose first item is in rows `low` to `high` (exclusive) and keep the best."""
    claims = pair_claims(night)
    parts = []
    for bucket in range(settings.output.num_buckets):
        table = read_segment(night.storage, claims.require(bucket, "run again").segments[number])
        parts.append(PairCounts(numpy_of(table["code"]), numpy_of(table["count"])))
    lists = nearest_neighbours(PairCounts.sum(parts), _num_events(night), low, high, settings.counts.num_neighbours)
    write_range(night.storage, night.neighbours, number, lists)


def pair_claims(night: Night) -> Claims[BucketPairs]:
    """The buckets whose pairs are counted: part n is bucket n."""

    def objects(pairs: BucketPairs) -> dict[str, int]:
        last = pairs.segments[-1]
        return {last.key: last.offset + last.length}

    return Claims(night.storage, _scratch_prefix(night), "bucket", BucketPairs, objects)


def remove_scratch(night: Night) -> None:
    """Delete the counts by bucket."""
    for info in night.storage.list(f"{_scratch_prefix(night)}/"):
        night.storage.delete(info.key)


def _scratch_prefix(night: Night) -> str:
    return night.neighbours.key("_scratch")


def _num_events(night: Night) -> Int64:
    return read_num_events(night.storage, night.histories, night.learned_part)
