"""Small text logs in files, for the tests of reading them."""

from pathlib import Path

from pipeline.data.sources import SourceSpec
from pipeline.io.delimited import RawRows
from pipeline.io.inputs import Log
from pipeline.io.rows import check_columns, read_rows
from pipeline.io.storage import open_storage

NAMES = ("user_id", "item_id", "event_ts")


def log_of(folder: Path, data: str | bytes, name: str = "log.csv", **form: object) -> Log:
    """A log of one file; `form` are settings of `csv`."""
    lake = folder / "lake"
    lake.mkdir(exist_ok=True)
    (lake / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    source = SourceSpec.model_validate({"format": "csv", "time_unit": "s", "csv": form})
    storage = open_storage(str(lake))
    (file,) = (file for file in storage.list() if file.key == name)
    return Log(storage.uri, (file,), source=source, source_file="mine.yaml")


def read(folder: Path, data: str | bytes, name: str = "log.csv", **form: object) -> list[RawRows]:
    """Check the head of a file and read its rows."""
    log = log_of(folder, data, name, **form)
    check_columns(log)
    return list(read_rows(log, log.files[0], None, NAMES))


def cells(parts: list[RawRows]) -> list[tuple[str, ...]]:
    """The rows as text: user, item, time."""
    rows = (row for part in parts for row in part.table.select(NAMES).to_pylist())
    return [tuple(value.decode() for value in row.values()) for row in rows]


def num_malformed(parts: list[RawRows]) -> int:
    """The number of malformed lines."""
    return sum(part.num_malformed for part in parts)
