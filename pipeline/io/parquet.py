"""Write Parquet with page checksums; read it with verification, and never a pickled column."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.errors import InfrastructureError, InputError, NightrailsError

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
    missing = [name for name in columns or () if name not in schema.names]
    if missing:
        raise InputError(f"{origin}: no column {missing[0]!r}; it has {', '.join(schema.names)}")


def _fields(top: pa.Field) -> Iterator[pa.Field]:
    """Yield a field and every field within it."""
    waiting = [top]
    while waiting:
        field = waiting.pop()
        yield field
        if not isinstance(field.type, pa.BaseExtensionType):
            waiting += [field.type.field(i) for i in range(field.type.num_fields)]
