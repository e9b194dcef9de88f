"""The one way to keep what was made: immutable files, claims that say that a part is done, and a manifest at the end.

A file's name carries the hash of its content, so that two attempts with different last bits never collide. A claim is
a small JSON file, created only if it is absent, after the files that it names: of several attempts the first stands.
The manifest is written last and makes the artifact exist. Nothing is overwritten or renamed.
"""

import hashlib
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError

from pipeline.artifacts import Artifact, FileEntry, Manifest
from pipeline.config import Config
from pipeline.errors import ConflictError, InfrastructureError, InputError
from pipeline.io.storage.base import ObjectNotFoundError, Storage, put

RECORDED_PACKAGES = ("nightrails", "numpy", "polars", "pyarrow", "ray", "torch")
READERS = 16  # claims are small: reading them is waiting

ModelT = TypeVar("ModelT", bound=BaseModel)
RecordT = TypeVar("RecordT", bound=Config)


def write_file(storage: Storage, prefix: str, name: str, data: bytes, rows: int) -> FileEntry:
    """Write `data` below `prefix` as `name` with its hash before the suffix: `users.parquet` → `users-<sha16>.parquet`.

    Writing the same bytes again is fine; other bytes under this name are damage, and make room. The entry's key is
    relative to `prefix`.
    """
    stem, dot, suffix = name.rpartition(".")
    key = f"{stem}-{hashlib.sha256(data).hexdigest()[:16]}{dot}{suffix}"
    try:
        return write_named_file(storage, prefix, key, data, rows)
    except ConflictError:
        storage.delete(f"{prefix}/{key}")
        return write_named_file(storage, prefix, key, data, rows)


def write_named_file(storage: Storage, prefix: str, key: str, data: bytes, rows: int) -> FileEntry:
    """Write `data` under a name that determines the content. Raises ConflictError when other bytes lie there."""
    put(storage, f"{prefix}/{key}", data)
    return file_entry(key, data, rows)


def file_entry(key: str, data: bytes, rows: int) -> FileEntry:
    """The manifest's line for a file; `key` is relative to the artifact's root."""
    return FileEntry(key=key, bytes=len(data), rows=rows, sha256=hashlib.sha256(data).hexdigest())


def read_file(storage: Storage, prefix: str, entry: FileEntry, remedy: str) -> bytes:
    """The file, whose hash is checked. Raises InputError, which ends with `remedy`, when it is gone or damaged."""
    key = f"{prefix}/{entry.key}"
    try:
        data = storage.read(key)
    except ObjectNotFoundError:
        raise InputError(f"{storage.uri}/{key}: gone since it was written; {remedy}") from None
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise InputError(f"{storage.uri}/{key}: damaged, its SHA-256 is not the one that was written; {remedy}")
    return data


def parse(model: type[ModelT], data: bytes, origin: str, remedy: str) -> ModelT:
    """JSON as a typed value. Raises InputError that names the file, the first fault, and ends with `remedy`."""
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"{origin}: not written by this version of nightrails ({where}: {first['msg']}); {remedy}"
        ) from None


