"""Write a generated log as files of its recipe, with the column map that reads them."""

import bz2
import gzip
import json
import lzma
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import quote
from uuid import UUID

import pyarrow as pa
import pyarrow.parquet as pq

from tests.stages.generated_logs import WEIGHTS, Recipe, Row
from tests.stages.generated_times import TIMES, written

OURS = {
    "user": "user_id",
    "item": "item_id",
    "time": "event_ts",
    "kind": "event_type",
    "delivery": "event_id",
    "value": "event_value",
}
THEIRS = {
    "user": "Kunde Nr.",
    "item": "article",
    "time": "When",
    "kind": "was",
    "delivery": "Message-ID",
    "value": "Wert",
}
HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
Files = dict[str, list[Row]]


def names_of(recipe: Recipe) -> dict[str, str]:
    """The log's name of each column that it has."""
    names = dict(THEIRS if recipe["seed"] % 3 == 0 else OURS)
    if recipe["kinds"] == "none":
        del names["kind"]
    if not recipe["has_deliveries"]:
        del names["delivery"]
    if not recipe["value"]:
        del names["value"]
    return names


def source_of(recipe: Recipe) -> dict[str, Any]:
    """The column map."""
    names = names_of(recipe)
    source: dict[str, Any] = {
        "format": recipe["format"],
        "columns": {OURS[column]: name for column, name in names.items()},
        "time_zone": recipe["zone"],
        "user_id_type": recipe["declared"],
        "item_id_type": recipe["declared"],
        "default_weight": 0.5,
        "null_words": recipe["null_words"],
        "value_is_weight": bool(recipe["value"]),
        "optional_columns": [OURS[name] for name in ("kind", "delivery") if name in names],
    } | TIMES[recipe["time"]].spec
    if recipe["kinds"] in ("error", "ignore", "weight"):
        source |= {"event_weights": WEIGHTS, "unknown_event_types": recipe["kinds"]}
    if recipe["format"] == "csv":
        source["csv"] = _csv_format(recipe)
    return source


def _csv_format(recipe: Recipe) -> dict[str, Any]:
    quotes = {"never": "", "single": "'"}
    values: dict[str, Any] = {"delimiter": recipe["delimiter"], "quote": quotes.get(recipe["quoting"], '"')}
    if recipe["note"] == "escaped":
        values["escape"] = "\\"
    if recipe["encoding"] not in ("utf-8", "utf-8-sig", "utf-16"):
        values["encoding"] = recipe["encoding"]
    if recipe["head"] == "skip":
        values["skip_rows"] = 2
    if recipe["head"] == "comment":
        values["comment"] = "#"
    if not recipe["has_header"]:
        values["column_names"] = _order(recipe)
    return values


def lay_out(rows: Sequence[Row], recipe: Recipe) -> Files:
    """The rows of each file, by its key."""
    rng = Random(recipe["seed"] + 2)
    names = names_of(recipe)
    suffix = recipe.get("suffix", ".parquet")
    files: Files = defaultdict(list)
    for row in rows:
        folder = f"ds={row.day}/" if "days" in recipe["layout"] else ""
        if "hive" in recipe["layout"] and "kind" in names:
            folder += f"{names['kind']}={HIVE_NULL if row.kind is None else quote(row.kind)}/"
        number = rng.randrange(3) if recipe["layout"] in ("files", "hive") else 0
        files[f"{folder}part-{number}{suffix}"].append(row)
    if recipe["seed"] % 4 == 0 and len(files) > 1 and "delivery" in names:  # one file has no such column
        key = rng.choice(sorted(files))
        files[key] = [replace(row, delivery=None) for row in files[key]]
    return dict(files)


