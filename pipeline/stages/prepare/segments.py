"""The scratch of prepare: rows between its two passes, one object for many buckets, each bucket readable alone."""

import itertools
import zlib
from collections.abc import Iterable, Sequence

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.artifacts import Artifact, FileEntry
from pipeline.config import Config
from pipeline.data.cleaning import first_rejected
from pipeline.errors import InfrastructureError
from pipeline.io.artifacts import Claims, sizes_of, write_file
from pipeline.io.storage.base import ObjectNotFoundError, Storage

MAX_EXAMPLES = 1_000  # bad rows of each reason that messages are chosen from; the quarantine has all


class Segment(Config):
    """A table inside an object, as an Arrow IPC stream."""

    key: str
    offset: int  # bytes
    length: int  # bytes
    crc32: int


class MapResult(Config):
    """The result of one task of the first pass."""

    buckets: tuple[tuple[int, Segment], ...]  # (bucket, its rows), in the order of the log
    item_ids: tuple[Segment, ...]
    rejected: Segment | None  # all bad rows
    counts: dict[str, int]  # number of rows: read, late, kept, and rejected by reason
    oldest_ts: int  # of its events, in µs since 1970
    newest_ts: int
    days: tuple[tuple[int, str, int], ...]  # (day counted from 1970, type of event, number of events)

    @property
    def segments(self) -> list[Segment]:
        """All segments that the task wrote."""
        return [*(rows for _, rows in self.buckets), *self.item_ids, *([self.rejected] if self.rejected else [])]


class ReduceResult(Config):
    """The result of one task of the second pass."""

    file: FileEntry  # the bucket
    rejected: Segment | None  # all bad rows
    counts: dict[str, int]  # number of rows: read, late, kept, and rejected by reason


# All bad rows of a log, in the order of the log: segments, each with its part's first file.
Quarantine = Sequence[tuple[int, Segment]]


def scratch_prefix(histories: Artifact) -> str:
    """The prefix of the temporary files of these histories."""
    return histories.key("_scratch")


def map_claims(storage: Storage, scratch: str) -> Claims[MapResult]:
    """The finished tasks of the first pass."""
    return Claims(storage, scratch, "task", MapResult, lambda result: _sizes_of(result.segments))


def reduce_claims(storage: Storage, histories: Artifact) -> Claims[ReduceResult]:
    """The finished buckets."""

    def objects(result: ReduceResult) -> dict[str, int]:
        rejected = (result.rejected,) if result.rejected else ()
        return sizes_of(histories.prefix, result.file) | _sizes_of(rejected)

    return Claims(storage, f"{scratch_prefix(histories)}/buckets", "bucket", ReduceResult, objects)


def write_segments(storage: Storage, prefix: str, name: str, tables: Sequence[pa.Table]) -> list[Segment]:
    """Write the tables one after the other into one object below `prefix`, as `name` with the hash of its content."""
    options = pa.ipc.IpcWriteOptions(compression="zstd", use_threads=False)
    sink = pa.BufferOutputStream()
    bounds = [0]
    for table in tables:
        with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
            writer.write_table(table)
        bounds.append(sink.tell())
    data = sink.getvalue()
    entry = write_file(storage, prefix, name, data.to_pybytes(), sum(table.num_rows for table in tables))
    view = memoryview(data)
    return [
        Segment(key=f"{prefix}/{entry.key}", offset=start, length=end - start, crc32=zlib.crc32(view[start:end]))
        for start, end in itertools.pairwise(bounds)
    ]


def read_segment(storage: Storage, segment: Segment) -> pa.Table:
    """The table of a segment.

    Raises InfrastructureError when its bytes are gone or damaged. A damaged object is removed, so that the next run
    does its task again.
    """
    try:
        with storage.open(segment.key) as file:
            file.seek(segment.offset)
            data = file.read(segment.length)
    except ObjectNotFoundError:
        raise InfrastructureError(f"{storage.uri}/{segment.key}: removed before it was read; run again") from None
    if zlib.crc32(data) != segment.crc32:
        storage.delete(segment.key)
        raise InfrastructureError(f"{storage.uri}/{segment.key}: was damaged and is removed; run again to make it anew")
    with pa.ipc.open_stream(data) as reader:
        return reader.read_all()


def renumbered(rows: pa.Table, first_file: int) -> pa.Table:
    """The rows of a part whose files are numbered from 0, with the numbers of the whole log's files."""
    column = rows.column_names.index("file")
    files = pc.add(rows["file"], pa.scalar(first_file, pa.int32()))
    return rows.set_column(column, rows.field(column), files)


def add_rejected(storage: Storage, rejected: pa.Table, segment: Segment | None, first_file: int = 0) -> pa.Table:
    """Add the bad rows of a task to `rejected`, examples of the tasks before it, and keep the first of each reason."""
    if segment is None:
        return rejected
    tables = [rejected, renumbered(read_segment(storage, segment), first_file)]
    return first_rejected(pa.concat_tables(tables), MAX_EXAMPLES)


def _sizes_of(segments: Iterable[Segment]) -> dict[str, int]:
    """The size in bytes of each object that consists of these segments, by key."""
    sizes: dict[str, int] = {}
    for segment in segments:
        sizes[segment.key] = max(sizes.get(segment.key, 0), segment.offset + segment.length)
    return sizes


def remove_scratch(storage: Storage, histories: Artifact) -> None:
    """Delete the temporary files of these histories."""
    for info in storage.list(f"{scratch_prefix(histories)}/"):
        storage.delete(info.key)
