"""A source file for a log that nobody has described yet: looked at, guessed, and tried on its first rows."""

import csv
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from pipeline.data.cleaning import clean_rows
from pipeline.data.columns import TEXT, without_views
from pipeline.data.source_guess import SURE, ColumnGuess, TimeGuess, guess_columns, guess_time, guess_types
from pipeline.data.sources import CsvFormat, SourceSpec
from pipeline.errors import InputError
from pipeline.io.decoding import open_text
from pipeline.io.formats import HEAD_BYTES, content_of
from pipeline.io.heads import NUMBER_OR_DATE
from pipeline.io.inputs import PARQUET_SUFFIXES, Log, list_files
from pipeline.io.parquet import arrow_errors_named
from pipeline.io.rows import check_columns, read_rows
from pipeline.io.storage.base import ObjectInfo

SAMPLED_ROWS = 1_000
SAMPLED_BYTES = 1 << 18
SHOWN_ROWS = 10
DELIMITERS = ("::", "\t", ",", ";", "|", " ")
ENCODINGS = ("utf-8", "latin-1")
MADE_UP = "column_{}"


@dataclass(frozen=True)
class Sample:
    """The first rows of a file, as they are written there, and how they were cut into columns."""

    rows: pa.Table
    csv: dict[str, Any] | None  # keys of `csv` that are not the defaults; None: Parquet
    has_names: bool


@dataclass(frozen=True)
class Draft:
    """A source file, and the first rows as it reads them."""

    text: str
    rows: list[dict[str, Any]]
    unsure: list[str]  # what to look at, in words


def draft_source(uri: str) -> Draft:
    """Look at the first file below `uri` and write a source file for it.

    Raises InputError when there is no file, when it is neither Parquet nor delimited text, or when its columns are not
    those of events.
    """
    listed = list_files(uri, "--from")
    file = listed.files[0]
    log = Log(listed.uri, (file,), listed.is_immutable)
    sample = _sample(log, file)
    if not len(sample.rows):
        raise InputError(f"{log.origin(file)}: there is no row in it")
    try:
        columns = guess_columns(sample.rows, sample.has_names)
        times = guess_time(sample.rows[next(each.theirs for each in columns if each.ours == "event_ts")])
    except InputError as error:
        raise InputError(f"{log.origin(file)}: {error}") from None
    text = _source_text(file, sample, columns, times)
    spec = SourceSpec.model_validate(yaml.safe_load(text))
    rows, reasons = _first_rows(Log(log.uri, log.files, log.is_immutable, spec, "the new source file"), file)
    unsure = [f"{each.ours} is {each.theirs!r}: {each.why}" for each in columns if each.sureness != SURE]
    unsure += [f"{times.key} is {times.value!r}: {times.why}"] if times.sureness != SURE else []
    unsure += [f"{number} of the first rows are set aside: {reason}" for reason, number in reasons.items()]
    return Draft(text, rows, unsure)


def _sample(log: Log, file: ObjectInfo) -> Sample:
    origin = log.origin(file)
    with arrow_errors_named(origin), log.open(file) as source:
        head = source.read(HEAD_BYTES)
        source.seek(0)
        if content_of(head) == "Parquet" or Path(file.key).suffix in PARQUET_SUFFIXES:
            with pq.ParquetFile(source, page_checksum_verification=True) as parquet:
                batch = next(parquet.iter_batches(SAMPLED_ROWS, use_threads=False), None)
            if batch is None:
                return Sample(pa.table({}), None, has_names=True)
            return Sample(pa.Table.from_batches([without_views(batch)]), None, has_names=True)
    for encoding in ENCODINGS:
        with arrow_errors_named(origin), log.open(file) as source:
            stream = open_text(source, CsvFormat(encoding=encoding), origin).stream
            data = stream.read(SAMPLED_BYTES)
            is_whole = stream.is_empty()
        text = data.decode("utf-8", "replace")
        if "\ufffd" not in text and "\uefff" not in text:
            return _text_sample(text, is_whole, encoding, origin)
    raise InputError(f"{origin}: neither Parquet nor text in {' or '.join(ENCODINGS)}")


