"""Read delimited text a bounded number of rows at a time; each line that is no row is counted as malformed."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from pipeline.data.sources import CsvFormat
from pipeline.errors import InputError
from pipeline.io.decoding import UNREADABLE, arrow_stream, delimiter_of, open_text
from pipeline.io.formats import SHOWN, shown
from pipeline.io.heads import read_head
from pipeline.io.inputs import Log
from pipeline.io.storage.base import ObjectInfo
from pipeline.io.swallowed import END_OF_LINE, rows_with_hidden_rows

TEXT_BLOCK_BYTES = 4 << 20
CHECKED_BYTES = 1 << 20


@dataclass(frozen=True)
class RawRows:
    """Consecutive rows of a file, and the malformed lines among them."""

    table: pa.Table
    malformed: tuple[str, ...]  # their first characters; lines that one quote joined are one text
    num_malformed: int  # all lines
    malformed_bytes: int = 0  # their size, as UTF-8


@dataclass
class _Malformed:
    """Collects the lines that do not have the columns of their file."""

    lines: list[str] = field(default_factory=list)
    number: int = 0
    num_bytes: int = 0

    def __call__(self, row: Any) -> str:
        self.add(str(row.text))
        return "skip"

    def add(self, text: str) -> None:
        """Count the lines of a record that is no row."""
        self.number += sum(1 for line in re.split(END_OF_LINE, text) if line)
        self.num_bytes += len(text.encode("utf-8", "replace"))
        self.lines.append(text[:SHOWN].replace(UNREADABLE, "\ufffd"))

    def take(self, table: pa.Table) -> RawRows:
        """The rows with what was collected since the last call."""
        rows = RawRows(table, tuple(self.lines), self.number, self.num_bytes)
        self.lines, self.number, self.num_bytes = [], 0, 0
        return rows


def text_rows(source: pa.NativeFile, log: Log, file: ObjectInfo, columns: Sequence[str]) -> Iterator[RawRows]:
    """Yield those of `columns` that an open text file has, as bytes, block by block, under the file's names.

    Each line of the file that is neither blank nor a part of a quoted value counts as a row or as malformed. Raises
    InputError for a row that is longer than a block, as a quote that never closes makes one.
    """
    csv_format, origin = log.source.csv, log.origin(file)
    text = open_text(source, csv_format, origin)
    head = read_head(text.stream, log, origin)
    text.stream.read(CHECKED_BYTES)  # tells whether the text is UTF-8
    with arrow_stream(source, csv_format, origin, text) as stream:
        stream.read(head.size)
        for rows in _rows_of(stream, head.names, log, origin, columns):
            yield rows if text.is_as_arrow_reads_it else replace(rows, table=_unreadable(rows.table))


def _rows_of(
    stream: pa.NativeFile, names: tuple[str, ...], log: Log, origin: str, columns: Sequence[str]
) -> Iterator[RawRows]:
    csv_format = log.source.csv
    columns = [column for column in columns if column in names]
    wanted = [names.index(column) for column in columns]
    time = names.index(log.source.columns.event_ts) if log.source.columns.event_ts in names else wanted[0]
    malformed = _Malformed()
    num_read = 0
    try:
        with _open_reader(stream, csv_format, len(names), wanted, malformed) as reader:
            for batch in reader:
                table = pa.Table.from_batches([batch])
                if csv_format.quote or csv_format.escape:
                    table = _without_hidden_rows(table, time, csv_format, malformed)
                table = table.select([str(number) for number in wanted]).rename_columns(list(columns))
                rows = malformed.take(table)
                num_read += table.num_rows + rows.num_malformed
                yield rows
        if malformed.number:
            yield malformed.take(pa.table({name: pa.array([], pa.binary()) for name in columns}))
    except pa.ArrowInvalid as error:
        if str(error) == "Empty CSV file":
            return
        reason = _told(str(error), log)
        if not reason:
            raise
        raise InputError(f"{origin}: after row {num_read + malformed.number:,} {reason}") from None


def _open_reader(
    stream: pa.NativeFile, csv_format: CsvFormat, num_columns: int, wanted: Sequence[int], malformed: _Malformed
) -> pacsv.CSVStreamingReader:
    """Open a reader of columns, as bytes, that are named by their number; it hands each line with another number of
    columns to `malformed`. Where a value may hold rows, all columns are read."""
    joins_lines = bool(csv_format.quote or csv_format.escape)
    names = [str(number) for number in range(num_columns)]
    included = names if joins_lines else [str(number) for number in sorted(set(wanted))]
    return pacsv.open_csv(
        stream,
        read_options=pacsv.ReadOptions(use_threads=False, block_size=TEXT_BLOCK_BYTES, column_names=names),
        parse_options=pacsv.ParseOptions(
            delimiter=delimiter_of(csv_format),
            quote_char=csv_format.quote or False,
            escape_char=csv_format.escape or False,
            newlines_in_values=joins_lines,
            invalid_row_handler=malformed,
        ),
        convert_options=pacsv.ConvertOptions(
            include_columns=included, column_types=dict.fromkeys(included, pa.binary()), strings_can_be_null=False
        ),
    )


def _without_hidden_rows(table: pa.Table, time: int, csv_format: CsvFormat, malformed: _Malformed) -> pa.Table:
    hides = rows_with_hidden_rows(table, time, csv_format.delimiter)
    if not hides.any():
        return table
    for row in table.filter(pa.array(hides)).to_pylist():
        malformed.add(csv_format.delimiter.join(value.decode("utf-8", "replace") for value in row.values()))
    return table.filter(pa.array(~hides))


def _unreadable(table: pa.Table) -> pa.Table:
    """Make bytes that are no UTF-8 again of those that were not in the file's encoding: such an id is no id."""
    columns = [pc.replace_substring(column, UNREADABLE.encode(), b"\xff") for column in table.columns]
    return pa.table(columns, names=table.column_names)


def _told(error: str, log: Log) -> str:
    """What Arrow's error means for the file."""
    size = f"{TEXT_BLOCK_BYTES / (1 << 20):.1g} MiB"
    if "straddling" in error and log.source.csv.quote:
        return (
            f"a value in quotes, or a row, is longer than {size}; if a quote there is part of the text, "
            f"set csv: {{quote: ''}} in {log.source_file}"
        )
    if "straddling" in error:
        return f"a row is longer than {size}, the most that is read; shorten or remove it"
    if "CSV parse error: Row" in error:  # Arrow hands on no line that is not UTF-8
        return (
            f"there is a line without the columns of the file that is not UTF-8; set csv: {{encoding: latin-1}}, or "
            f"what the file is written in, in {log.source_file}: {shown(error.partition(': ')[2])}"
        )
    return ""
