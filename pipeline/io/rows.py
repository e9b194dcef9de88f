"""Reading the files of a log: their columns, checked before anything runs, and their rows, some at a time."""

from collections.abc import Iterator
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

READERS = 16  # footers are small: reading them is waiting
BATCH_ROWS = 1 << 16


@dataclass(frozen=True)
class FileColumns:
    """What the head of one file says: the Arrow types of our columns, other columns, and rows by row group."""

    types: dict[str, pa.DataType]
    extra: tuple[str, ...]
    group_rows: tuple[int, ...] = ()  # Parquet only


@dataclass(frozen=True)
class LogColumns:
    """What all files of a log agree on."""

    user_type: pa.DataType
    item_type: pa.DataType
    names: tuple[str, ...]  # ours, that the log has
    extra: tuple[str, ...]  # the log's, that nobody reads
    group_rows: tuple[tuple[int, ...], ...]  # by file


def newest_day(log: Log) -> date:
    """The newest `ds=` partition, else the day (UTC) of the newest sane `event_ts` in the log."""
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
    """Look at the head of every file. Raises InputError that names the file and the column: a column that is
    missing, has a type that cannot be read, or another type than in the first file."""
    with ThreadPoolExecutor(READERS) as pool:
        heads = list(pool.map(lambda file: _head(log, file), log.files))
    first = heads[0]
    for file, head in zip(log.files, heads, strict=True):
        for name in first.types.keys() | head.types.keys():
            theirs, ours = head.types.get(name), first.types.get(name)
            if theirs != ours:
                column = log.source.columns.named[name]
                raise InputError(
                    f"{log.origin(file)}: column {column!r} is {theirs or 'missing'}, but {ours or 'missing'} in "
                    f"{log.files[0].key}; write all files of the log with the same types"
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
    """The rows of a file (or of some row groups of it) in order, a bounded number at a time."""
    theirs = {log.source.columns.named[name]: name for name in names}
    with arrow_errors_named(log.origin(file)), log.open(file) as source:
        if log.source.format == "csv":
            yield from text_rows(source, log, file, theirs)
            return
        with pq.ParquetFile(source, page_checksum_verification=True, pre_buffer=False, buffer_size=1 << 20) as parquet:
            for batch in parquet.iter_batches(
                BATCH_ROWS, row_groups=row_groups, columns=list(theirs), use_threads=False
            ):
                table = pa.Table.from_batches([batch])
                yield RawRows(table.rename_columns([theirs[name] for name in table.column_names]), (), 0)


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
        types = {column.name: column.type for column in schema}
    named = log.source.columns.named
    found = {ours: types[theirs] for ours, theirs in named.items() if theirs in types}
    for ours, theirs in named.items():
        if ours not in found and ours not in log.source.optional_columns:
            raise InputError(
                f"{origin}: no column {theirs!r}, which {log.source_file} takes as {ours}; "
                f"the file has {', '.join(types)}{_did_you_mean(theirs, types)}"
            )
    try:
        return FileColumns(_settled(found, log.source), tuple(sorted(types.keys() - named.values())), group_rows)
    except InputError as error:
        raise InputError(f"{origin}: {error}") from None


def _settled(found: dict[str, pa.DataType], source: SourceSpec) -> dict[str, pa.DataType]:
    """The types that matter: of ids what they become, of times the Arrow type, of others one that stands for any."""
    named = source.columns.named
    settled = {name: pa.null() for name in found}
    settled["user_id"] = id_type(found["user_id"], source.user_id_type, named["user_id"])
    settled["item_id"] = id_type(found["item_id"], source.item_id_type, named["item_id"])
    check_time_type(found["event_ts"], source, named["event_ts"])
    settled["event_ts"] = found["event_ts"]
    return settled


def _did_you_mean(wanted: str, known: dict[str, pa.DataType]) -> str:
    hint = nearest(wanted, known)
    return hint if "did you mean" in hint else ""
