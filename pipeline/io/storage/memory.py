"""A store in the memory of this process, for tests."""

import hashlib
import threading

import pyarrow as pa

from pipeline.io.storage.base import ObjectInfo, ObjectNotFoundError, Storage, check_key, check_prefix


class MemoryStorage(Storage):
    """Objects of this process: every storage opened as the same `memory://name` shares them."""

    _stores: dict[str, dict[str, bytes]] = {}  # noqa: RUF012 - shared on purpose
    _lock = threading.Lock()

    def __init__(self, uri: str) -> None:
        self.uri = uri
        with self._lock:
            self._objects = self._stores.setdefault(uri, {})

    def read(self, key: str) -> bytes:
        try:
            return self._objects[check_key(key)]
        except KeyError:
            raise ObjectNotFoundError(key) from None

    def head(self, key: str) -> ObjectInfo | None:
        data = self._objects.get(check_key(key))
        return None if data is None else ObjectInfo(key, len(data), hashlib.sha256(data).hexdigest()[:32])

    def create(self, key: str, data: bytes) -> bool:
        with self._lock:
            if check_key(key) in self._objects:
                return False
            self._objects[key] = bytes(data)
            return True

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        check_prefix(prefix)
        with self._lock:
            keys = sorted(key for key in self._objects if key.startswith(prefix))
        return [info for info in map(self.head, keys) if info]

    def delete(self, key: str) -> None:
        with self._lock:
            self._objects.pop(check_key(key), None)

    def open(self, key: str) -> pa.NativeFile:
        return pa.BufferReader(self.read(key))