@dataclass(frozen=True)
class Claims(Generic[RecordT]):
    """The finished parts of one kind: part n is done when `<prefix>/<stem>-<n>.json` exists, can be read, and every
    file that it names lies in the store with the right size. A claim that fails this is removed and made again."""

    storage: Storage
    prefix: str
    stem: str
    record: type[RecordT]
    files_of: Callable[[RecordT], Sequence[FileEntry]]  # their keys are relative to `root`
    root: str = ""  # "": the prefix

    def claim(self, part: int, record: RecordT) -> RecordT:
        """Make the part done, after its files were written; returns the record that stands."""
        data = record.model_dump_json(indent=1).encode()
        while not self.storage.create(self.key(part), data):
            first = self.read(part)
            if first is not None:
                return first
            self.storage.delete(self.key(part))  # nothing can be read through it
        return record

    def read(self, part: int) -> RecordT | None:
        """The record of a part, or None when the part is not done."""
        return self._read(part, lambda key: info.size if (info := self.storage.head(key)) else None)

    def require(self, part: int, remedy: str) -> RecordT:
        """The record of a part. Raises InfrastructureError, which ends with `remedy`, when the part is not done."""
        record = self.read(part)
        if record is None:
            raise InfrastructureError(f"{self.storage.uri}/{self.key(part)}: gone or damaged; {remedy}")
        return record

    def done(self) -> dict[int, RecordT]:
        """The records of all parts that are done, from one listing."""
        sizes: Mapping[str, int] = {info.key: info.size for info in self.storage.list(f"{self.prefix}/")}
        name = re.compile(re.escape(f"{self.prefix}/{self.stem}-") + r"(\d{5,})\.json")
        parts = [int(match[1]) for key in sizes if (match := name.fullmatch(key))]
        with ThreadPoolExecutor(READERS) as pool:
            records = pool.map(lambda part: self._read(part, sizes.get), parts)
            return {part: record for part, record in zip(parts, records, strict=True) if record is not None}

    def missing(self, parts: Sequence[int]) -> list[int]:
        """Those of the parts that are still to do."""
        done = self.done()
        return [part for part in parts if part not in done]

    def key(self, part: int) -> str:
        """Where the claim of a part lies."""
        return f"{self.prefix}/{self.stem}-{part:05d}.json"

    def _read(self, part: int, size_of: Callable[[str], int | None]) -> RecordT | None:
        try:
            record = self.record.model_validate_json(self.storage.read(self.key(part)))
        except (ObjectNotFoundError, ValidationError):
            return None
        root = self.root or self.prefix
        are_there = all(size_of(f"{root}/{file.key}") == file.bytes for file in self.files_of(record))
        return record if are_there else None


def no_files(record: Config) -> tuple[FileEntry, ...]:
    """The files of a claim that holds all there is to keep."""
    return ()


def seal(
    storage: Storage,
    artifact: Artifact,
    *,
    kind: str,
    lineage: Mapping[str, str],
    settings: Mapping[str, Any],
    files: Sequence[FileEntry],
    counts: Mapping[str, int],
    measures: Mapping[str, float] | None = None,
) -> Manifest:
    """Make the artifact exist; returns the manifest that stands, the first of several attempts."""
    manifest = Manifest(
        kind=kind,
        id=artifact.id,
        lineage=dict(lineage),
        settings=dict(settings),
        files=tuple(files),
        counts=dict(counts),
        measures=dict(measures or {}),
        created_at=now(),
        versions=versions(),
    )
    if storage.create(artifact.key("manifest.json"), manifest.model_dump_json(indent=1).encode()):
        return manifest
    return read_manifest(storage, artifact.prefix) or manifest


def read_manifest(storage: Storage, prefix: str) -> Manifest | None:
    """The manifest of the artifact at `prefix`, or None when that artifact does not exist."""
    key = f"{prefix}/manifest.json"
    try:
        data = storage.read(key)
    except ObjectNotFoundError:
        return None
    return parse(Manifest, data, f"{storage.uri}/{key}", "remove the folder to make it again")


def require_manifest(storage: Storage, artifact: Artifact, job: str) -> Manifest:
    """The manifest of the artifact. Raises InputError that names the job to run when it does not exist."""
    manifest = read_manifest(storage, artifact.prefix)
    if manifest is None:
        raise InputError(f"{storage.uri}/{artifact.prefix}: not there; run jobs/{job}.py first")
    return manifest


def versions() -> dict[str, str]:
    """Python and the packages that shape a result, as installed (none is imported)."""
    installed = {"python": platform.python_version()}
    for name in RECORDED_PACKAGES:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # nightrails itself, run from a folder that was not installed
            continue
    return installed


def now() -> str:
    """The time in UTC, ISO 8601 to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
