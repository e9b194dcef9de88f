"""Reading the files of a log: their columns, checked before anything runs, and their rows, some at a time."""

import csv
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date, timedelta
from typing import Any

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from pipeline.artifacts import InputObject
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
)
from pipeline.data.sources import SourceSpec
from pipeline.errors import InfrastructureError, InputError
from pipeline.io.logs import Log, day_of, open_log
from pipeline.io.parquet import check_no_extension_types
from pipeline.io.storage import ObjectNotFoundError, Storage, open_storage
from pipeline.settings import Settings

READERS = 16  # footers are small: reading them is waiting
TEXT_BLOCK_BYTES = 4 << 20
BATCH_ROWS = 1 << 16
STAND_IN = b"\x1f"  # ASCII unit separator: takes the place of a delimiter of several characters
SHOWN = 200  # characters of a malformed line that are kept
MAX_MALFORMED = 1_000  # malformed lines kept per batch; all are counted


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


@dataclass(frozen=True)
class RawRows:
    """Some consecutive rows of a file under our column names, and lines between them that are no rows."""

    table: pa.Table
    malformed: tuple[str, ...]
    num_malformed: int


def newest_day(settings: Settings) -> date:
    """The newest `ds=` partition, else the day (UTC) of the newest sane `event_ts` in the log."""
    log = open_log(settings)
    if log.is_partitioned:
        return max(day for file in log.files if (day := day_of(file.key)) is not None)
    check_columns(log)
    storage = open_storage(log.uri)
    newest, example = OLDEST_US - 1, ""
    for file in log.files:
        for rows in read_rows(storage, log, file.key, None, ("event_ts",)):
            column = rows.table["event_ts"].combine_chunks()
            times, is_null, is_bad = read_times(column, log.source)
            sane = times[~is_null & ~is_bad & (times < NEWEST_US)]
            newest = max(newest, int(sane.max(initial=newest)))
            example = example or next((str(value) for value in column[:100].to_pylist() if value is not None), "")
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
    storage = open_storage(log.uri)
    with ThreadPoolExecutor(READERS) as pool:
        heads = list(pool.map(lambda file: _head(storage, log, file), log.files))
    first = heads[0]
    for file, head in zip(log.files, heads, strict=True):
        for name in first.types.keys() | head.types.keys():
            theirs, ours = head.types.get(name), first.types.get(name)
            if theirs != ours:
                column = log.source.columns.named[name]
                raise InputError(
                    f"{log.origin(file.key)}: column {column!r} is {theirs or 'missing'}, but {ours or 'missing'} in "
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
    storage: Storage, log: Log, key: str, row_groups: tuple[int, ...] | None, names: tuple[str, ...]
) -> Iterator[RawRows]:
    """The rows of a file (or of some row groups of it) in order, a bounded number at a time."""
    theirs = {log.source.columns.named[name]: name for name in names}
    with _errors_name(log.origin(key)), _opened(storage, key) as file:
        if log.source.format == "csv":
            yield from _text_rows(file, log, key, theirs)
            return
        with pq.ParquetFile(file, page_checksum_verification=True, pre_buffer=False, buffer_size=1 << 20) as parquet:
            for batch in parquet.iter_batches(
                BATCH_ROWS, row_groups=row_groups, columns=list(theirs), use_threads=False
            ):
                table = pa.Table.from_batches([batch])
                yield RawRows(table.rename_columns([theirs[name] for name in table.column_names]), (), 0)


def _head(storage: Storage, log: Log, file: InputObject) -> FileColumns:
    origin = log.origin(file.key)
    with _errors_name(origin), _opened(storage, file.key) as opened:
        if log.source.format == "csv":
            names = _text_header(opened, log, file.key)
            types = dict.fromkeys(names, pa.string())
            group_rows: tuple[int, ...] = ()
        else:
            with pq.ParquetFile(opened) as parquet:
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


@dataclass
class _Malformed:
    """Collects the lines that do not have the columns of their file."""

    lines: list[str] = field(default_factory=list)
    number: int = 0

    def __call__(self, row: Any) -> str:
        self.number += 1
        if len(self.lines) < MAX_MALFORMED:
            self.lines.append(str(row.text)[:SHOWN] if row.text else f"{row.actual_columns} columns")
        return "skip"

    def take(self) -> tuple[tuple[str, ...], int]:
        taken = tuple(self.lines), self.number
        self.lines, self.number = [], 0
        return taken


