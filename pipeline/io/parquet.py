"""Write Parquet with page checksums; read it with verification, and never a pickled column."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.data.columns import is_text, plain_values, without_views
from pipeline.errors import InfrastructureError, InputError, NightrailsError
from pipeline.io.formats import shown_names

BOUNDED_ROWS = 1_024  # decoded at once, of a table that must not be too large
MAX_HEADER_BYTES = 64
THRIFT_NEXT_I32 = 0x15  # the field after the last one, an integer of 32 bits
EXTENSION_KEY = b"ARROW:extension:name"
PICKLED = ("arrow.py_extension_type", "ray.")  # how the names of types begin that pyarrow or Ray may unpickle


def write_parquet_bytes(table: pa.Table, metadata: Mapping[str, str] | None = None) -> bytes:
    """Write the table as one Parquet file; `metadata` goes into its footer."""
    sink = pa.BufferOutputStream()
    pq.write_table(
        table.replace_schema_metadata(dict(metadata or {})),
        sink,
        compression="zstd",
        compression_level=1,
        write_page_checksum=True,  # without them nine of ten flipped bits are read as good data
    )
    data: bytes = sink.getvalue().to_pybytes()
    return data


def read_parquet_bytes(data: bytes | pa.NativeFile, origin: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Read a table, or only `columns` in the given order. `origin` names the file in errors.

    Raises InputError when the file is damaged, lacks a column, or has a column of an extension type (which can hold
    pickled code); InfrastructureError when the store fails while the file is read.
    """
    source = pa.BufferReader(data) if isinstance(data, bytes) else data
    with arrow_errors_named(origin), pq.ParquetFile(source, page_checksum_verification=True) as file:
        _check_schema(file.schema_arrow, origin, columns)
        table = file.read(columns=None if columns is None else list(columns))
    return table if columns is None else table.select(list(columns))


def read_bounded(source: pa.NativeFile, origin: str, columns: Sequence[str] | None, max_bytes: int) -> pa.Table:
    """Read a table, or only `columns`, that takes at most `max_bytes` in memory: a small file may unfold into a large
    table. Raises InputError as `read_parquet_bytes`, and for a larger table."""
    parts: list[pa.RecordBatch] = []
    num_bytes = num_rows = 0
    with arrow_errors_named(origin), pq.ParquetFile(source, page_checksum_verification=True) as file:
        _check_schema(file.schema_arrow, origin, columns)
        names = file.schema_arrow.names if columns is None else list(columns)
        for encoded in file.iter_batches(BOUNDED_ROWS, columns=names, use_threads=False):
            batch = without_views(encoded)
            parts.append(batch)
            num_bytes, num_rows = num_bytes + unfolded_bytes(batch), num_rows + batch.num_rows
            if num_bytes > max_bytes:
                raise InputError(
                    f"{origin}: its first {num_rows} of {file.metadata.num_rows} rows take {num_bytes / 1e9:.1f} GB in "
                    f"memory, and {max_bytes / 1e9:.1f} GB is the limit for this table; leave out columns or rows that "
                    "are not needed"
                )
        schema = pa.schema([file.schema_arrow.field(name) for name in names])
    return pa.Table.from_batches(parts, schema=parts[0].schema if parts else schema)


def unfolded_bytes(batch: pa.RecordBatch) -> int:
    """The size of a batch in memory when the values of dictionaries are written out."""
    num_bytes = 0
    for column in batch.columns:
        num_bytes += column.nbytes
        if pa.types.is_dictionary(column.type) and is_text(column.type):
            lengths = pc.binary_length(plain_values(column.dictionary)).take(column.indices)
            num_bytes += pc.sum(lengths).as_py() or 0
    return num_bytes


def has_page_checksums(source: pa.NativeFile, footer: pq.FileMetaData) -> bool:
    """Whether the first page of a Parquet file has a checksum, by which damage is noticed; true for a file of no page.

    Reads the page's header, a struct in Thrift's compact protocol: fields 1 to 3 are integers, and 4 is the checksum.
    """
    if not footer.num_row_groups or not footer.row_group(0).num_rows or not footer.num_columns:
        return True
    column = footer.row_group(0).column(0)
    source.seek(min(filter(None, (column.dictionary_page_offset, column.data_page_offset))))
    header = source.read(MAX_HEADER_BYTES)
    at = 0
    for _ in range(3):  # a byte for the field, then an integer whose last byte is below 128
        at += 1
        while header[at] >= 128:
            at += 1
        at += 1
    return bool(header[at] == THRIFT_NEXT_I32)


@contextmanager
def arrow_errors_named(origin: str) -> Iterator[None]:
    """Turn Arrow's errors into InputError (the file is damaged) or InfrastructureError (the store failed)."""
    try:
        yield
    except NightrailsError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, MemoryError):
            raise
        reason = " ".join(str(error).split())[:400]
        if "AWS Error" in reason or getattr(error, "errno", None) is not None:
            raise InfrastructureError(f"{origin}: the store failed while the file was read: {reason}") from error
        raise InputError(f"{origin}: damaged or cut short ({reason}); restore it or remove it") from error


def check_no_code(schema: pa.Schema, origin: str, read: Collection[str]) -> None:
    """Raise InputError that names a column, at any depth, with an extension type that can carry code: one that is
    pickled Python, or in a column of `read` any but Arrow's own (UUID, JSON, …), which stand for plain values."""
    for top in schema:
        for field in _fields(top):
            name = getattr(field.type, "extension_name", "") or (field.metadata or {}).get(EXTENSION_KEY, b"").decode()
            is_standard = name.startswith("arrow.") or not name
            if name.startswith(PICKLED) or (top.name in read and not is_standard):
                raise InputError(
                    f"{origin}: column {field.name!r} has the extension type {name}, which can carry code; "
                    "write the column with a plain Arrow type"
                )


def _check_schema(schema: pa.Schema, origin: str, columns: Sequence[str] | None) -> None:
    check_no_code(schema, origin, schema.names)
    doubled = next((name for name in columns or schema.names if schema.names.count(name) > 1), None)
    if doubled is not None:
        raise InputError(
            f"{origin}: {schema.names.count(doubled)} columns are called {doubled!r}, so nobody knows which one is "
            "meant; rename or remove the others"
        )
    missing = [name for name in columns or () if name not in schema.names]
    if missing:
        raise InputError(f"{origin}: no column {missing[0]!r}; it has {shown_names(schema.names)}")


def _fields(top: pa.Field) -> Iterator[pa.Field]:
    """Yield a field and every field within it."""
    waiting = [top]
    while waiting:
        field = waiting.pop()
        yield field
        if not isinstance(field.type, pa.BaseExtensionType):
            waiting += [field.type.field(i) for i in range(field.type.num_fields)]
