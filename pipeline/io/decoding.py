"""Open a text file of any compression and encoding as a stream of UTF-8."""

import codecs
import lzma
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import pyarrow as pa

from pipeline.data.sources import CsvFormat
from pipeline.errors import InputError
from pipeline.io.formats import COMPRESSED, HEAD_BYTES, WAY_OUT, content_of, described

PEEKED_BYTES = 4096
COPIED_BYTES = 1 << 20
STAND_IN = (
    b"\x1f"  # ASCII unit separator, in place of a delimiter that is not one ASCII character: Arrow takes no other
)
UNREADABLE = "\uefff"  # in place of each byte that the encoding cannot have; no character is defined there
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),  # begins as UTF-16's
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class Readable(Protocol):
    """An open file, a decompressing stream, or another Converted."""

    def read(self, size: int, /) -> bytes: ...


class Converted:
    """A stream of bytes that each pass through `convert`, which is told the last call: then the bytes are empty."""

    def __init__(self, source: Readable, convert: Callable[[bytes, bool], bytes], first: bytes = b"") -> None:
        self.source, self.convert = source, convert
        self.is_done = False
        self.ready = convert(first, False) if first else b""  # bytes to hand out next

    def read(self, size: int, /) -> bytes:
        """Read `size` bytes, or all there are."""
        self._fill(size)
        data, self.ready = self.ready[:size], self.ready[size:]
        return data

    def is_empty(self) -> bool:
        """Whether no byte is left."""
        self._fill(PEEKED_BYTES)
        return not self.ready

    def _fill(self, size: int) -> None:
        while not self.is_done and len(self.ready) < size:
            chunk = self.source.read(size)
            self.is_done = not chunk
            self.ready += self.convert(chunk, self.is_done)


class Replacing:
    """Replaces one sequence of bytes by another."""

    def __init__(self, old: bytes, new: bytes) -> None:
        self.old, self.new = old, new
        self.held = b""  # the last bytes, which may be the beginning of `old`

    def __call__(self, chunk: bytes, is_last: bool) -> bytes:
        pieces = (self.held + chunk).split(self.old)
        longest = 0 if is_last else len(self.old) - 1
        num_held = next((n for n in range(longest, 0, -1) if pieces[-1].endswith(self.old[:n])), 0)
        end = len(pieces[-1]) - num_held
        pieces[-1], self.held = pieces[-1][:end], pieces[-1][end:]
        return self.new.join(pieces)


class Decoding:
    """Turns any encoding into valid UTF-8; bytes that it cannot have become UNREADABLE, once each."""

    def __init__(self, encoding: str) -> None:
        codecs.register_error("nightrails.unreadable", _as_unreadable)
        self.is_utf8 = codecs.lookup(encoding).name == "utf-8"
        self.decoder = codecs.getincrementaldecoder(encoding)("nightrails.unreadable")
        self.found_unreadable = False

    def __call__(self, chunk: bytes, is_last: bool) -> bytes:
        if self.is_utf8 and chunk.isascii() and not self.decoder.getstate()[0]:
            return chunk
        text = self.decoder.decode(chunk, is_last)
        self.found_unreadable = self.found_unreadable or UNREADABLE in text
        return text.encode("utf-8", "replace")


def _as_unreadable(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return UNREADABLE * (error.end - error.start), error.end


class _Xz:
    """Arrow reads no xz."""

    def __init__(self, source: pa.NativeFile) -> None:
        self.file = lzma.LZMAFile(source)  # noqa: SIM115 - whoever opened the source closes it

    def read(self, size: int, /) -> bytes:
        try:
            return self.file.read(size)
        except (lzma.LZMAError, EOFError) as error:
            raise OSError(str(error)) from None


@dataclass(frozen=True)
class Text:
    """An open text file."""

    raw: Readable  # its bytes, decompressed
    stream: Converted  # valid UTF-8, with STAND_IN for a delimiter that Arrow cannot read
    decoding: Decoding

    @property
    def is_as_arrow_reads_it(self) -> bool:
        """Whether Arrow can read the bytes as they are, as far as they were read."""
        is_utf8 = self.decoding.is_utf8 and not self.decoding.found_unreadable
        return is_utf8 and self.stream.source is self.raw and isinstance(self.raw, pa.NativeFile)


def open_text(source: pa.NativeFile, csv_format: CsvFormat, origin: str) -> Text:
    """Open a text file. Raises InputError that names the content of a file that is no text, and the way out."""
    raw = _decompressed(source, origin)
    first = raw.read(PEEKED_BYTES)
    decoding = Decoding(_encoding(first, csv_format, origin))
    stream = Converted(raw, decoding, first)
    if delimiter_of(csv_format) != csv_format.delimiter:
        stream = Converted(stream, Replacing(csv_format.delimiter.encode(), STAND_IN))
    return Text(raw, stream, decoding)


@contextmanager
def arrow_stream(source: pa.NativeFile, csv_format: CsvFormat, origin: str, text: Text) -> Iterator[pa.NativeFile]:
    """Open a text file, of which `text` was the beginning, as a stream that no Python runs in.

    Arrow reads ahead in a thread of its own; if that thread needed Python when the process ends, neither would end. So
    a text that has to be converted goes through a temporary file.
    """
    source.seek(0)
    if text.is_as_arrow_reads_it:
        yield _decompressed(source, origin)
        return
    with tempfile.NamedTemporaryFile(prefix="nightrails-") as file:
        stream = open_text(source, csv_format, origin).stream
        while data := stream.read(COPIED_BYTES):
            file.write(data)
        file.flush()
        with pa.OSFile(file.name) as converted:
            yield converted


def delimiter_of(csv_format: CsvFormat) -> str:
    """The delimiter in the stream of `open_text`: one ASCII character."""
    return csv_format.delimiter if len(csv_format.delimiter.encode()) == 1 else STAND_IN.decode()


def _decompressed(source: pa.NativeFile, origin: str) -> Readable:
    content = content_of(source.read(HEAD_BYTES))
    source.seek(0)
    stream: Any = source
    if content == "xz":
        stream = _Xz(source)
    elif content in COMPRESSED:
        stream = pa.CompressedInputStream(source, content)
    elif content != "text":
        raise InputError(f"{origin}: {described(content)}, not text; {WAY_OUT[content]}")
    return stream  # type: ignore[no-any-return]


def _encoding(first: bytes, csv_format: CsvFormat, origin: str) -> str:
    """The encoding that the source names, else that of the byte order mark. Raises InputError for what is no text."""
    content = content_of(first)
    if content != "text":
        way_out = WAY_OUT.get(content, "compress it only once")
        raise InputError(f"{origin}: {described(content)} in a compressed file, not text; {way_out}")
    if codecs.lookup(csv_format.encoding).name != "utf-8":
        return csv_format.encoding
    for mark, encoding in BYTE_ORDER_MARKS:
        if first.startswith(mark):
            return encoding
    if first.count(0) * 4 > len(first):
        encoding = "utf-16-le" if first[1::2].count(0) >= first[::2].count(0) else "utf-16-be"
        raise InputError(
            f"{origin}: {first.count(0)} of the first {len(first)} bytes are zero, so the file is no UTF-8; "
            f"if it is UTF-16 without a byte order mark, set csv: {{encoding: {encoding}}}"
        )
    return "utf-8"
