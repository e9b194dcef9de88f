"""The interface of every store: read, create if absent, list, delete."""

import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

import pyarrow as pa
from pyarrow import fs

from pipeline.errors import InputError

MAX_KEY_BYTES = 1_024  # S3's limit
MAX_SEGMENT_BYTES = 255  # Linux's limit for one name
TEMPORARY = ".tmp-"  # names that a local folder uses while it writes; no key may contain one
PROBE_KEY = "candidates/_probe/create-if-absent"


class ObjectNotFoundError(KeyError):
    """No object has this key."""


@dataclass(frozen=True, order=True)
class ObjectInfo:
    """One object of a listing: key, size in bytes, and an etag that changes when the content does."""

    key: str
    size: int
    etag: str


class Storage(ABC):
    """Objects by key below one root URI. Nothing is ever overwritten or renamed.

    Keys are relative and '/'-separated. A storage is pickled as its URI, which the other process opens again.
    Methods raise InputError for a fault that a person must mend (key, bucket, credentials, permission) and
    InfrastructureError for a fault that a retry can mend (network, server, full disk).
    """

    uri: str

    @abstractmethod
    def read(self, key: str) -> bytes:
        """Read the whole object. Raises ObjectNotFoundError."""

    @abstractmethod
    def head(self, key: str) -> ObjectInfo | None:
        """Read the object's size and etag; None when it does not exist."""

    @abstractmethod
    def create(self, key: str, data: bytes) -> bool:
        """Write the object atomically if the key is free. Returns False, and writes nothing, when the key is taken."""

    @abstractmethod
    def list(self, prefix: str = "") -> list[ObjectInfo]:
        """List all objects whose key starts with `prefix`, in order of key."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove the object; no error when it does not exist."""

    @abstractmethod
    def open(self, key: str) -> pa.NativeFile:
        """Open the object for random access (Parquet). Raises ObjectNotFoundError."""

    def clock(self) -> datetime:
        """The time by the store's own clock, UTC; of a local store the machine's."""
        return datetime.now(UTC)

    def arrow_path(self, key: str) -> tuple[fs.FileSystem, str]:
        """The filesystem and path of `key`, for a library that writes through pyarrow itself (Ray Train)."""
        raise InputError(
            f"{self.uri}: this store lives in one process, which Ray's workers cannot reach; use a folder or s3://bucket/prefix"
        )

    def __reduce__(self) -> tuple[Callable[[str], "Storage"], tuple[str]]:
        return type(self), (self.uri,)


def put_hashed(storage: Storage, key: str, data: bytes) -> None:
    """Write an object whose key carries the hash of its content: other bytes there are damage and are replaced."""
    while not storage.create(key, data):
        existing = storage.head(key)
        if existing is not None and existing.size == len(data) and storage.read(key) == data:
            return
        storage.delete(key)


_checked: set[str] = set()  # URIs


def check_store(storage: Storage) -> None:
    """Raise InputError for a store that lets two writers publish the same commit; probe each store once per process.

    Some S3 servers accept `If-None-Match` and ignore it. The probe leaves one small object behind, so that it needs no
    right to delete.
    """
    if storage.uri in _checked:
        return
    storage.create(PROBE_KEY, b"first")
    try:
        before = storage.read(PROBE_KEY)
        created = storage.create(PROBE_KEY, uuid.uuid4().bytes)
        is_kept = not created and storage.read(PROBE_KEY) == before
    except ObjectNotFoundError:
        is_kept = False
    if not is_kept:
        raise InputError(
            f"{storage.uri}: this store does not refuse to overwrite an object that exists (create-if-absent, "
            "If-None-Match: *), so two runs could publish over each other; use a store with conditional writes"
        )
    _checked.add(storage.uri)


def check_key(key: str) -> str:
    """Return the key if every store can hold it. Raises InputError otherwise."""
    segments = key.split("/")
    fault = next((fault for segment in segments if (fault := _fault(segment))), None)
    if len(key.encode("utf-8", "surrogatepass")) > MAX_KEY_BYTES:
        fault = f"it is longer than {MAX_KEY_BYTES} bytes"
    if fault:
        raise InputError(f"{key!r} is no key of an object: {fault}")
    return key


def check_prefix(prefix: str) -> str:
    """Return the prefix if a key can start with it; it may end within a name. Raises InputError otherwise."""
    folder, _, start = prefix.rpartition("/")
    if prefix.startswith("/") or "\0" in start:
        raise InputError(f"{prefix!r} starts no key of an object")
    if folder:
        check_key(folder)
    return prefix


def _fault(segment: str) -> str | None:
    """Say why a name between two slashes cannot be part of a key; None when it can."""
    if segment in ("", ".", ".."):
        return f"the segment {segment!r} leads to another folder"
    if segment.startswith(TEMPORARY):
        return f"names that start with {TEMPORARY!r} are kept for half-written files"
    if any(ord(letter) < 32 or 0xD800 <= ord(letter) < 0xE000 for letter in segment):
        return "it has a control character or is not Unicode"
    if len(segment.encode()) > MAX_SEGMENT_BYTES:
        return f"a segment is longer than {MAX_SEGMENT_BYTES} bytes"
    return None