def _text_sample(text: str, is_whole: bool, encoding: str, origin: str) -> Sample:
    lines = text.lstrip("\ufeff").splitlines()
    lines = [line for line in (lines if is_whole else lines[:-1]) if line.strip()][: SAMPLED_ROWS + 1]
    delimiter = _delimiter(lines)
    if delimiter is None:
        raise InputError(
            f"{origin}: no delimiter of {' '.join(map(repr, DELIMITERS))} cuts its lines into three columns or more; "
            "copy a file of conf/sources/ and describe the log by hand"
        )
    cells = _cut(lines, delimiter)
    has_names = not any(NUMBER_OR_DATE.fullmatch(cell) for cell in cells[0])
    names = cells[0] if has_names else [MADE_UP.format(number + 1) for number in range(len(cells[0]))]
    body = [row for row in (cells[1:] if has_names else cells) if len(row) == len(names)]
    keys: dict[str, Any] = {}
    if delimiter != ",":
        keys["delimiter"] = delimiter
    if len(delimiter) > 1:
        keys["quote"] = ""
    if encoding != "utf-8":
        keys["encoding"] = encoding
    if not has_names:
        keys["column_names"] = names
    columns = {name: pa.array([row[place] for row in body], TEXT) for place, name in enumerate(names)}
    return Sample(pa.table(columns), keys, has_names)


def _delimiter(lines: list[str]) -> str | None:
    """The delimiter that cuts nearly all lines into the same number of columns, at least three: the one with most."""
    best: tuple[int, str] | None = None
    for delimiter in DELIMITERS:
        widths = Counter(len(row) for row in _cut(lines, delimiter))
        ((width, number),) = widths.most_common(1) or [(0, 0)]
        if width >= 3 and number >= 0.95 * len(lines) and (best is None or width > best[0]):
            best = (width, delimiter)
    return None if best is None else best[1]


def _cut(lines: list[str], delimiter: str) -> list[list[str]]:
    if len(delimiter) > 1:
        return [line.split(delimiter) for line in lines]
    try:
        return list(csv.reader(lines, delimiter=delimiter))
    except csv.Error:  # a value that is longer than any id
        return []


def _source_text(file: ObjectInfo, sample: Sample, columns: list[ColumnGuess], times: TimeGuess) -> str:
    """The source file, each guess with its reason."""
    suffix = "".join(Path(file.key).suffixes)
    lines = [
        f"# Guessed from the first rows of {Path(file.key).name}. Look at each line before you trust it.",
        f"format: {'parquet' if sample.csv is None else 'csv'}",
        f"files: {_quoted(f'*{suffix}' if suffix else '*')}",
    ]
    if sample.csv:
        lines += ["csv:", *(f"  {key}: {_quoted(value)}" for key, value in sample.csv.items())]
    lines.append("columns:")
    lines += [f"  {each.ours}: {_quoted(each.theirs)} # {each.sureness}: {each.why}" for each in columns]
    lines.append(f"{times.key}: {_quoted(times.value)} # {times.sureness}: {times.why}")
    by_name = {each.ours: each.theirs for each in columns}
    types = guess_types(sample.rows[by_name["event_type"]]) if "event_type" in by_name else None
    if types:
        lines.append("event_weights: # guessed from the words: how much an event counts; 0 is read but never predicted")
        lines += [f"  {_quoted(name)}: {weight}" for name, weight in types.items()]
        lines.append("unknown_event_types: error # a type that the first rows do not have ends the night")
    else:
        lines.append(f"event_type: {'rating' if 'event_value' in by_name else 'event'} # of all events")
    if "event_value" in by_name:
        lines.append("value_is_weight: false # true: an event counts as much as its value")
    return "\n".join(lines) + "\n"


def _quoted(value: Any) -> str:
    written: str = yaml.safe_dump(value, default_flow_style=True, width=1_000, allow_unicode=True)
    return written.removesuffix("\n").removesuffix("\n...")


def _first_rows(log: Log, file: ObjectInfo) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The first rows as the night would read them, and the number of rows of the sample set aside by reason."""
    columns = check_columns(log)
    raw = next(iter(read_rows(log, file, None, columns.names)), None)
    if raw is None:
        return [], {}
    table = raw.table.slice(0, SAMPLED_ROWS)
    table = table.append_column("file", pa.array([0] * len(table), pa.int32()))
    table = table.append_column("row", pa.array(range(len(table)), pa.int64()))
    cleaned = clean_rows(table, log.source, (columns.user_type, columns.item_type))
    shown = cleaned.events.slice(0, SHOWN_ROWS).select(["user_id", "item_id", "event_ts", "weight", "event_type"])
    times = shown["event_ts"].cast(pa.timestamp("us", tz="UTC"))
    rows = shown.set_column(2, "event_ts", times).to_pylist()
    reasons = {reason: number for reason, number in cleaned.counts.items() if reason != "kept" and number}
    return rows, reasons
