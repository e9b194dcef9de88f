"""Read delimited text, with any delimiter, a bounded number of rows at a time; malformed lines are counted."""

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.csv as pacsv

from pipeline.data.sources import CsvFormat
from pipeline.errors import InputError
from pipeline.io.inputs import Log
from pipeline.io.parquet import arrow_errors_named
from pipeline.io.storage.base import ObjectInfo

TEXT_BLOCK_BYTES = 4 << 20
STAND_IN = b"\x1f"  # ASCII unit separator, in place of a delimiter of several characters, which Arrow cannot read
SHOWN = 200  # characters of a malformed line that are kept
MAX_MALFORMED = 1_000  # malformed lines kept per block; all are counted


@dataclass(frozen=True)
class RawRows:
    """Consecutive rows of a file, under our column names, and the malformed lines among them."""

    table: pa.Table
    malformed: tuple[str, ...]  # the first of them
    num_malformed: int  # all


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


def text_rows(source: pa.NativeFile, log: Log, file: ObjectInfo, columns: list[str]) -> Iterator[RawRows]:
    """Yield the rows of some columns of an open text file, block by block."""
    malformed = _Malformed()
    header = text_header(log, file)
    with _open_reader(_decompressed(source, file.key), log.source.csv, header, columns, malformed) as reader:
        for batch in reader:
            table = pa.Table.from_batches([batch])
            lines, number = malformed.take()
            yield RawRows(table, lines, number)
        lines, number = malformed.take()
        if number:
            no_rows = pa.table({name: pa.array([], pa.binary()) for name in columns})
            yield RawRows(no_rows, lines, number)


def _open_reader(
    source: pa.NativeFile, csv_format: CsvFormat, header: list[str], columns: list[str], malformed: _Malformed
) -> pacsv.CSVStreamingReader:
    """Open a reader of some columns, as bytes; it hands each line with another number of columns to `malformed`."""
    needs_stand_in = len(csv_format.delimiter) > 1
    stream: Any = source
    if needs_stand_in:
        stream = pa.PythonFile(Replaced(source, csv_format.delimiter.encode(), STAND_IN), mode="r")
    return pacsv.open_csv(
        stream,
        read_options=pacsv.ReadOptions(
            use_threads=False,
            block_size=TEXT_BLOCK_BYTES,
            column_names=header,
            skip_rows=0 if csv_format.column_names else 1,
        ),
        parse_options=pacsv.ParseOptions(
            delimiter=STAND_IN.decode() if needs_stand_in else csv_format.delimiter,
            quote_char=csv_format.quote or False,
            invalid_row_handler=malformed,
        ),
        convert_options=pacsv.ConvertOptions(
            include_columns=columns, column_types=dict.fromkeys(columns, pa.binary()), strings_can_be_null=False
        ),
    )


def text_header(log: Log, file: ObjectInfo) -> list[str]:
    """Read the column names of a text file. Raises InputError when the source names more or fewer columns."""
    csv_format = log.source.csv
    with arrow_errors_named(log.origin(file)), log.open(file) as source:
        head = _decompressed(source, file.key).read(1 << 16)
    line = head.split(b"\n", 1)[0].removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace").rstrip("\r")
    cells: list[str]
    if len(csv_format.delimiter) > 1 or not csv_format.quote:
        cells = line.split(csv_format.delimiter)
    else:
        cells = next(csv.reader(io.StringIO(line), delimiter=csv_format.delimiter, quotechar=csv_format.quote), [])
    if not csv_format.column_names:
        return cells
    if len(cells) != len(csv_format.column_names):
        raise InputError(
            f"{log.origin(file)}: the first line has {len(cells)} columns, but {log.source_file} names "
            f"{len(csv_format.column_names)} ({', '.join(csv_format.column_names)}): {line[:SHOWN]!r}"
        )
    return list(csv_format.column_names)


def _decompressed(source: pa.NativeFile, key: str) -> pa.NativeFile:
    return pa.CompressedInputStream(source, "gzip") if key.endswith(".gz") else source


class Replaced(io.RawIOBase):
    """A stream of bytes with one sequence replaced by another, also where a read cuts the sequence in two."""

    def __init__(self, source: pa.NativeFile, old: bytes, new: bytes) -> None:
        self.source, self.old, self.new = source, old, new
        self.held = b""  # the last bytes read, which may be the beginning of `old`
        self.ready = b""  # bytes to hand out next

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        most = TEXT_BLOCK_BYTES if size is None or size < 0 else size
        while not self.ready:
            chunk = self.source.read(most)
            text = self.held + chunk
            pieces = text.split(self.old)
            num_held = 0
            if chunk:
                num_held = next((n for n in range(len(self.old) - 1, 0, -1) if pieces[-1].endswith(self.old[:n])), 0)
            self.held = pieces[-1][len(pieces[-1]) - num_held :]
            pieces[-1] = pieces[-1][: len(pieces[-1]) - num_held]
            self.ready = self.new.join(pieces)
            if not chunk:
                break
        data, self.ready = self.ready[:most], self.ready[most:]
        return data
