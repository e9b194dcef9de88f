"""Stores by URI: memory, a local folder, S3-compatible buckets."""

import re
from pathlib import Path
from urllib.parse import unquote

from pipeline.errors import InputError
from pipeline.io.storage.base import Storage
from pipeline.io.storage.memory import MemoryStorage


def open_storage(uri: str) -> Storage:
    """Open `s3://bucket/prefix`, `memory://name` or a local folder (`file:///path` or a path). Raises InputError."""
    from pipeline.io.storage.local import LocalStorage

    scheme, separator, rest = uri.partition("://")
    if not separator:
        if not uri or "\0" in uri or re.match(r"(s3|file|memory):", uri):
            raise InputError(f"{uri!r}: neither a folder nor s3://bucket/prefix")
        return LocalStorage(Path(uri))
    if scheme == "file" and rest.startswith("/"):
        return LocalStorage(Path(unquote(rest)))
    if scheme == "memory" and re.fullmatch(r"[\w.-]+", rest):
        return MemoryStorage(uri)
    if scheme == "s3":
        from pipeline.io.storage.s3 import S3Storage  # boto3 takes a while to import

        return S3Storage(uri)
    known = "a folder, file:///path, s3://bucket/prefix or memory://name"
    raise InputError(f"{uri}: no store of this kind is known; give {known}")
