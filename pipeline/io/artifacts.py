"""The protocol of every artifact: immutable files, then claims that say which parts are done, then a manifest.

A file's name carries the hash of its content, so that two attempts with different last bits never collide. A claim is
a small JSON file that is written after the files that it names, and only if it is absent: the first attempt stands.
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
from pipeline.errors import InfrastructureError, InputError
from pipeline.io.storage.base import ObjectNotFoundError, Storage, put_hashed

RECORDED_PACKAGES = ("nightrails", "numpy", "polars", "pyarrow", "ray", "torch")
READERS = 16  # threads: reading small claims is mostly waiting

ModelT = TypeVar("ModelT", bound=BaseModel)
RecordT = TypeVar("RecordT", bound=Config)


def write_file(storage: Storage, prefix: str, name: str, data: bytes, rows: int) -> FileEntry:
    """Write `data` below `prefix` as `name` with its hash before the suffix: `users.parquet` → `users-<sha16>.parquet`.

    Writing the same bytes again is fine; other bytes under this name are damage and are replaced. The key of the
    returned entry is relative to `prefix`.
    """
    stem, dot, suffix = name.rpartition(".")
    key = f"{stem}-{hashlib.sha256(data).hexdigest()[:16]}{dot}{suffix}"
    put_hashed(storage, f"{prefix}/{key}", data)
    return file_entry(key, data, rows)


def file_entry(key: str, data: bytes, rows: int) -> FileEntry:
    """Describe a file for the manifest; `key` is relative to the artifact's root."""
    return FileEntry(key=key, bytes=len(data), rows=rows, sha256=hashlib.sha256(data).hexdigest())


def read_file(storage: Storage, prefix: str, entry: FileEntry, remedy: str) -> bytes:
    """Read a file and check its hash. Raises InputError that ends with `remedy` when it is gone or damaged."""
    key = f"{prefix}/{entry.key}"
    try:
        data = storage.read(key)
    except ObjectNotFoundError:
        raise InputError(f"{storage.uri}/{key}: gone since it was written; {remedy}") from None
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise InputError(f"{storage.uri}/{key}: damaged, its SHA-256 is not the one that was written; {remedy}")
    return data


def parse(model: type[ModelT], data: bytes, origin: str, remedy: str) -> ModelT:
    """Turn JSON into a typed value. Raises InputError with the file (`origin`), its first fault and `remedy`."""
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"{origin}: not written by this version of nightrails ({field}: {first['msg']}); {remedy}"
        ) from None


@dataclass(frozen=True)
class Claims(Generic[RecordT]):
    """The finished parts of one kind: part n is done when `<prefix>/<stem>-<n>.json` exists and can be read, and every
    object that it names is in the store with its size. `claim` replaces a claim that fails this test."""

    storage: Storage
    prefix: str
    stem: str
    record: type[RecordT]
    objects: Callable[[RecordT], Mapping[str, int]]  # the size in bytes of each object that a record names, by key

    def claim(self, part: int, record: RecordT) -> RecordT:
        """Mark the part as done, after its files were written. Returns the first attempt's record, which stands."""
        data = record.model_dump_json(indent=1).encode()
        while not self.storage.create(self.key(part), data):
            first = self.read(part)
            if first is not None:
                return first
            self.storage.delete(self.key(part))  # it is damaged, or a file that it names is gone
        return record

    def read(self, part: int) -> RecordT | None:
        """Read the record of a part; None when the part is not done."""
        return self._read(part, self._size)

    def require(self, part: int, remedy: str) -> RecordT:
        """Read the record of a part. Raises InfrastructureError that ends with `remedy` when the part is not done."""
        record = self.read(part)
        if record is None:
            raise InfrastructureError(f"{self.storage.uri}/{self.key(part)}: gone or damaged; {remedy}")
        return record

    def done(self) -> dict[int, RecordT]:
        """Read the record of every part that is done, by part, from one listing."""
        sizes: Mapping[str, int] = {info.key: info.size for info in self.storage.list(f"{self.prefix}/")}
        name = re.compile(re.escape(f"{self.prefix}/{self.stem}-") + r"(\d{5,})\.json")

        def size_of(key: str) -> int | None:
            return sizes.get(key) if key.startswith(f"{self.prefix}/") else self._size(key)

        parts = [int(match[1]) for key in sizes if (match := name.fullmatch(key))]
        with ThreadPoolExecutor(READERS) as pool:
            records = pool.map(lambda part: self._read(part, size_of), parts)
            return {part: record for part, record in zip(parts, records, strict=True) if record is not None}

    def missing(self, parts: Sequence[int]) -> list[int]:
        """The parts that are not done yet, in the given order."""
        done = self.done()
        return [part for part in parts if part not in done]

    def key(self, part: int) -> str:
        """The key of a part's claim."""
        return f"{self.prefix}/{self.stem}-{part:05d}.json"

    def _read(self, part: int, size_of: Callable[[str], int | None]) -> RecordT | None:
        try:
            record = self.record.model_validate_json(self.storage.read(self.key(part)))
        except (ObjectNotFoundError, ValidationError):
            return None
        is_complete = all(size_of(key) == size for key, size in self.objects(record).items())
        return record if is_complete else None

    def _size(self, key: str) -> int | None:
        info = self.storage.head(key)
        return info.size if info else None


def no_objects(record: Config) -> dict[str, int]:
    """Name no object: for claims whose record is all that is kept."""
    return {}


def sizes_of(prefix: str, *files: FileEntry) -> dict[str, int]:
    """The size in bytes of each file, by its key in the store; the files' own keys are relative to `prefix`."""
    return {f"{prefix}/{file.key}": file.bytes for file in files}


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
    """Write the manifest, which makes the artifact exist. Returns the manifest of the first attempt, which stands."""
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
    """Read the manifest of the artifact at `prefix`; None when there is none. Raises InputError when it is damaged."""
    key = f"{prefix}/manifest.json"
    try:
        data = storage.read(key)
    except ObjectNotFoundError:
        return None
    return parse(Manifest, data, f"{storage.uri}/{key}", "remove the folder to make it again")


def require_manifest(storage: Storage, artifact: Artifact, job: str) -> Manifest:
    """Read the manifest of the artifact. Raises InputError that names the job to run first when there is none."""
    manifest = read_manifest(storage, artifact.prefix)
    if manifest is None:
        raise InputError(f"{storage.uri}/{artifact.prefix}: not there; run jobs/{job}.py first")
    return manifest


def versions() -> dict[str, str]:
    """The installed versions of Python and of the packages that shape a result; no package is imported."""
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
