"""Tonight's input files: listed once into a frozen value, and opened in one way.

A file that was replaced, grew or was removed after it was listed ends the run with its name; a retry lists again.
"""

import fnmatch
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pyarrow as pa

from pipeline.config import load_config, nearest
from pipeline.data.columns import DistinctIds
from pipeline.data.ids import ids_of_table
from pipeline.data.simulation.log import simulated_prefix
from pipeline.data.sources import IdType, SourceSpec
from pipeline.errors import InfrastructureError, InputError
from pipeline.io.artifacts import read_manifest
from pipeline.io.earlier import Earlier
from pipeline.io.formats import TABLE_FORMATS
from pipeline.io.parquet import read_bounded
from pipeline.io.storage import open_storage
from pipeline.io.storage.base import ObjectInfo, ObjectNotFoundError
from pipeline.settings import SIMULATED, Settings

log = logging.getLogger("nightrails")

MAX_USERS_BYTES = 8_000_000_000  # of the ids in one file of queries, in memory
DAY_PARTITION = re.compile(r"(?:^|/)ds=([^/]*)/")
SOURCES = Path("conf/sources")
PATH_COLUMN = re.compile(r"(?:^|(?<=/))([^/=]+)=([^/]*)/")
HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
PARQUET_SUFFIXES = {".parquet", ".pq", ".parq"}


@dataclass(frozen=True)
class Files:
    """Some files of one store, in order of key, as they were listed."""

    uri: str  # of the store; keys are relative to it
    files: tuple[ObjectInfo, ...]
    is_immutable: bool = False  # written by us and never overwritten: only the size is checked

    def origin(self, file: ObjectInfo) -> str:
        """The URI of a file, for error messages."""
        return f"{self.uri}/{file.key}"

    @property
    def name(self) -> str:
        """The URI of the only file, or of the folder of several, for error messages."""
        return self.origin(self.files[0]) if len(self.files) == 1 else self.uri

    def identity(self) -> list[list[str | int]]:
        """Key, size and etag of each file, for a fingerprint: the same files below another URI are the same input."""
        return [[file.key, file.size, file.etag] for file in self.files]

    @contextmanager
    def open(self, file: ObjectInfo) -> Iterator[pa.NativeFile]:
        """Open the file for reading. Raises InfrastructureError when it changes between its listing and the end."""
        storage = open_storage(self.uri)
        self._check_unchanged(storage.head(file.key), file)
        try:
            source = storage.open(file.key)
        except ObjectNotFoundError:
            raise self._changed(file, "removed") from None
        with source:
            try:
                yield source
            except Exception:  # half of the old file and half of a new one look like damage
                self._check_unchanged(storage.head(file.key), file)
                raise
        self._check_unchanged(storage.head(file.key), file)

    def _check_unchanged(self, current: ObjectInfo | None, listed: ObjectInfo) -> None:
        if current is None:
            raise self._changed(listed, "removed")
        if current.size != listed.size or (current.etag != listed.etag and not self.is_immutable):
            raise self._changed(listed, "changed")

    def _changed(self, file: ObjectInfo, how: str) -> InfrastructureError:
        return InfrastructureError(
            f"{self.origin(file)}: {how} since tonight's inputs were listed, so it is not used; "
            "run again when the input is complete: each run lists its inputs anew"
        )


@dataclass(frozen=True)
class Log(Files):
    """The files of the interaction log, and how they are read."""

    source: SourceSpec = field(default_factory=SourceSpec)
    source_file: str = ""
    is_partitioned: bool = False  # its files are in ds= partitions

    def until(self, ds: date, lookback_days: int | None) -> "Log":
        """Keep the partitions of the last `lookback_days` that end with `ds`; None: of all days until `ds`.

        A log without partitions stays whole. Raises InputError when there is no partition `ds`.
        """
        if not self.is_partitioned:
            return self
        days = [day for file in self.files if (day := day_of(file.key)) is not None]
        if ds not in days:
            raise InputError(
                f"log.uri {self.uri}: no partition ds={ds.isoformat()}; the newest is ds={max(days).isoformat()}"
            )
        longest = (ds - date.min).days
        oldest = ds - timedelta(days=longest if lookback_days is None else min(lookback_days - 1, longest))
        files = tuple(file for file, day in zip(self.files, days, strict=True) if oldest <= day <= ds)
        return replace(self, files=files)


