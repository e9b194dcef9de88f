"""Tell by its first bytes what a file holds, and quote the content of a file in a message for people."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import pyarrow as pa

from pipeline.errors import InputError

HEAD_BYTES = 512
SHOWN = 200  # characters of a file that are quoted
SHOWN_NAMES = 20
SHOWN_OF_NAME = 40  # characters

COMPRESSED = ("gzip", "zstd", "bz2", "xz", "lz4")  # what a text log may be compressed with
MAGIC = (
    (b"\x1f\x8b", "gzip"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    *((bytes([first]) + b"\x2a\x4d\x18", "zstd") for first in range(0x50, 0x60)),  # a frame of metadata comes first
    (b"\xfd7zXZ\x00", "xz"),
    (b"\x04\x22\x4d\x18", "lz4"),
    (b"PK\x03\x04", "zip"),
    (b"PK\x05\x06", "zip"),
    (b"7z\xbc\xaf\x27\x1c", "7z"),
    (b"Rar!\x1a\x07", "rar"),
    (b"\xff\x06\x00\x00sNaPpY", "snappy"),
    (b"\x1f\x9d", "compress"),
    (b"Obj\x01", "Avro"),
    (b"SQLite format 3\x00", "SQLite"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "Excel"),
    (b"\x89HDF\r\n\x1a\n", "HDF5"),
    (b"ARROW1\x00\x00", "Arrow"),
)
CONTROLS = bytes([0, *range(2, 9), *range(14, 27)])  # not the control characters that a text may have
WAY_OUT = {
    "Parquet": "set format: parquet",
    **dict.fromkeys(("zip", "7z", "rar", "tar"), "unpack it"),
    **dict.fromkeys(("snappy", "compress"), f"unpack it, or compress it with {', '.join(COMPRESSED[:-1])} or lz4"),
    **dict.fromkeys(("ORC", "Avro", "SQLite", "Excel", "HDF5", "Arrow"), "write it as Parquet or CSV"),
}

TABLE_FORMATS = {  # by the name of a file in the folder of a table
    re.compile(r"(?:^|/)_delta_log/[^/]+\.(?:json|parquet)$"): "a Delta table",
    re.compile(r"(?:^|/)metadata/[^/]+\.metadata\.json$"): "an Iceberg table",
    re.compile(r"(?:^|/)\.hoodie/hoodie\.properties$"): "a Hudi table",
}


def content_of(head: bytes) -> str:
    """Name the content of a file by its first HEAD_BYTES bytes: a compression, an archive, a format, or "text"."""
    for magic, name in MAGIC:
        if head.startswith(magic):
            is_workbook = name == "zip" and (b"[Content_Types].xml" in head or b"xl/" in head)
            return "Excel" if is_workbook else name
    if head[:3] == b"BZh" and head[4:10] in (b"1AY&SY", b"\x17rE8P\x90"):
        return "bz2"
    if head[257:262] == b"ustar":
        return "tar"
    is_binary = any(byte in CONTROLS for byte in head[3:64])  # a column may be called PAR1 or ORC
    for magic, name in ((b"PAR1", "Parquet"), (b"PARE", "Parquet"), (b"ORC", "ORC")):
        if head.startswith(magic) and is_binary:
            return name
    return "text"


def described(content: str) -> str:
    """A name of `content_of` as part of a sentence."""
    article = "an" if content in ("ORC", "Avro", "Excel", "Arrow", "xz") else "a"
    return "text" if content == "text" else f"{article} {content} file"


@contextmanager
def other_content_named(source: pa.NativeFile, origin: str) -> Iterator[None]:
    """Raise InputError that names the content of an open file when it cannot be read as Parquet since it is none."""
    try:
        yield
    except pa.ArrowInvalid as error:
        source.seek(0)
        content = content_of(source.read(HEAD_BYTES))
        if content == "Parquet":
            raise
        way_out = "set format: csv" if content in ("text", *COMPRESSED) else WAY_OUT[content]
        raise InputError(f"{origin}: {described(content)}, not Parquet (or damaged); {way_out}") from error


def shown(text: str) -> str:
    """The beginning of a text from a file, in quotes and without control characters."""
    quoted = repr(text[:SHOWN])
    return f"{quoted[:SHOWN]}…" if len(quoted) > SHOWN + 2 or len(text) > SHOWN else quoted


def shown_names(names: Iterable[str]) -> str:
    """The names of columns, in their order, not too many of them."""
    known = list(names)
    texts = [name if name.isprintable() and name else shown(name) for name in known[:SHOWN_NAMES]]
    texts = [text if len(text) <= SHOWN_OF_NAME else f"{text[:SHOWN_OF_NAME]}…" for text in texts]
    rest = len(known) - SHOWN_NAMES
    return ", ".join(texts) + (f" and {rest:,} more" if rest > 0 else "")
