"""The interface of every store: read, create if absent, list, delete."""

import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import pyarrow as pa
from pyarrow import fs

from pipeline.errors import ConflictError, InputError

MAX_KEY_BYTES = 1_024  # S3's limit
MAX_SEGMENT_BYTES = 255  # Linux's limit for one name
TEMPORARY = ".tmp-"  # names that a local folder uses while it writes; no key may contain one
PROBE_KEY = "candidates/_probe/create-if-absent"


class ObjectNotFoundError(KeyError):
    """No object has this key."""


@dataclass(frozen=True, order=True)
class ObjectInfo:
    """What a listing tells of one object; `etag` changes when the content does."""

    key: str
    size: int
    etag: str


class Storage(ABC):
    """Objects by key below one root URI. Nothing is ever overwritten or renamed.

    Keys are relative and '/'-separated. A storage can be pickled: what arrives is its URI, opened again there.
    Raises InputError for what a person must mend (key, bucket, credentials, permission) and InfrastructureError for
    what a retry can (network, server, full disk).
    """

    uri: str

    @abstractmethod
    def read(self, key: str) -> bytes:
        """The whole object. Raises ObjectNotFoundError."""

    @abstractmethod
    def head(self, key: str) -> ObjectInfo | None:
        """The object's size and etag, or None when it does not exist."""

    @abstractmethod
    def create(self, key: str, data: bytes) -> bool:
        """Write the object if no object has this key, atomically. False when one had it: nothing was written."""

    @abstractmethod
    def list(self, prefix: str = "") -> list[ObjectInfo]:
        """All objects whose key starts with `prefix`, in order of key."""

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove the object; no error when it does not exist."""

    @abstractmethod
    def open(self, key: str) -> pa.NativeFile:
        """The object for random access (Parquet). Raises ObjectNotFoundError."""

    def arrow_path(self, key: str) -> tuple[fs.FileSystem, str]:
        """A filesystem and a path for `key`, for a library that writes through pyarrow by itself (Ray Train)."""
        raise InputError(f"{self.uri}: this store lives in one process, and Ray's workers are others")

    def __reduce__(self) -> tuple[Callable[[str], "Storage"], tuple[str]]:
        return type(self), (self.uri,)


def put(storage: Storage, key: str, data: bytes) -> None:
    """Write an object whose content its key determines: writing the same bytes again is fine.

    Raises ConflictError when the key already holds other bytes.
    """
    if storage.create(key, data):
        return
    found = storage.head(key)
    if found is None or found.size != len(data) or storage.read(key) != data:
        raise ConflictError(f"{storage.uri}/{key}: another process wrote other bytes here; run again to use them")


_honest: set[str] = set()


def check_store(storage: Storage) -> None:
    """Refuse a store that would let two writers publish the same commit. Asked once per process and store.

    Some S3 servers accept `If-None-Match` and ignore it. One small object stays behind, so no right to delete is
    needed. Raises InputError.
    """
    if storage.uri in _honest:
        return
    storage.create(PROBE_KEY, b"first")
    try:
        before = storage.read(PROBE_KEY)
        created = storage.create(PROBE_KEY, uuid.uuid4().bytes)
        kept = not created and storage.read(PROBE_KEY) == before
    except ObjectNotFoundError:
        kept = False
    if not kept:
        raise InputError(
            f"{storage.uri}: this store does not refuse to overwrite an object that exists (create-if-absent, "
            "If-None-Match: *), so two runs could publish over each other; use a store with conditional writes"
        )
    _honest.add(storage.uri)


def check_key(key: str) -> str:
    """The key itself when every store can hold it safely, else InputError."""
    segments = key.split("/")
    fault = next((fault for segment in segments if (fault := _fault(segment))), None)
    if len(key.encode("utf-8", "surrogatepass")) > MAX_KEY_BYTES:
        fault = f"it is longer than {MAX_KEY_BYTES} bytes"
    if fault:
        raise InputError(f"{key!r} is no key of an object: {fault}")
    return key


def check_prefix(prefix: str) -> str:
    """The prefix itself when it starts some key, else InputError; its last segment may be cut anywhere."""
    folder, _, start = prefix.rpartition("/")
    if prefix.startswith("/") or "\0" in start:
        raise InputError(f"{prefix!r} starts no key of an object")
    if folder:
        check_key(folder)
    return prefix


def _fault(segment: str) -> str | None:
    if segment in ("", ".", ".."):
        return f"the segment {segment!r} leads elsewhere"
    if segment.startswith(TEMPORARY):
        return f"names that start with {TEMPORARY!r} are kept for half-written files"
    if any(ord(letter) < 32 or 0xD800 <= ord(letter) < 0xE000 for letter in segment):
        return "it has a control character or is not Unicode"
    if len(segment.encode()) > MAX_SEGMENT_BYTES:
        return f"a segment is longer than {MAX_SEGMENT_BYTES} bytes"
    return None
