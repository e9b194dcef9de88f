"""Delimited text as rows: a bounded number at a time, with any delimiter, and lines that are no rows counted."""

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.csv as pacsv

from pipeline.errors import InputError
from pipeline.io.inputs import Log
from pipeline.io.parquet import arrow_errors_named
from pipeline.io.storage.base import ObjectInfo

TEXT_BLOCK_BYTES = 4 << 20
STAND_IN = b"\x1f"  # ASCII unit separator: takes the place of a delimiter of several characters
SHOWN = 200  # characters of a malformed line that are kept
MAX_MALFORMED = 1_000  # malformed lines kept per block; all are counted


@dataclass(frozen=True)
class RawRows:
    """Some consecutive rows of a file under our column names, and lines between them that are no rows."""

    table: pa.Table
    malformed: tuple[str, ...]
    num_malformed: int


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


def text_rows(source: pa.NativeFile, log: Log, file: ObjectInfo, theirs: dict[str, str]) -> Iterator[RawRows]:
    """The rows of an open text file, `theirs` columns under our names (values of the mapping), block by block."""
    names = text_header(log, file)
    form = log.source.csv
    malformed = _Malformed()
    several = len(form.delimiter) > 1
    stream: Any = _decompressed(source, file.key)
    if several:
        stream = pa.PythonFile(Replaced(stream, form.delimiter.encode(), STAND_IN), mode="r")
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
            nothing = pa.table({ours: pa.array([], pa.binary()) for ours in theirs.values()})
            yield RawRows(nothing, lines, number)


def text_header(log: Log, file: ObjectInfo) -> list[str]:
    """The column names of a text file. Raises InputError when it has not as many as its source names."""
    form = log.source.csv
    with arrow_errors_named(log.origin(file)), log.open(file) as source:
        head = _decompressed(source, file.key).read(1 << 16)
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
            f"{log.origin(file)}: the first line has {len(cells)} columns, but {log.source_file} names "
            f"{len(form.column_names)} ({', '.join(form.column_names)}): {line[:SHOWN]!r}"
        )
    return list(form.column_names)


def _decompressed(source: pa.NativeFile, key: str) -> pa.NativeFile:
    return pa.CompressedInputStream(source, "gzip") if key.endswith(".gz") else source


class Replaced(io.RawIOBase):
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
