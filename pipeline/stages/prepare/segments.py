"""What prepare sets aside between its two passes: the rows of some buckets side by side in one object, each bucket's
part readable by itself."""

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
    """One table inside an object, an Arrow IPC stream."""

    key: str
    offset: int
    length: int
    crc32: int


class MapResult(Config):
    """What one task of the first pass leaves."""

    buckets: tuple[tuple[int, Segment], ...]  # in the order of the log
    item_ids: tuple[Segment, ...]
    rejected: Segment | None
    counts: dict[str, int]


class ReduceResult(Config):
    """What one task of the second pass leaves beside the bucket's file."""

    file: FileEntry
    rejected: Segment | None
    counts: dict[str, int]


def scratch_prefix(histories: Artifact) -> str:
    """Where everything temporary of these histories lies."""
    return histories.key("_scratch")


def map_claims(storage: Storage, scratch: str) -> Claims[MapResult]:
    """The tasks of the first pass that are done; a segment is checked when it is read."""
    return Claims(storage, scratch, "task", MapResult, no_files)


def reduce_claims(storage: Storage, histories: Artifact) -> Claims[ReduceResult]:
    """The buckets that are done."""
    scratch = f"{scratch_prefix(histories)}/buckets"
    return Claims(storage, scratch, "bucket", ReduceResult, lambda result: (result.file,), root=histories.prefix)


def write_segments(storage: Storage, key: str, tables: Sequence[pa.Table]) -> list[Segment]:
    """Write the tables side by side as one object; writing the same again is fine."""
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
    """The table; the bytes are checked. Raises InfrastructureError when they are not there any more."""
    try:
        with storage.open(segment.key) as file:
            file.seek(segment.offset)
            data = file.read(segment.length)
    except ObjectNotFoundError:
        raise InfrastructureError(f"{storage.uri}/{segment.key}: removed while it was needed; run again") from None
    if zlib.crc32(data) != segment.crc32:
        raise InfrastructureError(f"{storage.uri}/{segment.key}: damaged in the store; remove it and run again")
    with pa.ipc.open_stream(data) as reader:
        return reader.read_all()


def remove_scratch(storage: Storage, histories: Artifact) -> None:
    """Remove everything temporary of these histories."""
    for info in storage.list(f"{scratch_prefix(histories)}/"):
        storage.delete(info.key)
