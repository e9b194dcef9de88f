"""The public reader: reads the files that the last commit of a table names."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from typing import Literal

import pyarrow as pa
from pyarrow import fs

from pipeline.config import parse_day
from pipeline.errors import InputError
from pipeline.io.artifacts import read_file
from pipeline.io.parquet import read_parquet_bytes
from pipeline.io.publication.commits import RunFile, published, read_run_manifest, table_prefix
from pipeline.io.storage import open_storage
from pipeline.io.storage.base import Storage

FILE_READERS = 4


def latest_files(
    root: str, name: str, ds: date | str | None = None, table: Literal["candidates", "users"] = "candidates"
) -> list[str]:
    """List the paths or URIs of a published table's files, for any reader of Parquet.

    Without `ds`, take the newest published day. Raises InputError when nothing is published, or when a file is gone or
    has another size than was published.
    """
    storage, files = _published_files(root, name, ds, table)
    return [f"{storage.uri}/{table_prefix(name)}/{file.key}" for file in files]


def latest_arrow_files(
    root: str, name: str, ds: date | str | None = None, table: Literal["candidates", "users"] = "candidates"
) -> tuple[fs.FileSystem, list[str]]:
    """List the same files as a filesystem of pyarrow and the paths on it, for pandas and pyarrow.

    S3 needs no other package then. Raises InputError as `latest_files` does.
    """
    storage, files = _published_files(root, name, ds, table)
    places = [storage.arrow_path(f"{table_prefix(name)}/{file.key}") for file in files]
    return places[0][0], [path for _, path in places]


def read_latest(
    root: str,
    name: str,
    ds: date | str | None = None,
    table: Literal["candidates", "users"] = "candidates",
    columns: Sequence[str] | None = None,
) -> pa.Table:
    """Read a published table; every file is checked against the hash that was published.

    `table="users"` is the accounting. Without `ds`, take the newest published day. Raises InputError when nothing is
    published, or when a file is gone or damaged.
    """
    storage, files = _published_files(root, name, ds, table)
    with ThreadPoolExecutor(FILE_READERS) as pool:
        parts = pool.map(lambda file: _read_checked(storage, name, file, columns), files)
        return pa.concat_tables(list(parts))


def _read_checked(storage: Storage, name: str, file: RunFile, columns: Sequence[str] | None) -> pa.Table:
    data = read_file(storage, table_prefix(name), file, "restore it, or publish the night again")
    table = read_parquet_bytes(data, f"{storage.uri}/{table_prefix(name)}/{file.key}", columns)
    return table.replace_schema_metadata(None)


def _published_files(root: str, name: str, ds: date | str | None, table: str) -> tuple[Storage, list[RunFile]]:
    storage = open_storage(root)
    day = parse_day(ds, "ds") if isinstance(ds, str) else ds
    commit = published(storage, name, day)
    origin = f"{storage.uri}/{table_prefix(name)}" + (f" ds={day}" if day else "")
    if commit is None or commit.kind == "retract":
        raise InputError(f"{origin}: nothing is published there" + (", it was retracted" if commit else ""))
    files = [file for file in read_run_manifest(storage, name, commit).files if file.table == table]
    if not files:
        raise InputError(f"{origin}: commit {commit.seq} names no files of {table!r}; ask for 'candidates' or 'users'")
    folders = {f"{table_prefix(name)}/{file.key}".rpartition("/")[0] for file in files}
    sizes = {info.key: info.size for folder in folders for info in storage.list(f"{folder}/")}
    for file in files:
        size = sizes.get(f"{table_prefix(name)}/{file.key}")
        if size != file.bytes:
            state = "is gone" if size is None else f"has {size} bytes"
            raise InputError(f"{origin}: {file.key} {state}; commit {commit.seq} published it with {file.bytes} bytes")
    return storage, files
