"""Damage to the files of a generated log, for which prepare must refuse it; each with words of the refusal."""

import gzip
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.stages.generated_files import names_of, put
from tests.stages.generated_logs import Recipe

ZIP = b"PK\x03\x04\x14\x00\x00\x00\x08\x00" + bytes(range(200))


@dataclass
class Case:
    """A log on disk with its column map, before the damage."""

    rng: Random
    recipe: Recipe
    folder: Path
    source: dict[str, Any]
    sections: dict[str, Any] = field(default_factory=dict)  # of the settings

    @property
    def file(self) -> Path:
        """The first file of the log."""
        return min(path for path in self.folder.rglob("part-*") if "_temporary" not in path.parts)

    def name(self, column: str) -> str:
        return names_of(self.recipe)[column]

    def change_table(self, change: Callable[[pa.Table], pa.Table]) -> None:
        """Change the table in the first file."""
        pq.write_table(change(pq.ParquetFile(self.file).read()), self.file)

    def replace_column(self, column: str, make: Callable[[int], pa.Array]) -> None:
        name = self.name(column)

        def change(table: pa.Table) -> pa.Table:
            at = table.column_names.index(name)
            return table.set_column(at, name, make(table.num_rows))

        self.change_table(change)


Damage = Callable[[Case], Sequence[str]]
PARQUET: dict[str, Damage] = {}
TEXT: dict[str, Damage] = {}
BOTH: dict[str, Damage] = {}


def _in(table: dict[str, Damage]) -> Callable[[Damage], Damage]:
    def add(damage: Damage) -> Damage:
        table[damage.__name__.removeprefix("_").replace("_", " ")] = damage
        return damage

    return add


@_in(PARQUET)
def _cut(case: Case) -> Sequence[str]:
    data = case.file.read_bytes()
    put(case.file, data[: case.rng.randrange(1, len(data))])
    return [case.file.name]


@_in(PARQUET)
def _text_inside(case: Case) -> Sequence[str]:
    put(case.file, b"user_id,item_id,event_ts\nu1,i1,2024-11-08\n")
    return [case.file.name, "text", "format: csv"]


@_in(PARQUET)
def _other_format(case: Case) -> Sequence[str]:
    case.source |= {"format": "csv", "csv": {}}
    return [case.file.name, "a Parquet file, not text; set format: parquet"]


@_in(PARQUET)
def _encrypted(case: Case) -> Sequence[str]:
    put(case.file, b"PARE" + case.file.read_bytes()[4:-4] + b"PARE")
    return [case.file.name]


@_in(PARQUET)
def _column_renamed(case: Case) -> Sequence[str]:
    name = case.name(case.rng.choice(("user", "item", "time")))
    case.change_table(lambda table: table.rename_columns([n + "s" if n == name else n for n in table.column_names]))
    return [case.file.name, f"no column {name!r}", "did you mean"]


@_in(PARQUET)
def _column_doubled(case: Case) -> Sequence[str]:
    name = case.name(case.rng.choice(("user", "item", "time")))
    case.change_table(lambda table: table.append_column(name, table[name]))
    return [case.file.name, name, "2 columns"]


@_in(PARQUET)
def _no_ids(case: Case) -> Sequence[str]:
    column = case.rng.choice(("user", "item"))
    values: pa.Array = case.rng.choice(
        (
            pa.array([["a"]]),
            pa.array([{"a": 1}]),
            pa.array([True]),
            pa.array([1.5]),
            pa.array([0], pa.timestamp("us")),
            pa.array([0], pa.time64("us")),
            pa.array([0], pa.duration("s")),
            pa.array([[("a", 1)]], pa.map_(pa.string(), pa.int64())),
        )
    )
    case.replace_column(column, lambda n: pa.concat_arrays([values] * n))
    return [case.file.name, repr(case.name(column)), "an id must be an integer or text"]


@_in(PARQUET)
def _no_times(case: Case) -> Sequence[str]:
    values: pa.Array = case.rng.choice((pa.array([[1]]), pa.array([True]), pa.array([0], pa.time32("s"))))
    case.replace_column("time", lambda n: pa.concat_arrays([values] * n))
    return [case.file.name, repr(case.name("time")), "a time must be a timestamp, a date, a number or text"]


@_in(PARQUET)
def _numbers_without_a_unit(case: Case) -> Sequence[str]:
    for key in ("time_unit", "time_format"):
        case.source.pop(key, None)
    case.replace_column("time", lambda n: pa.array(range(n)))
    return [case.file.name, repr(case.name("time")), "time_unit: s, ms, us or ns"]


@_in(PARQUET)
def _other_ids(case: Case) -> Sequence[str]:
    column = case.rng.choice(("user", "item"))
    case.source[f"{column}_id_type"] = "as_is"
    is_text = case.recipe["ids"] not in ("number", "big")
    other = case.file.with_name("aaa.parquet")
    shutil.copy(case.file, other)
    case.file.with_name("aaa.parquet").rename(case.file.with_name("part-0000.parquet"))
    case.replace_column(column, lambda n: pa.array(range(n)) if is_text else pa.array(["x"] * n))
    return [repr(case.name(column)), f"{column}_id_type: string"]


