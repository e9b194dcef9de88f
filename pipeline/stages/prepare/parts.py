"""The parts of a log: each partition is read once, and what was read of it is kept for the nights to come.

A night reads the partitions that are new or have changed. The first pass treats a part in the same way on every night,
so that a night that reads one partition gives the same histories as one that reads them all.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date, timedelta
from itertools import groupby

import pyarrow as pa

from pipeline.config import Config, fingerprint
from pipeline.data.days import end_of
from pipeline.data.times import NEWEST_US
from pipeline.io.artifacts import READERS, Claims, no_objects
from pipeline.io.inputs import Log, day_of
from pipeline.io.night import Night
from pipeline.io.rows import FileColumns, LogColumns, join_columns, read_columns
from pipeline.io.storage.base import Storage
from pipeline.settings import Settings
from pipeline.stages.prepare.segments import scratch_prefix

VERSION = 4  # of what the first pass makes of a part; raise it by hand when that changes
HOUR_US = 3_600_000_000
KEPT = "read"  # the folder of the parts below the root


@dataclass(frozen=True)
class Part:
    """Some files of the log, from `first_file` on: a partition, or all files of a log without partitions."""

    first_file: int
    num_files: int
    day: date | None  # of the partition
    prefix: str  # of what the first pass makes of the part

    def newest_us(self, zone: str) -> int:
        """The first time, in µs, that no row of the part can have. Clocks of a partition may be ahead, and may count
        another zone's days: by a day and an hour."""
        return NEWEST_US if self.day is None else end_of(self.day + timedelta(days=1), zone) + HOUR_US


class Head(Config):
    """The columns of one file (`FileColumns`), as JSON."""

    types: str  # an Arrow schema in hexadecimal
    extra: tuple[str, ...]
    group_rows: tuple[int, ...]
    is_verifiable: bool


class Heads(Config):
    """The columns of a part's files, in their order."""

    files: tuple[Head, ...]


def parts_of(night: Night, settings: Settings) -> list[Part]:
    """Cut the log into its parts, in order. What the first pass makes of a partition is kept if settings say so."""
    log = night.inputs.log
    scratch = f"{scratch_prefix(night.histories)}/rows-{settings.prepare.rows_per_task}"
    if not log.is_partitioned:
        return [Part(0, len(log.files), None, scratch)]
    folder = _folder(log, settings) if settings.prepare.keep_partitions else scratch
    parts = []
    first = 0
    for day, files in groupby(log.files, key=lambda file: day_of(file.key)):
        identity = [[file.key, file.size, file.etag] for file in files]
        parts.append(Part(first, len(identity), day, f"{folder}/ds={day}/{fingerprint('part', VERSION, identity)}"))
        first += len(identity)
    return parts


def columns_of(log: Log, parts: Sequence[Part], storage: Storage) -> LogColumns:
    """The columns of the log; only the files of new parts are opened. Raises InputError as `join_columns`."""
    with ThreadPoolExecutor(READERS) as pool:
        kept = list(pool.map(lambda part: _heads(storage, part).read(0), parts))
    files: list[FileColumns] = []
    for part, heads in zip(parts, kept, strict=True):
        if heads is None:
            files += read_columns(log, log.files[part.first_file : part.first_file + part.num_files])
        else:
            files += [_column_types(head) for head in heads.files]
    columns = join_columns(log, files)
    for part, heads in zip(parts, kept, strict=True):
        if heads is None:
            of_part = files[part.first_file : part.first_file + part.num_files]
            _heads(storage, part).claim(0, Heads(files=tuple(_head(file) for file in of_part)))
    return columns


def remove_old(night: Night, settings: Settings, parts: Sequence[Part]) -> None:
    """Delete what was kept of partitions that are older than tonight's log, or have changed since."""
    oldest = min((part.day for part in parts if part.day), default=None)
    if oldest is None:
        return
    current = {part.day: part.prefix for part in parts}
    for info in night.storage.list(f"{_folder(night.inputs.log, settings)}/"):
        day = day_of(info.key)
        is_of_tonight = day in current and info.key.startswith(f"{current[day]}/")
        if day is not None and (day < oldest or day in current) and not is_of_tonight:
            night.storage.delete(info.key)


def _folder(log: Log, settings: Settings) -> str:
    """The folder of everything that is read from this log in this way."""
    spec = log.source.model_dump(mode="json")
    shape = (settings.output.num_buckets, settings.prepare.rows_per_task, settings.log.time_zone)
    return f"{KEPT}/{fingerprint('log', log.uri, spec, *shape)}"


def _heads(storage: Storage, part: Part) -> Claims[Heads]:
    return Claims(storage, part.prefix, "heads", Heads, no_objects)


def _head(columns: FileColumns) -> Head:
    types = pa.schema(list(columns.types.items())).serialize().to_pybytes().hex()
    return Head(types=types, extra=columns.extra, group_rows=columns.group_rows, is_verifiable=columns.is_verifiable)


def _column_types(head: Head) -> FileColumns:
    schema = pa.ipc.read_schema(pa.py_buffer(bytes.fromhex(head.types)))
    return FileColumns({field.name: field.type for field in schema}, head.extra, head.group_rows, head.is_verifiable)
