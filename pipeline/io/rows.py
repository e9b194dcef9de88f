"""Read the files of a log: check all their columns first, then read rows, a bounded number at a time."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import nearest
from pipeline.data.columns import TEXT, is_text, plain_type, without_views
from pipeline.data.ids import id_type
from pipeline.data.sources import SourceSpec
from pipeline.data.times import check_time_type
from pipeline.errors import InputError
from pipeline.io.delimited import RawRows, text_rows
from pipeline.io.formats import other_content_named, shown_names
from pipeline.io.heads import text_header
from pipeline.io.inputs import Log, path_columns
from pipeline.io.parquet import arrow_errors_named, check_no_code, has_page_checksums, unfolded_bytes
from pipeline.io.storage.base import ObjectInfo

READERS = 16  # threads: reading small footers is mostly waiting
BATCH_ROWS = 1 << 16
BATCH_BYTES = 1 << 26
PROBED_ROWS = 256
SHORT_BYTES = 1_000


@dataclass(frozen=True)
class FileColumns:
    """The columns of one file, from its header or footer, and those that stand in its path."""

    types: dict[str, pa.DataType]  # by our column names: of ids as they are read, null for all others
    extra: tuple[str, ...]  # the file's names of columns that nobody reads
    group_rows: tuple[int, ...] = ()  # number of rows by row group, Parquet only
    is_verifiable: bool = True  # false: Parquet without page checksums


@dataclass(frozen=True)
class LogColumns:
    """The columns of a log. Ids are read with one type from all files; a file may lack optional columns."""

    user_type: pa.DataType
    item_type: pa.DataType
    names: tuple[str, ...]  # our names of the columns that some file has
    extra: tuple[str, ...]  # the log's names of columns that nobody reads
    group_rows: tuple[tuple[int, ...], ...]  # number of rows by file and row group
    num_unverifiable: int = 0  # files in which damage may go unnoticed


def check_columns(log: Log) -> LogColumns:
    """Read the header or footer of every file. Raises InputError that names the file and the column when a column is
    missing or doubled, has a type that cannot be read, or holds ids of another type than in the first file."""
    return join_columns(log, read_columns(log, log.files))


def read_columns(log: Log, files: Sequence[ObjectInfo]) -> list[FileColumns]:
    """Read the header or footer of some files of the log.

    Raises InputError that names the file and the column when a column is missing or doubled, or has a type that cannot
    be read.
    """
    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(lambda file: _head(log, file), files))


def join_columns(log: Log, heads: Sequence[FileColumns]) -> LogColumns:
    """The columns of a log, from those of its files.

    Raises InputError that names the file and the column when ids are of another type than in the first file.
    """
    names = tuple(name for name in log.source.columns.named if any(name in head.types for head in heads))
    return LogColumns(
        user_type=_one_type(log, heads, "user_id"),
        item_type=_one_type(log, heads, "item_id"),
        names=names,
        extra=tuple(sorted({name for head in heads for name in head.extra})),
        group_rows=tuple(head.group_rows for head in heads),
        num_unverifiable=sum(not head.is_verifiable for head in heads),
    )


def _one_type(log: Log, heads: Sequence[FileColumns], name: str) -> pa.DataType:
    """The type of the ids in all files; a file without any id has the type of the others."""
    known = [(at, head.types[name]) for at, head in enumerate(heads) if not pa.types.is_null(head.types[name])]
    if not known:
        return TEXT
    first, wanted = known[0]
    for at, found in known:
        if found != wanted:
            raise InputError(
                f"{log.origin(log.files[at])}: column {log.source.columns.named[name]!r} is {found}, but {wanted} in "
                f"{log.files[first].key}; write all files of the log with the same type, or set {name}_type: string in "
                f"{log.source_file} to read all of them as text"
            )
    return wanted


def read_rows(
    log: Log, file: ObjectInfo, row_groups: tuple[int, ...] | None, names: tuple[str, ...]
) -> Iterator[RawRows]:
    """Yield the columns `names` of a file, or of some row groups of it, a bounded number of rows at a time.

    A column that only the file's path has is the same in every row. One that the file lacks is null.
    """
    theirs = sorted({log.source.columns.named[name] for name in names})
    with arrow_errors_named(log.origin(file)), log.open(file) as source:
        if log.source.format == "csv":
            for rows in text_rows(source, log, file, theirs):
                yield replace(rows, table=_as_ours(rows.table, log, file, names))
            return
        with pq.ParquetFile(source, page_checksum_verification=True, pre_buffer=False, buffer_size=1 << 20) as parquet:
            columns = [name for name in theirs if name in parquet.schema_arrow.names]
            rows_at_once = _rows_at_once(parquet, row_groups, columns)
            for batch in parquet.iter_batches(rows_at_once, row_groups=row_groups, columns=columns, use_threads=False):
                yield RawRows(_as_ours(pa.Table.from_batches([without_views(batch)]), log, file, names), (), 0)


def _rows_at_once(parquet: pq.ParquetFile, row_groups: tuple[int, ...] | None, columns: list[str]) -> int:
    """The number of rows that take about BATCH_BYTES in memory: a small file may unfold into long rows."""
    groups = range(parquet.num_row_groups) if row_groups is None else row_groups
    if all(_is_short(parquet.metadata.row_group(group), columns) for group in groups):
        return BATCH_ROWS
    first = next(parquet.iter_batches(PROBED_ROWS, row_groups=groups, columns=columns, use_threads=False))
    most = BATCH_BYTES * PROBED_ROWS // max(unfolded_bytes(first), 1)
    return min(BATCH_ROWS, max(PROBED_ROWS, most))


def _is_short(group: pq.RowGroupMetaData, columns: list[str]) -> bool:
    """Whether the least and the greatest value of each column are short; writers leave out those that are not."""
    for number in range(group.num_columns):
        chunk = group.column(number)
        if chunk.path_in_schema in columns and chunk.physical_type == "BYTE_ARRAY" and group.num_rows:
            known = chunk.statistics
            if known is None or not known.has_min_max or max(len(known.min_raw), len(known.max_raw)) > SHORT_BYTES:
                return False
    return True


def _as_ours(rows: pa.Table, log: Log, file: ObjectInfo, names: tuple[str, ...]) -> pa.Table:
    """Rows under our names; a column may have two of them."""
    in_path = path_columns(file.key)

    def column(theirs: str) -> pa.Array | pa.ChunkedArray:
        if theirs in rows.column_names:
            return rows[theirs]
        return pa.repeat(pa.scalar(in_path.get(theirs), TEXT), rows.num_rows)

    return pa.table({name: column(log.source.columns.named[name]) for name in names})


def num_rows(log: Log, file: ObjectInfo) -> int:
    """The number of rows of a Parquet file; of a text file, whose rows nobody has counted, its bytes."""
    if log.source.format == "csv":
        return file.size
    with arrow_errors_named(log.origin(file)), log.open(file) as source, pq.ParquetFile(source) as parquet:
        rows: int = parquet.metadata.num_rows
    return rows


def _head(log: Log, file: ObjectInfo) -> FileColumns:
    """The columns of one file. Raises InputError as `read_columns`."""
    origin, source = log.origin(file), log.source
    group_rows: tuple[int, ...] = ()
    is_verifiable = True
    if source.format == "csv":
        fields = [(name, TEXT) for name in text_header(log, file)]
    else:
        with (
            arrow_errors_named(origin),
            log.open(file) as opened,
            other_content_named(opened, origin),
            pq.ParquetFile(opened) as parquet,
        ):
            schema, footer = parquet.schema_arrow, parquet.metadata
            group_rows = tuple(footer.row_group(i).num_rows for i in range(footer.num_row_groups))
            is_verifiable = has_page_checksums(opened, footer)
        check_no_code(schema, origin, source.columns.named.values())
        # columns of a file without rows, as pandas writes it, may have any type
        fields = [(field.name, field.type if sum(group_rows) else pa.null()) for field in schema]
    _check_not_doubled(log, origin, [name for name, _ in fields])
    types = dict.fromkeys(path_columns(file.key), TEXT) | dict(fields)
    for name, column in source.columns.named.items():
        if column not in types and name not in source.optional_columns:
            raise InputError(
                f"{origin}: no column {column!r}, which {log.source_file} takes as {name}; the file has "
                f"{shown_names(types)}{_did_you_mean(column, types)}"
            )
    named = {name: column for name, column in source.columns.named.items() if column in types}
    try:
        read_as = {name: TYPE_OF[name](types[column], source, column) for name, column in named.items()}
    except InputError as error:
        raise InputError(f"{origin}: {error}") from None
    extra = tuple(sorted(types.keys() - source.columns.named.values()))
    return FileColumns(read_as, extra, group_rows, is_verifiable)


def _check_not_doubled(log: Log, origin: str, columns: list[str]) -> None:
    """Raise InputError when the file has two columns of a name that is read."""
    read = Counter(column for column in columns if column in log.source.columns.named.values())
    doubled = next((column for column, number in read.items() if number > 1), None)
    if doubled is not None:
        raise InputError(
            f"{origin}: {read[doubled]} columns are called {doubled!r}, so nobody knows which one is meant; "
            "rename or remove the others"
        )


def _user_type(raw: pa.DataType, source: SourceSpec, column: str) -> pa.DataType:
    return id_type(raw, source.user_id_type, column, "user_id_type")


def _item_type(raw: pa.DataType, source: SourceSpec, column: str) -> pa.DataType:
    return id_type(raw, source.item_id_type, column, "item_id_type")


def _time_type(raw: pa.DataType, source: SourceSpec, column: str) -> pa.DataType:
    check_time_type(raw, source, column)
    return pa.null()


def _word_type(raw: pa.DataType, source: SourceSpec, column: str) -> pa.DataType:
    plain = plain_type(raw)
    types = pa.types
    if not (is_text(plain) or types.is_integer(plain) or types.is_boolean(plain) or types.is_null(plain)):
        raise InputError(f"column {column!r} is {plain}; it must be text, an integer or a boolean (cast it in the log)")
    return pa.null()


def _value_type(raw: pa.DataType, source: SourceSpec, column: str) -> pa.DataType:
    plain = plain_type(raw)
    types = pa.types
    is_number = types.is_integer(plain) or types.is_floating(plain) or types.is_decimal(plain)
    if not (is_number or is_text(plain) or types.is_boolean(plain) or types.is_null(plain)):
        raise InputError(f"column {column!r} is {plain}; a value must be a number or text (cast it in the log)")
    return pa.null()


# How a column is read as one of ours, or InputError; null where files of one log may differ.
TYPE_OF: dict[str, Callable[[pa.DataType, SourceSpec, str], pa.DataType]] = {
    "user_id": _user_type,
    "item_id": _item_type,
    "event_ts": _time_type,
    "event_type": _word_type,
    "event_value": _value_type,
    "event_id": _word_type,
}


def _did_you_mean(column: str, known: dict[str, pa.DataType]) -> str:
    hint = nearest(column, known)
    return hint if "did you mean" in hint else ""
