"""Tonight's inputs: where the log and the snapshots lie, which of their files count, and the newest day."""

import fnmatch
import re
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.artifacts import InputObject
from pipeline.config import load_config, nearest
from pipeline.data.simulation.log import simulated_prefix
from pipeline.data.sources import SourceSpec
from pipeline.errors import InputError
from pipeline.io.artifacts import read_manifest
from pipeline.io.parquet import read_parquet_bytes
from pipeline.io.storage import open_storage
from pipeline.io.storage.base import Storage
from pipeline.settings import SIMULATED, Settings

DAY_PARTITION = re.compile(r"(?:^|/)ds=([^/]*)/")
SOURCES = Path("conf/sources")


@dataclass(frozen=True)
class Log:
    """The files of the interaction log, in order of key, and how they are read."""

    uri: str  # of the storage that the keys are relative to
    source: SourceSpec
    source_file: str
    files: tuple[InputObject, ...]
    is_partitioned: bool  # in ds= partitions

    def origin(self, key: str) -> str:
        """How errors name a file."""
        return f"{self.uri}/{key}"


@dataclass(frozen=True)
class Snapshot:
    """The Parquet files of an optional table (items, queries)."""

    uri: str
    files: tuple[InputObject, ...]


def load_source(name: str) -> SourceSpec:
    """The column map `conf/sources/<name>.yaml`. Raises InputError for a name that has no file there."""
    return load_config(SourceSpec, source_path(name))


def source_path(name: str) -> Path:
    """Where the column map lies: below the working directory, else beside our own code."""
    folders = [folder for folder in (SOURCES, Path(__file__).parents[2] / SOURCES) if folder.is_dir()]
    wanted = "default" if name == SIMULATED else name  # the simulator writes our own schema
    known = {path.stem: path for folder in reversed(folders) for path in folder.glob("*.yaml")}
    if wanted not in known:
        raise InputError(f"log.source {name!r}: there is no {SOURCES}/{name}.yaml{nearest(name, known)}")
    return known[wanted]


def open_log(settings: Settings, ds: date | None = None) -> Log:
    """List the log, up to the partition of `ds` where it has partitions.

    Raises InputError for a log that is not there or empty, a file of zero bytes, or a day without a partition.
    """
    path = source_path(settings.log.source)
    source = load_config(SourceSpec, path)
    if settings.log.uri is None:
        uri, listed = _simulated(settings, "log/")
    else:
        uri, listed = _listing(settings.log.uri, "log.uri")
        if not f"/{settings.log.uri}".endswith(f"/{listed[0].key}"):  # a folder, and not the very file
            listed = [file for file in listed if fnmatch.fnmatch(Path(file.key).name, source.files)]
    place = settings.log.uri or uri
    if not listed:
        raise InputError(f"log.uri {place}: the log is empty: no file there matches {source.files!r} ({path})")
    _check_sizes(uri, listed)
    days = [_day_of(uri, file.key) for file in listed]
    partitioned = [day is not None for day in days]
    if any(partitioned) and not all(partitioned):
        stray = listed[partitioned.index(False)].key
        raise InputError(f"{uri}/{stray}: outside the ds= partitions that other files of the log are in; move it")
    if ds is not None and all(partitioned):
        if ds not in days:
            newest = max(day for day in days if day)
            raise InputError(
                f"log.uri {place}: no partition ds={ds.isoformat()}; the newest is ds={newest.isoformat()}"
            )
        listed = [file for file, day in zip(listed, days, strict=True) if day is not None and day <= ds]
    return Log(uri, source, str(path), tuple(listed), all(partitioned))


def list_log(settings: Settings, ds: date | None = None) -> tuple[InputObject, ...]:
    """The files of `open_log`."""
    return open_log(settings, ds).files


def open_items(settings: Settings, ds: date) -> Snapshot | None:
    """The catalogue, or None when there is none. A simulated log brings its own."""
    if settings.items.uri is None and settings.log.source == SIMULATED:
        uri, files = _simulated(settings, "items.parquet")
        return Snapshot(uri, tuple(files))
    return _snapshot(settings.items.uri, "items.uri", ds)


def open_queries(settings: Settings, ds: date) -> Snapshot | None:
    """The users to serve tonight, or None: everybody with a history."""
    return _snapshot(settings.queries.uri, "queries.uri", ds)


def day_of(key: str) -> date | None:
    """The day in the `ds=` part of a key, or None."""
    return _day_of("", key)