def _text_rows(file: pa.NativeFile, log: Log, key: str, theirs: dict[str, str]) -> Iterator[RawRows]:
    form = log.source.csv
    malformed = _Malformed()
    several = len(form.delimiter) > 1
    stream: Any = _decompressed(file, key)
    if several:
        stream = pa.PythonFile(_Replaced(stream, form.delimiter.encode(), STAND_IN), mode="r")
    names = list(form.column_names) or _text_header(file, log, key)
    with pacsv.open_csv(
        stream,
        read_options=pacsv.ReadOptions(
            use_threads=False, block_size=TEXT_BLOCK_BYTES, column_names=names, skip_rows=0 if form.column_names else 1
        ),
        parse_options=pacsv.ParseOptions(
            delimiter=STAND_IN.decode() if several else form.delimiter,
            quote_char=form.quote or False,
            invalid_row_handler=malformed,
        ),
        convert_options=pacsv.ConvertOptions(
            include_columns=list(theirs), column_types=dict.fromkeys(theirs, pa.binary()), strings_can_be_null=False
        ),
    ) as reader:
        for batch in reader:
            table = pa.Table.from_batches([batch])
            lines, number = malformed.take()
            yield RawRows(table.rename_columns([theirs[name] for name in table.column_names]), lines, number)
        lines, number = malformed.take()
        if number:
            yield RawRows(table_of_nothing(theirs), lines, number)


def table_of_nothing(theirs: dict[str, str]) -> pa.Table:
    return pa.table({ours: pa.array([], pa.binary()) for ours in theirs.values()})


def _text_header(file: pa.NativeFile, log: Log, key: str) -> list[str]:
    """The column names of a text file; leaves the file at its beginning."""
    form = log.source.csv
    head = _decompressed(file, key).read(1 << 16)
    file.seek(0)
    line = head.split(b"\n", 1)[0].removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace").rstrip("\r")
    cells: list[str]
    if len(form.delimiter) > 1 or not form.quote:
        cells = line.split(form.delimiter)
    else:
        cells = next(csv.reader(io.StringIO(line), delimiter=form.delimiter, quotechar=form.quote), [])
    if not form.column_names:
        return cells
    if len(cells) != len(form.column_names):
        raise InputError(
            f"{log.origin(key)}: the first line has {len(cells)} columns, but {log.source_file} names "
            f"{len(form.column_names)} ({', '.join(form.column_names)}): {line[:SHOWN]!r}"
        )
    return list(form.column_names)


def _decompressed(file: pa.NativeFile, key: str) -> pa.NativeFile:
    return pa.CompressedInputStream(file, "gzip") if key.endswith(".gz") else file


class _Replaced(io.RawIOBase):
    """A stream of bytes with one sequence replaced by another, also where a read would cut it in two."""

    def __init__(self, source: pa.NativeFile, old: bytes, new: bytes) -> None:
        self.source, self.old, self.new = source, old, new
        self.held = b""  # the end of what was read, which may be the beginning of `old`
        self.ready = b""

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        wanted = TEXT_BLOCK_BYTES if size is None or size < 0 else size
        while not self.ready:
            chunk = self.source.read(wanted)
            text = self.held + chunk
            whole = text.split(self.old)
            keep = 0
            if chunk:
                keep = next((n for n in range(len(self.old) - 1, 0, -1) if whole[-1].endswith(self.old[:n])), 0)
            self.held = whole[-1][len(whole[-1]) - keep :]
            whole[-1] = whole[-1][: len(whole[-1]) - keep]
            self.ready = self.new.join(whole)
            if not chunk:
                break
        answer, self.ready = self.ready[:wanted], self.ready[wanted:]
        return answer


@contextmanager
def _opened(storage: Storage, key: str) -> Iterator[pa.NativeFile]:
    try:
        file = storage.open(key)
    except ObjectNotFoundError:
        raise InputError(
            f"{storage.uri}/{key}: removed while it was read; run again when the log is complete"
        ) from None
    with file:
        yield file


@contextmanager
def _errors_name(origin: str) -> Iterator[None]:
    """Arrow's errors on a file become ours: the file is damaged, or the store failed."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, MemoryError):
            raise
        reason = " ".join(str(error).split())[:400]
        if "AWS Error" in reason or getattr(error, "errno", None) is not None:
            raise InfrastructureError(f"{origin}: the store failed while the file was read: {reason}") from error
        raise InputError(f"{origin}: damaged or cut short ({reason}); restore it or remove it") from error
