"""Opening the files of others: what can go wrong, in our words, with the name of the file."""

from collections.abc import Iterator
from contextlib import contextmanager

import pyarrow as pa

from pipeline.errors import InfrastructureError, InputError
from pipeline.io.storage import ObjectNotFoundError, Storage


@contextmanager
def opened(storage: Storage, key: str) -> Iterator[pa.NativeFile]:
    try:
        file = storage.open(key)
    except ObjectNotFoundError:
        raise InputError(
            f"{storage.uri}/{key}: removed while it was read; run again when the log is complete"
        ) from None
    with file:
        yield file


@contextmanager
def errors_name(origin: str) -> Iterator[None]:
    """Arrow's errors on a file become ours: the file is damaged, or the store failed."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, MemoryError):
            raise
        reason = " ".join(str(error).split())[:400]
        if "AWS Error" in reason or getattr(error, "errno", None) is not None:
            raise InfrastructureError(f"{origin}: the store failed while the file was read: {reason}") from error
        raise InputError(f"{origin}: damaged or cut short ({reason}); restore it or remove it") from error