def _snapshot(uri: str | None, name: str, ds: date) -> Snapshot | None:
    if uri is None:
        return None
    place, listed = _listing(uri, name)
    files = [file for file in listed if Path(file.key).suffix in {".parquet", ".pq", ".parq"}]
    if not files:
        raise InputError(f"{name} {uri}: no Parquet file there")
    _check_sizes(place, files)
    days = {day for file in files if (day := _day_of(place, file.key)) is not None}
    if days:  # a daily snapshot: the newest that was known on the day
        usable = [day for day in days if day <= ds]
        if not usable:
            raise InputError(f"{name} {uri}: its oldest partition is ds={min(days)}, after the day to serve ({ds})")
        files = [file for file in files if _day_of(place, file.key) == max(usable)]
    return Snapshot(place, tuple(files))


def _simulated(settings: Settings, prefix: str) -> tuple[str, list[InputObject]]:
    """Files of the simulated log. Their SHA-256 stands for the etag, so that every store gives the same ids."""
    place = simulated_prefix(settings.simulate)
    storage = open_storage(settings.root)
    manifest = read_manifest(storage, place)
    if manifest is None:
        raise InputError(f"{settings.root}/{place}: the simulated log is not there; run jobs/simulate_log.py first")
    files = [InputObject(file.key, file.bytes, file.sha256) for file in manifest.files if file.key.startswith(prefix)]
    return f"{storage.uri.rstrip('/')}/{place}", sorted(files)


def _listing(uri: str, name: str) -> tuple[str, list[InputObject]]:
    """The storage and the objects below `uri`, a folder or one file, without hidden and `_` ones."""
    folder, name_in_it = _split_file(uri)
    if name_in_it:
        storage = open_storage(folder)
        found = storage.head(name_in_it)
        if found is not None:
            return storage.uri, [InputObject(found.key, found.size, found.etag)]
    storage = open_storage(uri.rstrip("/"))
    listed = [InputObject(found.key, found.size, found.etag) for found in storage.list() if not _hidden(found.key)]
    if not listed:
        raise InputError(f"{name} {uri}: nothing there; give a folder or a file that exists")
    return storage.uri, sorted(listed)


def _split_file(uri: str) -> tuple[str, str]:
    """The folder and the name of what may be a file; an empty name when it cannot be one."""
    if "://" not in uri:
        path = Path(uri).absolute()
        return str(path.parent), path.name if path.is_file() else ""
    folder, _, last = uri.rstrip("/").rpartition("/")
    return folder, "" if folder.endswith(":/") else last  # s3://bucket is no file


def _hidden(key: str) -> bool:
    return any(part.startswith(("_", ".")) for part in key.split("/"))


def _check_sizes(uri: str, files: list[InputObject]) -> None:
    for file in files:
        if file.size == 0:
            raise InputError(f"{uri}/{file.key}: the file has zero bytes; write it again or remove it")


def _day_of(uri: str, key: str) -> date | None:
    found = DAY_PARTITION.search(key)
    if found is None:
        return None
    try:
        return date.fromisoformat(found[1])
    except ValueError:
        raise InputError(f"{uri}/{key}: the partition ds={found[1]} is no day; write ds=YYYY-MM-DD") from None


def storage_of(place: Log | Snapshot) -> Storage:
    """The storage that the keys of a log or a snapshot are relative to."""
    return open_storage(place.uri)


def read_user_ids(queries: Snapshot) -> pa.Array:
    """The distinct `user_id`s of the table, as string or int64, ascending. Raises InputError for a null one."""
    storage = open_storage(queries.uri)
    parts = []
    for info in queries.files:
        origin = f"{storage.uri}/{info.key}"
        with storage.open(info.key) as file:
            ids = read_parquet_bytes(file, origin, columns=["user_id"])["user_id"]
        if ids.null_count:
            raise InputError(f"{origin}: {ids.null_count} rows have no user_id; remove them")
        parts.append(_plain_ids(ids, origin))
    types = {part.type for part in parts}
    if len(types) > 1:
        raise InputError(f"{queries.uri}: user_id is a string in some files and an integer in others; use one type")
    distinct = pc.unique(pa.chunked_array([chunk for part in parts for chunk in part.chunks], type=types.pop()))
    return distinct.take(pc.sort_indices(distinct))


def _plain_ids(ids: pa.ChunkedArray, origin: str) -> pa.ChunkedArray:
    if pa.types.is_dictionary(ids.type):
        ids = ids.cast(ids.type.value_type)
    if pa.types.is_integer(ids.type):
        return ids.cast(pa.int64())
    if pa.types.is_string(ids.type) or pa.types.is_large_string(ids.type):
        return ids.cast(pa.string())
    raise InputError(f"{origin}: column user_id is {ids.type}; an id is a string or an integer")
