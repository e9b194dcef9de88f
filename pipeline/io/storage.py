"""One small interface over memory, a local folder and S3-compatible stores."""

import hashlib
import os
import uuid
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from pipeline.errors import ConflictError, InputError


class ObjectNotFoundError(KeyError):
    """No object has this key."""


@dataclass(frozen=True, order=True)
class ObjectInfo:
    """What a listing tells of one object; `etag` changes when the content does."""

    key: str
    size: int
    etag: str


class Storage(ABC):
    """Objects by key below one root URI. Nothing is ever overwritten or renamed."""

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


class LocalStorage(Storage):
    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.uri = str(self.root)

    def read(self, key: str) -> bytes:
        try:
            return (self.root / key).read_bytes()
        except FileNotFoundError:
            raise ObjectNotFoundError(key) from None

    def head(self, key: str) -> ObjectInfo | None:
        path = self.root / key
        if not path.is_file():
            return None
        stat = path.stat()
        return ObjectInfo(
            key, stat.st_size, hashlib.sha256(f"{stat.st_size}-{stat.st_mtime_ns}".encode()).hexdigest()[:32]
        )

    def create(self, key: str, data: bytes) -> bool:
        path = self.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".tmp-{uuid.uuid4().hex}")
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        finally:
            temporary.unlink()
        return True

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        keys = (p.relative_to(self.root).as_posix() for p in self.root.rglob("*") if p.is_file())
        found = (self.head(k) for k in keys if k.startswith(prefix) and "/.tmp-" not in "/" + k)
        return sorted(info for info in found if info)

    def delete(self, key: str) -> None:
        (self.root / key).unlink(missing_ok=True)

    def open(self, key: str) -> pa.NativeFile:
        try:
            return pa.OSFile(str(self.root / key))
        except FileNotFoundError:
            raise ObjectNotFoundError(key) from None


def open_storage(uri: str) -> Storage:
    """`s3://bucket/prefix`, `memory://name`, or a local folder (`file://` or a plain path)."""
    if "://" not in uri:
        return LocalStorage(Path(uri))
    raise InputError(f"{uri}: no store of this kind is known; give a folder or s3://bucket/prefix")


def put(storage: Storage, key: str, data: bytes) -> None:
    """Write an object whose content its key determines: writing the same bytes again is fine.

    Raises ConflictError when the key already holds other bytes.
    """
    if storage.create(key, data):
        return
    found = storage.head(key)
    if found is None or found.size != len(data) or storage.read(key) != data:
        raise ConflictError(f"{storage.uri}/{key}: another process wrote other bytes here; run again to use them")
