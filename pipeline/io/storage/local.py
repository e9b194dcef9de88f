"""Objects in a local folder, created atomically by hard link."""

import errno
import hashlib
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from pipeline.errors import InfrastructureError, InputError
from pipeline.io.storage.base import TEMPORARY, ObjectInfo, ObjectNotFoundError, Storage, check_key, check_prefix


class LocalStorage(Storage):
    """A folder. An object is written beside its place, synced, and linked into it: a name that is taken stays.

    Symbolic links below the root are never followed: what they lead to may be changed by others, or lie outside.
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
        found: dict[str, os.stat_result] = {}
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
                            found[key] = entry.stat()
        return [info for key in sorted(found) if (info := _local_info(key, found[key]))]

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
        """A link to something below the root is skipped (its target is listed by its own name); others are refused."""
        if not Path(os.path.realpath(self.root / key)).is_relative_to(os.path.realpath(self.root)):
            raise InputError(
                f"{self.uri}/{key}: this symbolic link leads out of {self.uri}, and none is followed; "
                "copy the files in, or name the folder that holds them"
            )

    @contextmanager
    def _explained(self, key: str, num_bytes: int | None = None) -> Iterator[None]:
        """Turn what the operating system says about this key into our errors."""
        place = f"{self.uri}/{key}"
        try:
            yield
        except (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError):
            if num_bytes is not None:
                raise InputError(f"{place}: a file is where a folder must be, or the reverse; remove it") from None
            raise ObjectNotFoundError(key) from None
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise InputError(
                    f"{place}: {os.strerror(error.errno)} for user {os.getuid()}; give this user the right, "
                    "or choose another root"
                ) from error
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                there = next(folder for folder in (self.root, *self.root.parents) if folder.exists())
                raise InfrastructureError(
                    f"{place}: {os.strerror(error.errno)}: {num_bytes or 0} bytes were to be written, "
                    f"{shutil.disk_usage(there).free} are free; make room and run again"
                ) from error
            raise InfrastructureError(f"{place}: {error.strerror or error}") from error


def _local_info(key: str, found: os.stat_result) -> ObjectInfo | None:
    if not stat.S_ISREG(found.st_mode):
        return None
    etag = hashlib.sha256(f"{found.st_size}-{found.st_mtime_ns}".encode()).hexdigest()[:32]
    return ObjectInfo(key, found.st_size, etag)


def _link(temporary: Path, path: Path) -> bool:
    try:
        os.link(temporary, path)
    except FileExistsError:
        # A network file system may answer so when our own link was made and its answer was lost.
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
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for new in reversed(missing):
        new.mkdir(exist_ok=True)
        _sync_folder(new.parent)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
