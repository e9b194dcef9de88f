"""Read the files of a log: check all their columns first, then read rows, a bounded number at a time."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date, timedelta

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import nearest
from pipeline.data.columns import (
    DAY_US,
    EPOCH,
    NEWEST_US,
    OLDEST_US,
    check_time_type,
    id_type,
    read_times,
    suspected_unit,
    text_of,
)
from pipeline.data.sources import SourceSpec
from pipeline.errors import InputError
from pipeline.io.delimited import RawRows, text_header, text_rows
from pipeline.io.inputs import Log, day_of
from pipeline.io.parquet import arrow_errors_named, check_no_extension_types
from pipeline.io.storage.base import ObjectInfo

READERS = 16  # threads: reading small footers is mostly waiting
BATCH_ROWS = 1 << 16


@dataclass(frozen=True)
class FileColumns:
    """The columns of one file, from its header or footer."""

    types: dict[str, pa.DataType]  # Arrow types by our column names
    extra: tuple[str, ...]  # the file's names of columns that nobody reads
    group_rows: tuple[int, ...] = ()  # number of rows by row group, Parquet only


@dataclass(frozen=True)
class LogColumns:
    """The columns of a log; a column has the same type in all files."""

    user_type: pa.DataType
    item_type: pa.DataType
    names: tuple[str, ...]  # our names of the columns that the log has
    extra: tuple[str, ...]  # the log's names of columns that nobody reads
    group_rows: tuple[tuple[int, ...], ...]  # number of rows by file and row group


def newest_day(log: Log) -> date:
    """Find the newest `ds=` partition, else the day (UTC) of the newest sane `event_ts`. Raises InputError."""
    if log.is_partitioned:
        return max(day for file in log.files if (day := day_of(file.key)) is not None)
    check_columns(log)
    newest, example = OLDEST_US - 1, ""
    for file in log.files:
        for rows in read_rows(log, file, None, ("event_ts",)):
            column = rows.table["event_ts"].combine_chunks()
            times, is_null, is_bad = read_times(column, log.source)
            sane = times[~is_null & ~is_bad & (times < NEWEST_US)]
            newest = max(newest, int(sane.max(initial=newest)))
            example = example or next((value for value in text_of(column[:100]).to_pylist() if value), "")
    if newest < OLDEST_US and log.source.time_unit != "relative_s":
        hint = suspected_unit(example, log.source.time_unit)
        raise InputError(
            f"{log.uri}: no sane time in column {log.source.columns.event_ts!r}, which begins with {example!r}"
            + (f"; {hint} in {log.source_file}" if hint else f"; correct time_unit in {log.source_file}")
        )
    return EPOCH + timedelta(days=newest // DAY_US)


def check_columns(log: Log) -> LogColumns:
    """Read the header or footer of every file. Raises InputError that names the file and the column when a column is
    missing, has a type that cannot be read, or has another type than in the first file."""
    return join_columns(log, read_columns(log, log.files))


def read_columns(log: Log, files: Sequence[ObjectInfo]) -> list[FileColumns]:
    """Read the header or footer of some files of the log.

    Raises InputError that names the file and the column when a column is missing or has a type that cannot be read.
    """
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(lambda file: _head(log, file), files))


def join_columns(log: Log, heads: Sequence[FileColumns]) -> LogColumns:
    """The columns of a log, from those of its files.

    Raises InputError that names the file and the column when a column has another type than in the first file.
    """
    first = heads[0]
    for file, head in zip(log.files, heads, strict=True):
        for name in first.types.keys() | head.types.keys():
            file_type, first_type = head.types.get(name), first.types.get(name)
            if file_type != first_type:
                column = log.source.columns.named[name]
                raise InputError(
                    f"{log.origin(file)}: column {column!r} is {file_type or 'missing'}, but "
                    f"{first_type or 'missing'} in {log.files[0].key}; write all files of the log with the same types"
                )
    extra = sorted({name for head in heads for name in head.extra})
    return LogColumns(
        user_type=first.types["user_id"],
        item_type=first.types["item_id"],
        names=tuple(first.types),
        extra=tuple(extra),
        group_rows=tuple(head.group_rows for head in heads),
    )


def read_rows(
    log: Log, file: ObjectInfo, row_groups: tuple[int, ...] | None, names: tuple[str, ...]
) -> Iterator[RawRows]:
    """Yield the columns `names` of a file, or of some row groups of it, a bounded number of rows at a time."""
    our_names = {log.source.columns.named[name]: name for name in names}
    with arrow_errors_named(log.origin(file)), log.open(file) as source:
        if log.source.format == "csv":
            yield from text_rows(source, log, file, our_names)
            return
        with pq.ParquetFile(source, page_checksum_verification=True, pre_buffer=False, buffer_size=1 << 20) as parquet:
            for batch in parquet.iter_batches(
                BATCH_ROWS, row_groups=row_groups, columns=list(our_names), use_threads=False
            ):
                table = pa.Table.from_batches([batch])
                yield RawRows(table.rename_columns([our_names[name] for name in table.column_names]), (), 0)


def _head(log: Log, file: ObjectInfo) -> FileColumns:
    origin = log.origin(file)
    group_rows: tuple[int, ...] = ()
    if log.source.format == "csv":
        types = dict.fromkeys(text_header(log, file), pa.string())
    else:
        with arrow_errors_named(origin), log.open(file) as source, pq.ParquetFile(source) as parquet:
            schema, footer = parquet.schema_arrow, parquet.metadata
            group_rows = tuple(footer.row_group(i).num_rows for i in range(footer.num_row_groups))
        check_no_extension_types(schema, origin)
        types = {field.name: field.type for field in schema}
    named = log.source.columns.named
    our_types = {name: types[column] for name, column in named.items() if column in types}
    for name, column in named.items():
        if name not in our_types and name not in log.source.optional_columns:
            raise InputError(
                f"{origin}: no column {column!r}, which {log.source_file} takes as {name}; "
                f"the file has {', '.join(types)}{_did_you_mean(column, types)}"
            )
    try:
        return FileColumns(
            _types_to_agree(our_types, log.source), tuple(sorted(types.keys() - named.values())), group_rows
        )
    except InputError as error:
        raise InputError(f"{origin}: {error}") from None


def _types_to_agree(types: dict[str, pa.DataType], source: SourceSpec) -> dict[str, pa.DataType]:
    """Column types that must agree between files: ids as they are read, times as stored, null for all others."""
    named = source.columns.named
    agreed = {name: pa.null() for name in types}
    agreed["user_id"] = id_type(types["user_id"], source.user_id_type, named["user_id"])
    agreed["item_id"] = id_type(types["item_id"], source.item_id_type, named["item_id"])
    check_time_type(types["event_ts"], source, named["event_ts"])
    agreed["event_ts"] = types["event_ts"]
    return agreed


def _did_you_mean(column: str, known: dict[str, pa.DataType]) -> str:
    hint = nearest(column, known)
    return hint if "did you mean" in hint else ""
