"""Objects in a local folder, created atomically by hard link."""

import errno
import hashlib
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import takewhile
from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from pipeline.errors import InfrastructureError, InputError
from pipeline.io.storage.base import TEMPORARY, ObjectInfo, ObjectNotFoundError, Storage, check_key, check_prefix


class LocalStorage(Storage):
    """A folder. An object is written to a temporary file, synced, and hard-linked to its name, if the name is free.

    Symbolic links below the root are never followed: others may change their targets, or the targets lie outside.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root).expanduser().absolute()
        self.uri = str(self.root)

    def read(self, key: str) -> bytes:
        with self._explained(key):
            return self._path(key).read_bytes()

    def head(self, key: str) -> ObjectInfo | None:
        with suppress(ObjectNotFoundError), self._explained(key):
            return _local_info(key, self._path(key).stat())
        return None

    def create(self, key: str, data: bytes) -> bool:
        path = self._path(key)
        temporary = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
        with self._explained(key, len(data)):
            _make_folder(path.parent)
            try:
                with open(temporary, "xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                created = _link(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)
            _sync_folder(path.parent)
        return created

    def list(self, prefix: str = "") -> list[ObjectInfo]:
        stats: dict[str, os.stat_result] = {}
        waiting = [check_prefix(prefix).rpartition("/")[0]]
        while waiting:
            folder = waiting.pop()
            with suppress(ObjectNotFoundError), self._explained(folder), os.scandir(self.root / folder) as entries:
                for entry in entries:
                    key = f"{folder}/{entry.name}" if folder else entry.name
                    if entry.name.startswith(TEMPORARY) or not key.startswith(prefix):
                        continue
                    if entry.is_symlink():
                        self._check_link(key)
                    elif entry.is_dir():
                        waiting.append(key)
                    else:
                        with suppress(FileNotFoundError):  # deleted since the folder was read
                            stats[key] = entry.stat()
        return [info for key in sorted(stats) if (info := _local_info(key, stats[key]))]

    def delete(self, key: str) -> None:
        with suppress(ObjectNotFoundError), self._explained(key):
            self._path(key).unlink(missing_ok=True)

    def open(self, key: str) -> pa.NativeFile:
        with self._explained(key):
            path = self._path(key)
            if path.is_dir():
                raise ObjectNotFoundError(key)
            return pa.OSFile(str(path))

    def arrow_path(self, key: str) -> tuple[fs.FileSystem, str]:
        return fs.LocalFileSystem(), str(self.root / check_key(key))

    def _path(self, key: str) -> Path:
        path = Path(os.path.realpath(self.root), check_key(key))
        if os.path.realpath(path) != str(path):
            raise InputError(f"{self.uri}/{key}: a symbolic link is on this path, and none is followed; use real files")
        return path

    def _check_link(self, key: str) -> None:
        """Raise InputError for a link out of the root. The target of any other link is listed under its own name."""
        if not Path(os.path.realpath(self.root / key)).is_relative_to(os.path.realpath(self.root)):
            raise InputError(
                f"{self.uri}/{key}: this symbolic link leads out of {self.uri}, and none is followed; "
                "copy the files in, or name the folder that holds them"
            )

    @contextmanager
    def _explained(self, key: str, num_bytes: int | None = None) -> Iterator[None]:
        """Turn the operating system's errors about a key into ours; `num_bytes` is set for a write, None for a read."""
        origin = f"{self.uri}/{key}"
        try:
            yield
        except (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError):
            if num_bytes is not None:
                raise InputError(f"{origin}: a file is where a folder must be, or the reverse; remove it") from None
            raise ObjectNotFoundError(key) from None
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise InputError(
                    f"{origin}: {os.strerror(error.errno)} for user {os.getuid()}; give this user the right, "
                    "or choose another root"
                ) from error
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                nearest = next(folder for folder in (self.root, *self.root.parents) if folder.exists())
                raise InfrastructureError(
                    f"{origin}: {os.strerror(error.errno)}: {num_bytes or 0} bytes were to be written, "
                    f"{shutil.disk_usage(nearest).free} are free; make room and run again"
                ) from error
            raise InfrastructureError(f"{origin}: {error.strerror or error}") from error


def _local_info(key: str, stats: os.stat_result) -> ObjectInfo | None:
    if not stat.S_ISREG(stats.st_mode):
        return None
    etag = hashlib.sha256(f"{stats.st_size}-{stats.st_mtime_ns}".encode()).hexdigest()[:32]
    return ObjectInfo(key, stats.st_size, etag)


def _link(temporary: Path, path: Path) -> bool:
    try:
        os.link(temporary, path)
    except FileExistsError:
        # A network file system may say so of our own link, when its first answer was lost.
        with suppress(FileNotFoundError):
            return path.samefile(temporary)
        return False
    except OSError as error:
        if error.errno in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise InputError(
                f"{path}: this file system has no hard links, so nothing can be created atomically on it; "
                "choose a root on another one"
            ) from error
        raise
    return True


def _make_folder(folder: Path) -> None:
    """Make the folder and its parents, and make their names durable."""
    missing = list(takewhile(lambda parent: not parent.is_dir(), (folder, *folder.parents)))
    for new in reversed(missing):
        new.mkdir(exist_ok=True)
        _sync_folder(new.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
