"""The head of a text file: where its rows begin and what its columns are called, checked against its first rows."""

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipeline.data.sources import CsvFormat
from pipeline.errors import InputError
from pipeline.io.decoding import UNREADABLE, Converted, delimiter_of, open_text
from pipeline.io.formats import shown, shown_names
from pipeline.io.inputs import Log
from pipeline.io.parquet import arrow_errors_named
from pipeline.io.storage.base import ObjectInfo

HEAD_SIZES = (1 << 16, 1 << 20, 1 << 24)  # bytes that are looked at, one after the other, until the header ends
FIRST_ROWS = 20
BYTE_ORDER_MARK = "\ufeff".encode()
NUMBER_OR_DATE = re.compile(r"\s*(-?\d+(\.\d+)?|\d{4}-\d\d-\d\d.*|\d\d?[/.]\d\d?[/.]\d{4}.*)\s*")


@dataclass(frozen=True)
class Record:
    """A header or a row."""

    cells: tuple[str, ...]
    first_line: int  # lines of the file are numbered from 0
    end: int  # bytes up to the end of its last line


@dataclass(frozen=True)
class Head:
    """The columns of a text file, and its first rows."""

    names: tuple[str, ...]  # as many as a row has values
    size: int  # bytes before the first row
    rows: tuple[Record, ...]


def text_header(log: Log, file: ObjectInfo) -> list[str]:
    """Read the column names of a text file.

    Raises InputError that names the file and the setting when the first lines show that the source is wrong about them.
    """
    origin = log.origin(file)
    with arrow_errors_named(origin), log.open(file) as source:
        head = _described_head(open_text(source, log.source.csv, origin).stream, log, origin)
    named = log.source.columns.named
    required = [column for name, column in named.items() if name not in log.source.optional_columns]
    missing = next((column for column in required if column not in head.names), None)
    if missing is not None:
        _explain_missing(head, log, f"{origin}: no column {missing!r}", set(required))
    head = _fitted(head, log, origin)
    if named["event_ts"] in head.names and head.rows:
        _check_first_row(head, log, origin)
    return list(head.names)


def read_head(stream: Converted, log: Log, origin: str) -> Head:
    """Read the head from the beginning of a text. Raises InputError when there is none, or none that fits the rows."""
    return _fitted(_described_head(stream, log, origin), log, origin)


def way_out_of_malformed(line: str, csv_format: CsvFormat) -> str:
    """The settings that may make rows of a malformed line."""
    if '\\"' in line and not csv_format.escape:
        return "if a backslash stands before a quote that belongs to the value, set csv: {escape: '\\'}"
    if csv_format.quote and (csv_format.quote in line or "\n" in line):
        return (
            "a value that begins with a quote goes on to the next quote, over ends of lines; if quotes are part of the "
            "text, set csv: {quote: ''}"
        )
    return "is csv.delimiter right?"


def _described_head(stream: Converted, log: Log, origin: str) -> Head:
    """The head as the source describes it, with the names that stand there."""
    records, start = _first_records(stream, log.source.csv, origin)
    if log.source.csv.column_names:
        return Head(log.source.csv.column_names, start, tuple(records))
    if not records:
        raise InputError(f"{origin}: there is no text in it, not even a header; write it again or remove it")
    return Head(records[0].cells, records[0].end, tuple(records[1:]))


def _first_records(stream: Converted, csv_format: CsvFormat, origin: str) -> tuple[list[Record], int]:
    """The first records of a text, and the number of bytes before them."""
    data = b""
    for size in HEAD_SIZES:
        data += stream.read(size - len(data))
        is_whole = stream.is_empty()
        mark = len(BYTE_ORDER_MARK) if data.startswith(BYTE_ORDER_MARK) else 0
        # a byte is a character in latin-1, so positions are the file's
        lines = list(io.StringIO(data[mark:].decode("latin-1"), newline=""))
        first = _first_line(lines, csv_format)
        records = _split(lines, first, csv_format, mark, origin)
        if not is_whole and records and records[-1].end == len(data):
            records.pop()  # perhaps cut
        if records or is_whole:
            return records, mark + sum(map(len, lines[:first]))
    raise InputError(
        f"{origin}: the first line does not end within {HEAD_SIZES[-1] >> 20} MiB; "
        + way_out_of_malformed("".join(lines[first:])[: HEAD_SIZES[0]], csv_format)
    )


def _first_line(lines: Sequence[str], csv_format: CsvFormat) -> int:
    """The number of the first line that is a header or a row."""
    comment = csv_format.comment.encode().decode("latin-1")
    first = min(csv_format.skip_rows, len(lines))
    while first < len(lines):
        line = lines[first]
        if line.strip("\r\n") and not (comment and line.startswith(comment)):
            break
        first += 1
    return first


