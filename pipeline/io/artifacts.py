"""Manifests: the small file, written last, that makes an artifact exist."""

import hashlib
import platform
from datetime import UTC, datetime
from importlib import metadata

from pydantic import ValidationError

from pipeline.artifacts import FileEntry, Manifest
from pipeline.errors import ConflictError, InputError
from pipeline.io.storage.base import ObjectNotFoundError, Storage

RECORDED_PACKAGES = ("nightrails", "numpy", "polars", "pyarrow", "ray", "torch")


def manifest_key(prefix: str) -> str:
    """Where the manifest of the artifact at `prefix` lies."""
    return f"{prefix}/manifest.json"


def read_manifest(storage: Storage, prefix: str) -> Manifest | None:
    """The manifest of the artifact at `prefix`, or None when that artifact does not exist."""
    key = manifest_key(prefix)
    try:
        return Manifest.model_validate_json(storage.read(key))
    except ObjectNotFoundError:
        return None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"{storage.uri}/{key}: not a manifest of ours ({where}: {first['msg']}); "
            "it was damaged or written by another version: remove the folder to make it again"
        ) from None


def write_manifest(storage: Storage, prefix: str, manifest: Manifest) -> None:
    """Make the artifact exist. Writing the same artifact again is fine.

    Raises ConflictError when another process made it meanwhile from other bytes.
    """
    data = manifest.model_dump_json(indent=1).encode()
    if storage.create(manifest_key(prefix), data):
        return
    existing = read_manifest(storage, prefix)
    if existing is None or (existing.id, existing.files) != (manifest.id, manifest.files):
        raise ConflictError(
            f"{storage.uri}/{manifest_key(prefix)}: another process wrote this artifact meanwhile, with other files; "
            "run again to use what it made"
        )


def file_entry(key: str, data: bytes, rows: int) -> FileEntry:
    """The manifest's line for a file; `key` is relative to the artifact's root."""
    return FileEntry(key=key, bytes=len(data), rows=rows, sha256=hashlib.sha256(data).hexdigest())


def versions() -> dict[str, str]:
    """Python and the packages that shape a result, as installed (none is imported)."""
    found = {"python": platform.python_version()}
    for name in RECORDED_PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:  # nightrails itself, run from a folder that was not installed
            continue
    return found


def now() -> str:
    """The time in UTC, ISO 8601 to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