@dataclass(frozen=True)
class Inputs:
    """All that the night of `ds` reads. Without `items` the catalogue is the items of the log; without `queries` every
    user with a history is served; without `earlier` the models are trained from scratch."""

    ds: date
    log: Log
    items: Files | None = None
    queries: Files | None = None
    earlier: Earlier | None = None
    blocks: tuple[tuple[str, Files], ...] = ()  # the tables of blocked items, by the name of their rule

    def identity(self) -> dict[str, Any]:
        """The part of each input in the artifacts' ids, by the name of the input; `earlier` and `blocks` only
        where there are some."""
        blocks = {"blocks": [[name, files.identity()] for name, files in self.blocks]} if self.blocks else {}
        return (
            blocks
            | {
                "day": self.ds.isoformat(),
                "log": [self.log.identity(), self.log.source.model_dump(mode="json")],
                "items": self.items.identity() if self.items else [],
                "queries": self.queries.identity() if self.queries else [],
            }
            | ({"earlier": self.earlier.identity()} if self.earlier else {})
        )


def source_path(name: str) -> Path:
    """Find the column map `name`: below the working directory, else beside our code. Raises InputError."""
    folders = [folder for folder in (SOURCES, Path(__file__).parents[2] / SOURCES) if folder.is_dir()]
    stem = "default" if name == SIMULATED else name  # the simulator writes our own schema
    known = {path.stem: path for folder in reversed(folders) for path in folder.glob("*.yaml")}
    if stem not in known:
        raise InputError(f"log.source {name!r}: there is no {SOURCES}/{name}.yaml{nearest(name, known)}")
    return known[stem]


def list_log(settings: Settings) -> Log:
    """List the whole log.

    Raises InputError for a log that is missing or empty, a table of another format, or a file outside the partitions.
    """
    path = source_path(settings.log.source)
    source = load_config(SourceSpec, path)
    listed = _log_files(settings, source)
    if not listed.files:
        uri = settings.log.uri or listed.uri
        raise InputError(f"log.uri {uri}: the log is empty: no file there matches {source.files!r} ({path})")
    days = [_partition_day(listed.uri, file.key) for file in listed.files]
    if any(days) and not all(days):
        stray = listed.files[days.index(None)]
        raise InputError(
            f"{listed.origin(stray)}: outside the ds= partitions that other files of the log are in; move it"
        )
    return Log(listed.uri, listed.files, listed.is_immutable, source, str(path), all(days))


def _log_files(settings: Settings, source: SourceSpec) -> Files:
    """List the simulated log, the one file at `log.uri`, or the files of its folder that match `source.files`."""
    uri = settings.log.uri
    if uri is None:
        return _simulated(settings, "log/")
    listed = _listing(uri, "log.uri")
    if f"/{uri}".endswith(f"/{listed.files[0].key}"):  # `uri` is the file itself
        return listed
    return replace(
        listed, files=tuple(file for file in listed.files if fnmatch.fnmatch(Path(file.key).name, source.files))
    )


def list_files(uri: str, name: str) -> Files:
    """List the files of a log below `uri`, a folder or one file; `name` is the flag or key that gave it.

    Raises InputError when there is none, and for a folder that another format keeps its table in.
    """
    return _listing(uri, name)


def list_items(settings: Settings, ds: date) -> Files | None:
    """List the catalogue; None when there is none. A simulated log has its own. Raises InputError as `list_log`."""
    if settings.items.uri is None and settings.log.source == SIMULATED:
        return _simulated(settings, "items-")
    return _snapshot(settings.items.uri, "items.uri", ds)


def list_queries(settings: Settings, ds: date) -> Files | None:
    """List the table of the users to serve tonight; None: everybody with a history. Raises InputError as `list_log`."""
    return _snapshot(settings.queries.uri, "queries.uri", ds)


def list_blocks(settings: Settings, ds: date) -> tuple[tuple[str, Files], ...]:
    """List the tables of blocked items, in order of their rules' names. Raises InputError as `list_log`."""
    listed = {
        name: _snapshot(block.uri, f"rules.block.{name}.uri", ds)
        for name, block in sorted(settings.rules.block.items())
    }
    return tuple((name, files) for name, files in listed.items() if files is not None)


def day_of(key: str) -> date | None:
    """The day in the `ds=` part of a key; None without such a part. Raises InputError when it is not a day."""
    return _partition_day("", key)


def read_user_ids(queries: Files, wanted: pa.DataType, declared: IdType) -> pa.Array:
    """Read the distinct `user_id`s as the log's type `wanted`, ascending; `declared` is the log's user_id_type.

    Raises InputError for a missing column, ids of another type, null, and ids that cannot be read.
    """
    distinct = DistinctIds(wanted)
    for file in queries.files:
        origin = queries.origin(file)
        with queries.open(file) as source:
            column = read_bounded(source, origin, ["user_id"], MAX_USERS_BYTES)["user_id"]
        distinct.add(ids_of_table(column, "user_id", wanted, declared, origin))
    return distinct.ascending()