@_in(PARQUET)
def _table_format(case: Case) -> Sequence[str]:
    key, name = case.rng.choice(
        (
            ("_delta_log/00000000000000000000.json", "a Delta table"),
            ("metadata/v1.metadata.json", "an Iceberg table"),
            (".hoodie/hoodie.properties", "a Hudi table"),
        )
    )
    put(case.folder / key, b"{}")
    return [key, name]


@_in(TEXT)
def _cut_stream(case: Case) -> Sequence[str]:
    data = gzip.compress(b"a,b\n" * 5_000)
    put(case.file, data[: len(data) // 2])
    return [case.file.name]


@_in(TEXT)
def _as_parquet(case: Case) -> Sequence[str]:
    case.source["format"] = "parquet"
    return [case.file.name, "not Parquet", "set format: csv"]


@_in(TEXT)
def _compressed_twice(case: Case) -> Sequence[str]:
    put(case.file, gzip.compress(gzip.compress(case.file.read_bytes())))
    return [case.file.name, "compress"]


@_in(TEXT)
def _unknown_name(case: Case) -> Sequence[str]:
    name = case.name(case.rng.choice(("user", "item", "time")))
    ours = next(ours for ours, theirs in case.source["columns"].items() if theirs == name)
    case.source["columns"][ours] = f"{name}X"
    return [f"no column '{name}X'"]


@_in(TEXT)
def _other_delimiter(case: Case) -> Sequence[str]:
    case.source["csv"] |= {"delimiter": "~"}
    return [case.file.name]


@_in(TEXT)
def _parquet_inside(case: Case) -> Sequence[str]:
    pq.write_table(pa.table({"a": [1]}), case.file)
    return [case.file.name, "a Parquet file, not text; set format: parquet"]


@_in(TEXT)
def _no_mark(case: Case) -> Sequence[str]:
    case.source["csv"].pop("encoding", None)
    put(case.file, ("user_id,item_id,event_ts\n" + "u,i,2024-11-08\n" * 9).encode("utf-16-be"))
    return [case.file.name, "utf-16-be"]


@_in(TEXT)
def _one_name_more(case: Case) -> Sequence[str]:
    for path in case.folder.rglob("part-*"):
        put(path, b"a;b\n" if case.rng.random() < 0.5 else b"\n\n")
    case.source["csv"] = {}
    return [case.file.name]


@_in(BOTH)
def _archive(case: Case) -> Sequence[str]:
    put(case.file, ZIP)
    return [case.file.name, "a zip file", "unpack it"]


@_in(BOTH)
def _noise(case: Case) -> Sequence[str]:
    put(case.file, b"\x00\xff" + case.rng.randbytes(400))
    return [case.file.name]


@_in(BOTH)
def _nothing_there(case: Case) -> Sequence[str]:
    shutil.rmtree(case.folder)
    if case.rng.random() < 0.7:
        put(case.folder / "_SUCCESS", b"")
    return ["log.uri", "give a folder or a file that exists"]


@_in(BOTH)
def _no_file_matches(case: Case) -> Sequence[str]:
    case.source["files"] = "*.nothing"
    return ["'*.nothing'", "the log is empty"]


@_in(BOTH)
def _outside(case: Case) -> Sequence[str]:
    shutil.copy(case.file, case.folder / "part-9")
    put(case.folder / "ds=2024-11-08" / "part-0", case.file.read_bytes())
    return ["outside the ds= partitions"]


@_in(BOTH)
def _no_day(case: Case) -> Sequence[str]:
    put(case.folder / "ds=2024-02-30" / "part-0", case.file.read_bytes())
    return ["ds=2024-02-30", "is no day"]


@_in(BOTH)
def _wrong_key(case: Case) -> Sequence[str]:
    case.source["colums"] = {}
    return ["conf/sources/x.yaml", "colums"]


@_in(BOTH)
def _catalogue(case: Case) -> Sequence[str]:
    ids = pa.array(["a", "b"])
    table, words = case.rng.choice(
        (
            (pa.table({"id": ids}), "no column 'item_id'"),
            (pa.table({"item_id": pa.array([["a"], ["b"]])}), "an id must be an integer or text"),
            (pa.table({"item_id": pa.array([True, False])}), "an id must be an integer or text"),
            (pa.table({"item_id": ids, "num_events": ids}), ""),
            (pa.table({"item_id": pa.array(["a", None])}), ""),
            (pa.table({"item_id": ids}).slice(0, 0), "no items"),
            (pa.Table.from_arrays([ids, ids, ids], ["item_id", "name", "name"]), "2 columns"),
        )
    )
    path = case.folder.parent / "other-items.parquet"
    pq.write_table(table, path)
    case.sections["items"] = {"uri": str(path)}
    return ["other-items.parquet", words]
