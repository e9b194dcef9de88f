"""A storage that dies, or calls a function, at its n-th operation."""

import threading
from collections.abc import Callable
from typing import Literal, TypeVar

import pyarrow as pa

from pipeline.io.storage.base import ObjectInfo, Storage

T = TypeVar("T")


class Crash(Exception):  # noqa: N818 - it stands for a killed process
    """The process was killed. No code of ours catches this exception."""


class CrashingStorage(Storage):
    """Passes every operation to `inner` and calls `happen` before or after operation number `at` (the first is 1).

    When `happen` raises, every later operation raises too, as in a dead process.
    """

    def __init__(
        self, inner: Storage, at: int, when: Literal["before", "after"], happen: Callable[[], None] | None = None
    ) -> None:
        self.uri, self._inner, self._at, self._when = inner.uri, inner, at, when
        self._happen = happen or self._crash
        self._lock = threading.RLock()
        self._dead = False
        self.operations: list[str] = []

    def read(self, key: str) -> bytes:
        return self._do(f"read {key}", lambda: self._inner.read(key))

    def head(self, key: str) -> ObjectInfo | None:
        return self._do(f"head {key}", lambda: self._inner.head(key))

    def create(self, key: str, data: bytes) -> bool:
        return self._do(f"create {key}", lambda: self._inner.create(key, data))

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        return self._do(f"list {prefix}", lambda: self._inner.list(prefix))

    def delete(self, key: str) -> None:
        self._do(f"delete {key}", lambda: self._inner.delete(key))

    def open(self, key: str) -> pa.NativeFile:
        return self._do(f"open {key}", lambda: self._inner.open(key))

    def _do(self, name: str, operation: Callable[[], T]) -> T:
        with self._lock:
            if self._dead:
                raise Crash("dead")
            self.operations.append(name)
            is_it = len(self.operations) == self._at
            if is_it and self._when == "before":
                self._run()
            try:
                return operation()
            finally:
                if is_it and self._when == "after":
                    self._run()

    def _run(self) -> None:
        try:
            self._happen()
        except Crash:
            self._dead = True
            raise

    def _crash(self) -> None:
        raise Crash(f"at operation {self._at}: {self.operations[-1]}")
