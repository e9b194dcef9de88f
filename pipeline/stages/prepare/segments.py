"""The scratch of prepare: rows between its two passes, one object for many buckets, each bucket readable alone."""

import itertools
import zlib
from collections.abc import Sequence

import pyarrow as pa

from pipeline.artifacts import Artifact, FileEntry
from pipeline.config import Config
from pipeline.errors import InfrastructureError
from pipeline.io.artifacts import Claims, no_files
from pipeline.io.storage.base import ObjectNotFoundError, Storage, put


class Segment(Config):
    """A table inside an object, as an Arrow IPC stream."""

    key: str
    offset: int  # bytes
    length: int  # bytes
    crc32: int


class MapResult(Config):
    """The result of one task of the first pass."""

    buckets: tuple[tuple[int, Segment], ...]  # (bucket, its rows), in the order of the log
    item_ids: tuple[Segment, ...]  # empty with a catalogue
    rejected: Segment | None  # the first bad rows of each reason
    counts: dict[str, int]  # number of rows: read, late, kept, and rejected by reason


class ReduceResult(Config):
    """The result of one task of the second pass."""

    file: FileEntry  # the bucket
    rejected: Segment | None  # the first bad rows of each reason
    counts: dict[str, int]  # number of rows: read, late, kept, and rejected by reason


def scratch_prefix(histories: Artifact) -> str:
    """The prefix of the temporary files of these histories."""
    return histories.key("_scratch")


def map_claims(storage: Storage, scratch: str) -> Claims[MapResult]:
    """The finished tasks of the first pass. Claims do not check segments: `read_segment` does."""
    return Claims(storage, scratch, "task", MapResult, no_files)


def reduce_claims(storage: Storage, histories: Artifact) -> Claims[ReduceResult]:
    """The finished buckets."""
    scratch = f"{scratch_prefix(histories)}/buckets"
    return Claims(storage, scratch, "bucket", ReduceResult, lambda result: (result.file,), root=histories.prefix)


def write_segments(storage: Storage, key: str, tables: Sequence[pa.Table]) -> list[Segment]:
    """Write the tables one after the other into one object. Writing the same tables again is fine."""
    options = pa.ipc.IpcWriteOptions(compression="zstd", use_threads=False)
    sink = pa.BufferOutputStream()
    bounds = [0]
    for table in tables:
        with pa.ipc.new_stream(sink, table.schema, options=options) as writer:
            writer.write_table(table)
        bounds.append(sink.tell())
    data = sink.getvalue()
    put(storage, key, data.to_pybytes())
    view = memoryview(data)
    return [
        Segment(key=key, offset=start, length=end - start, crc32=zlib.crc32(view[start:end]))
        for start, end in itertools.pairwise(bounds)
    ]


def read_segment(storage: Storage, segment: Segment) -> pa.Table:
    """The table of a segment. Raises InfrastructureError when its bytes are gone or damaged."""
    try:
        with storage.open(segment.key) as file:
            file.seek(segment.offset)
            data = file.read(segment.length)
    except ObjectNotFoundError:
        raise InfrastructureError(f"{storage.uri}/{segment.key}: removed before it was read; run again") from None
    if zlib.crc32(data) != segment.crc32:
        raise InfrastructureError(f"{storage.uri}/{segment.key}: damaged in the store; remove it and run again")
    with pa.ipc.open_stream(data) as reader:
        return reader.read_all()


def remove_scratch(storage: Storage, histories: Artifact) -> None:
    """Delete the temporary files of these histories."""
    for info in storage.list(f"{scratch_prefix(histories)}/"):
        storage.delete(info.key)