def _split(lines: Sequence[str], first: int, csv_format: CsvFormat, mark: int, origin: str) -> list[Record]:
    """The records that begin at line `first`; positions count `mark` bytes more than the lines have."""
    reader = csv.reader(
        lines[first:],
        delimiter=delimiter_of(csv_format),
        quotechar=csv_format.quote or None,
        quoting=csv.QUOTE_MINIMAL if csv_format.quote else csv.QUOTE_NONE,
        escapechar=csv_format.escape or None,
    )
    records: list[Record] = []
    start, end = first, mark + sum(map(len, lines[:first]))
    try:
        for cells in reader:
            stop = first + reader.line_num
            end += sum(map(len, lines[start:stop]))
            if cells:
                records.append(Record(tuple(map(_decoded, cells)), start, end))
            if len(records) > FIRST_ROWS:
                break
            start = stop
    except csv.Error as error:  # a value of more than 128 KiB
        if not records:
            way_out = way_out_of_malformed(lines[first], csv_format)
            raise InputError(f"{origin}: the first line cannot be cut into columns ({error}); {way_out}") from None
    return records


def _decoded(cell: str) -> str:
    return cell.encode("latin-1").decode("utf-8", "replace").replace(UNREADABLE, "\ufffd")


def _fitted(head: Head, log: Log, origin: str) -> Head:
    """The head with a name more or less where the rows or the header end in a delimiter. Raises InputError when no row
    has as many values as there are names."""
    names, rows = head.names, head.rows
    widths = {len(row.cells) for row in rows}
    if not rows or len(names) in widths:
        return head
    if all(len(row.cells) == len(names) + 1 and not row.cells[-1] for row in rows):
        return replace(head, names=(*names, ""))
    if not names[-1] and widths == {len(names) - 1}:
        return replace(head, names=names[:-1])
    cells = rows[0].cells
    line = log.source.csv.delimiter.join(cells)
    if log.source.csv.column_names:
        counts = (
            f"the first line has {len(cells)} columns, but {log.source_file} names {len(names)} ({shown_names(names)})"
        )
    else:
        counts = f"the header has {len(names)} columns, but the first row has {len(cells)}"
    way_out = way_out_of_malformed(line, log.source.csv)
    raise InputError(f"{origin}: {counts}: {shown(line)}; {way_out} ({log.source_file})")


def _explain_missing(head: Head, log: Log, where: str, required: set[str]) -> None:
    """Raise InputError, which begins with `where`, when the first lines show why a column is missing."""
    csv_format = log.source.csv
    if csv_format.column_names:
        return
    header = next((row for row in head.rows if required <= set(row.cells)), None)
    if header is not None:
        raise InputError(
            f"{where} in the first line, but line {header.first_line + 1} looks like the header: "
            f"set csv: {{skip_rows: {header.first_line}}} in {log.source_file}"
        )
    line = csv_format.delimiter.join(head.names)
    for delimiter in ",;\t|":
        if required <= {cell.strip(" \"'") for cell in line.split(delimiter)} and delimiter != csv_format.delimiter:
            raise InputError(f"{where}; set csv: {{delimiter: {delimiter!r}}} in {log.source_file}: {shown(line)}")
    _check_quotes(head.names, "the first line", log, where)
    if not required & set(head.names) and any(NUMBER_OR_DATE.fullmatch(name) for name in head.names):
        raise InputError(
            f"{where}: the first line looks like a row, not like a header; give the names of the columns in order as "
            f"csv.column_names in {log.source_file}: {shown(line)}"
        )


def _check_first_row(head: Head, log: Log, origin: str) -> None:
    """Raise InputError when the first row has other quotes, or is a header although the source names the columns."""
    cells = head.rows[0].cells
    if len(cells) != len(head.names):
        return
    _check_quotes(cells, "the first row", log, origin)
    time = cells[head.names.index(log.source.columns.event_ts)].strip()
    names = {name.casefold() for name in head.names}
    is_like_names = any(cell.casefold() in names for cell in cells) or not re.search(r"\d", "".join(cells))
    if log.source.csv.column_names and time and not re.search(r"\d", time) and is_like_names:
        raise InputError(
            f"{origin}: the first line looks like a header, with {shown(time)} as the time, but {log.source_file} has "
            f"csv.column_names, for files without one; remove them, or set csv: {{skip_rows: 1}}"
        )


def _check_quotes(cells: Sequence[str], place: str, log: Log, origin: str) -> None:
    """Raise InputError when every value is in quotes that the source does not name."""
    texts = [cell for cell in cells if cell]
    for quote in "'\"":
        if texts and all(len(text) > 1 and text[0] == text[-1] == quote for text in texts):
            way_out = f"set csv: {{quote: {quote!r}}} in {log.source_file}"
            if delimiter_of(log.source.csv) != log.source.csv.delimiter:
                way_out = "with such a delimiter they cannot be read; write the file without them"
            raise InputError(f"{origin}: the values of {place} are in quotes ({shown(texts[0])}); {way_out}")