def write_files(files: Files, recipe: Recipe, folder: Path) -> None:
    """Write the log below `folder`."""
    write = _text_file if recipe["format"] == "csv" else _parquet_file
    for number, (key, rows) in enumerate(sorted(files.items())):
        columns = _order(recipe)
        if all(row.delivery is None for row in rows) and recipe["seed"] % 4 == 0 and recipe.get("has_header", True):
            columns = [name for name in columns if name != names_of(recipe).get("delivery")]
        put(folder / key, write(rows, recipe, columns, number))
    if recipe.get("empty_file"):
        key = sorted(files)[-1].replace("part-", "qart-")
        put(folder / key, _parquet_file([], recipe, _order(recipe), 0))
    if recipe["markers"]:
        for name in ("_SUCCESS", "_temporary/0/part-0.parquet", ".part-0.crc", "year_$folder$", "lost.parquet"):
            put(folder / name, b"x" if name[0] in "_." and name != "_SUCCESS" else b"")


def put(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _order(recipe: Recipe) -> list[str]:
    """The columns of a file, of which `note` is the one that nobody reads."""
    names = names_of(recipe)
    if "hive" in recipe["layout"]:
        names.pop("kind", None)
    columns = [*names.values(), *(["note"] if recipe["note"] else [])]
    Random(recipe["seed"] + 3).shuffle(columns)
    return columns


def _values(rows: Sequence[Row], column: str, recipe: Recipe) -> list[Any]:
    if column != "time":
        return [row.raw.get(column, getattr(row, column)) for row in rows]
    form, zone = TIMES[recipe["time"]], recipe["zone"]
    return [row.raw.get("time", None if row.time is None else written(row.time, form, zone)) for row in rows]


def _parquet_file(rows: Sequence[Row], recipe: Recipe, columns: Sequence[str], number: int) -> bytes:
    ours = {name: column for column, name in names_of(recipe).items()}
    arrays: list[tuple[str, pa.Array]] = []
    for name in columns:
        if name == "note":
            arrays += [(name, array) for array in NOTES[recipe["note"]](len(rows))]
            continue
        values = _values(rows, ours[name], recipe)
        if not rows and recipe["seed"] % 2:
            arrays.append((name, pa.nulls(0)))  # as pandas writes no rows
        elif ours[name] == "time":
            arrays.append((name, _times_as(TIMES[recipe["time"]].type, values, recipe["mixed_times"] and number % 2)))
        elif ours[name] == "value":
            arrays.append((name, pa.array(values, pa.float64() if recipe["value"] == "number" else pa.string())))
        else:
            arrays.append((name, ids_as(recipe[f"{ours[name]}_as"], values, number)))
    sink = pa.BufferOutputStream()
    pq.write_table(
        pa.Table.from_arrays([array for _, array in arrays], [name for name, _ in arrays]),
        sink,
        row_group_size=recipe["group"],
        compression=recipe["codec"],
        data_page_version=recipe["page_version"],
        write_page_checksum=True,
    )
    return sink.getvalue().to_pybytes()


def _times_as(kind: pa.DataType, values: Sequence[Any], in_other_unit: bool) -> pa.Array:
    times = pa.array(values, kind)
    has_other = pa.types.is_timestamp(kind) and kind.tz and kind.unit != "ns"
    return times.cast(pa.timestamp("us", "Asia/Tokyo")) if in_other_unit and has_other else times


def ids_as(kind: str, values: Sequence[Any], number: int) -> pa.Array:
    """Ids in one of many Arrow types; `number` is the file's."""
    if kind == "mixed":
        kind = ("string", "large_string", "dictionary", "binary", "string_view")[number % 5]
    if kind == "mixed numbers":
        kind = ("int64", "int16", "dictionary of int64", "uint32")[number % 4]
    if kind == "uuid":
        return pa.array([value and UUID(value).bytes for value in values], pa.uuid())
    if kind in ("binary", "large_binary", "binary_view"):
        raw = [value.encode() if isinstance(value, str) else value for value in values]
        return pa.array(raw, getattr(pa, kind)())
    if kind == "dictionary":
        return pa.array(values, pa.string()).dictionary_encode()
    if kind in ("string", "large_string", "string_view", "digits"):
        return pa.array(values, pa.string() if kind == "digits" else getattr(pa, kind)())
    numbers = [value if value is None or isinstance(value, int) else int(value) for value in values]
    if kind == "dictionary of int64":
        return pa.array(numbers, pa.int64()).dictionary_encode()
    return pa.array(numbers, pa.decimal128(30, 0) if kind == "decimal" else getattr(pa, kind)())


NOTES: dict[str, Callable[[int], list[pa.Array]]] = {
    "nested": lambda n: [pa.array([{"a": [1, None], "b": {"c": "x"}}] * n)],
    "json": lambda n: [pa.ExtensionArray.from_storage(pa.json_(), pa.array([json.dumps({"a": 1})] * n, pa.string()))],
    "doubled": lambda n: [pa.array(range(n), pa.int64()), pa.array(["x"] * n, pa.string())],
    "null": lambda n: [pa.nulls(n)],
}
TEXT_NOTES = {
    "plain": "a note",
    "lines": "first line\nthe second, longer line\n\nand a last one",
    "latin": "café",
    "escaped": '12" mix\\',
}


def _text_file(rows: Sequence[Row], recipe: Recipe, columns: Sequence[str], number: int) -> bytes:
    ours = {name: column for column, name in names_of(recipe).items()}
    values = {name: _values(rows, ours[name], recipe) for name in columns if name != "note"}
    note = TEXT_NOTES.get(recipe["note"] or "", "")
    if recipe["quoting"] == "never":
        note = note.replace("\n", " ").replace(",", "")
    lines = [_line(columns, recipe)] if recipe["has_header"] else []
    for at, row in enumerate(rows):
        cells = [note if name == "note" else values[name][at] for name in columns]
        lines.append(_line(cells, recipe) if row.line is None else _broken_line(cells, columns, row.line, recipe))
        if recipe["blank_lines"] and at % 7 == 3:
            lines.append("")
    head = {"skip": ["Report of the day", "made by hand"], "comment": ["# made", "# by hand"], "blank": ["", ""]}
    text = "".join(line + recipe["end"] for line in [*head.get(recipe["head"], []), *lines])
    text = text if recipe["seed"] % 5 else text.removesuffix(recipe["end"])
    return _compressed(_encoded(text, recipe), recipe["compression"])


def _broken_line(cells: Sequence[Any], columns: Sequence[str], how: str, recipe: Recipe) -> str:
    """A line that is no row, or the rows around a stray quote."""
    plain = ["a note" if name == "note" else cell for name, cell in zip(columns, cells, strict=True)]
    broken = {"short": plain[1:], "long": [*plain, "x"], "word": ["garbage"]}
    line = _line(broken.get(how, plain), recipe)
    return line.replace("a note", {"opens": '"a note', "closes": 'a "note'}.get(how, "a note"))


def _line(cells: Sequence[Any], recipe: Recipe) -> str:
    mark = {"never": "", "single": "'"}.get(recipe["quoting"], '"')
    special = (recipe["delimiter"], mark, "\n", "\r")

    def cell(value: str | None) -> str:
        text = "" if value is None else str(value)
        if recipe["note"] == "escaped":
            return mark + text.replace("\\", "\\\\").replace(mark, "\\" + mark) + mark
        if mark and (recipe["quoting"] == "all" or any(one in text for one in special)):
            return mark + text.replace(mark, mark * 2) + mark
        return text

    return recipe["delimiter"].join(map(cell, cells)) + (recipe["delimiter"] if recipe["trailing"] else "")


def _encoded(text: str, recipe: Recipe) -> bytes:
    data = text.encode(recipe["encoding"], "replace")
    if recipe["note"] == "latin" and recipe["encoding"] in ("utf-8", "utf-8-sig"):
        data = data.replace("café".encode(), b"caf\xe9")  # in a column that nobody reads
    return data


def _compressed(data: bytes, compression: str | None) -> bytes:
    if compression in ("zstd", "lz4"):
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, compression) as stream:
            stream.write(data)
        return sink.getvalue().to_pybytes()
    return {None: bytes, "gzip": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}[compression](data)