def _snapshot(uri: str | None, name: str, ds: date) -> Files | None:
    if uri is None:
        return None
    listed = _listing(uri, name)
    files = tuple(file for file in listed.files if Path(file.key).suffix in PARQUET_SUFFIXES)
    if not files:
        raise InputError(f"{name} {uri}: no Parquet file there")
    days = {day for file in files if (day := _partition_day(listed.uri, file.key)) is not None}
    if days:  # a daily snapshot: the newest that is not after the day to serve
        usable = [day for day in days if day <= ds]
        if not usable:
            raise InputError(f"{name} {uri}: its oldest partition is ds={min(days)}, after the day to serve ({ds})")
        files = tuple(file for file in files if day_of(file.key) == max(usable))
    return replace(listed, files=files)


def _simulated(settings: Settings, prefix: str) -> Files:
    """List files of the simulated log, with their SHA-256 as etag, so that every store gives the same ids."""
    folder = simulated_prefix(settings.simulate)
    storage = open_storage(settings.root)
    manifest = read_manifest(storage, folder)
    if manifest is None:
        raise InputError(f"{settings.root}/{folder}: the simulated log is not there; run jobs/simulate_log.py first")
    files = [ObjectInfo(file.key, file.bytes, file.sha256) for file in manifest.files if file.key.startswith(prefix)]
    return Files(f"{storage.uri.rstrip('/')}/{folder}", tuple(sorted(files)), is_immutable=True)


def _listing(uri: str, name: str) -> Files:
    """List the objects below `uri`, a folder or one file, without markers: empty ones, and names that begin with `_` or
    a dot. Raises InputError for a folder that another format keeps its table in."""
    folder, file_name = _split_file(uri)
    if file_name:
        storage = open_storage(folder)
        file = storage.head(file_name)
        if file is not None and file.size:
            return Files(storage.uri, (file,))
    storage = open_storage(uri.rstrip("/"))
    everything = storage.list()
    found = [file for file in everything if file.size]  # Spark, EMR and consoles leave empty markers
    _tell_empty(storage.uri, [file.key for file in everything if not file.size and not _hidden(file.key)])
    for file in found:
        for form, what in TABLE_FORMATS.items():
            if form.search(file.key):
                raise InputError(
                    f"{name} {uri}: this is {what} ({file.key}), whose files are not all part of the table; "
                    "write the rows of its current version to a folder of plain Parquet"
                )
    listed = tuple(sorted(file for file in found if not _hidden(file.key)))
    if not listed:
        found_what = f"nothing but {len(everything)} empty or hidden files" if everything else "nothing"
        raise InputError(f"{name} {uri}: {found_what} there; give a folder or a file that exists")
    return Files(storage.uri, listed)


def _tell_empty(uri: str, keys: list[str]) -> None:
    """Warn of data files of zero bytes, which may have lost their rows; a marker has no suffix or a `$` in its name."""
    lost = [key for key in keys if "." in Path(key).name and "$" not in Path(key).name]
    if lost:
        log.warning("   %s: %d files of zero bytes are passed over, for example %s", uri, len(lost), lost[0])


def _split_file(uri: str) -> tuple[str, str]:
    """Split a URI into a folder and the name of a file; the name is empty when the URI cannot be a file."""
    if "://" not in uri:
        path = Path(uri).absolute()
        return str(path.parent), path.name if path.is_file() else ""
    folder, _, last = uri.rstrip("/").rpartition("/")
    return folder, "" if folder.endswith(":/") else last  # s3://bucket is no file


def _hidden(key: str) -> bool:
    return any(part.startswith(("_", ".")) for part in key.split("/"))


def path_columns(key: str) -> dict[str, str | None]:
    """The columns that stand in the folders of a key, as in `event_type=view/part-0.parquet`; None for Hive's null."""
    pairs = {name: unquote(value) for name, value in PATH_COLUMN.findall(key)}
    return {name: None if value in ("", HIVE_NULL) else value for name, value in pairs.items()}


def _partition_day(uri: str, key: str) -> date | None:
    partition = DAY_PARTITION.search(key)
    if partition is None:
        return None
    try:
        return date.fromisoformat(partition[1])
    except ValueError:
        raise InputError(f"{uri}/{key}: the partition ds={partition[1]} is no day; write ds=YYYY-MM-DD") from None
