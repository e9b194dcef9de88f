"""The lines that README.md gives for reading the table do what it says."""

import ast
import hashlib
import json
import re
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import publish
from pipeline.io.night import open_night
from pipeline.io.publication.reader import latest_arrow_files, latest_files, read_latest
from pipeline.settings import Settings
from tests.quality.nights import compute_night, other_settings, settings_for
from tests.quality.units import DS

README = Path(__file__).parents[2] / "README.md"


def publish_night(settings: Settings) -> None:
    compute_night(settings)
    publish.run(settings, open_night(settings, DS))


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty root: a folder, or a prefix of a bucket."""
    return str(tmp_path) if request.param == "local" else request.getfixturevalue("s3_uri")


def readme_block(name: str) -> str:
    """The Python between <!-- name --> and <!-- /name --> of README.md."""
    text = README.read_text(encoding="utf-8")
    found = re.search(rf"<!-- {name} -->\s*```python\n(.*?)```\s*<!-- /{name} -->", text, re.DOTALL)
    assert found, f"README.md has no Python between <!-- {name} --> and <!-- /{name} -->"
    return found[1]


def readme_reader() -> Callable[..., pa.Table]:
    """The reader that README.md gives to people without our package."""
    block = readme_block("reader")
    assert "pipeline" not in block
    assert len([line for line in block.splitlines() if line.strip()]) <= 22
    names: dict[str, Any] = {}
    exec(block, names)  # noqa: S102 - our own README
    reader: Callable[..., pa.Table] = names["read_latest"]
    return reader


def run_engines(root: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run the README's lines. Returns the names they define, and the value of each line that is only looked at."""
    names: dict[str, Any] = {"root": root}
    results: dict[str, Any] = {}
    for statement in ast.parse(readme_block("engines")).body:
        line = ast.unparse(statement)
        if isinstance(statement, ast.Expr):
            results[line.partition("(")[0]] = eval(line, names)
        else:
            exec(line, names)  # noqa: S102 - our own README
    return names, results


def as_arrow(result: Any) -> pa.Table:
    """What an engine returned, with the engine's own types."""
    if isinstance(result, pd.DataFrame):
        return pa.Table.from_pandas(result, preserve_index=False)
    return result if isinstance(result, pa.Table) else pa.table(result)


def plain_rows(result: Any) -> list[tuple[Any, ...]]:
    """Rows as Python's own values, in order."""
    table = as_arrow(result)
    return list(zip(*(column.to_pylist() for column in table.columns), strict=True))


def test_every_engine_reads_the_same_rows_and_a_date(root: str) -> None:
    publish_night(settings_for(root, name="candidates"))
    names, results = run_engines(root)
    expected = read_latest(root, "candidates")
    assert names["table"].equals(expected)
    assert list(results) == ["pyarrow.parquet.read_table", "pandas.read_parquet", "polars.read_parquet", "duckdb.sql"]
    for engine, result in results.items():
        table = as_arrow(result)
        assert table.column_names == expected.column_names, engine
        assert table.schema.field("ds").type == pa.date32(), engine
        assert table["ds"][0].as_py() == date(2026, 11, 20), engine
        assert plain_rows(result) == plain_rows(expected), engine


@pytest.mark.parametrize("layout", ["long", "nested"])
def test_the_plain_list_of_files_is_enough_in_a_folder(tmp_path: Path, layout: str) -> None:
    publish_night(settings_for(str(tmp_path), output={"num_buckets": 2, "surface": "home", "layout": layout}))
    files, expected = latest_files(str(tmp_path), "home"), read_latest(str(tmp_path), "home")
    read = (pd.read_parquet, pq.read_table, pl.read_parquet, pl.scan_parquet, duckdb.read_parquet)
    for engine in read:
        result: Any = engine(files)
        rows = result.collect() if isinstance(result, pl.LazyFrame) else result
        if layout == "long":
            assert plain_rows(rows) == plain_rows(expected), engine
        assert as_arrow(rows).column_names == expected.column_names, engine
        assert as_arrow(rows).schema.field("ds").type == pa.date32(), engine


def test_folders_of_the_root_become_no_columns_without_partitioning(tmp_path: Path) -> None:
    root = str(tmp_path / "env=prod" / "ds=now")
    publish_night(settings_for(root))
    filesystem, paths = latest_arrow_files(root, "home")
    expected = plain_rows(read_latest(root, "home"))
    assert plain_rows(pq.read_table(paths, filesystem=filesystem, partitioning=None)) == expected
    assert plain_rows(pd.read_parquet(paths, filesystem=filesystem, partitioning=None)) == expected


def test_the_reader_of_the_readme_reads_what_ours_does(root: str) -> None:
    read = readme_reader()
    for settings in (settings_for(root), other_settings(root)):
        publish_night(settings)
        assert read(root, "home").equals(read_latest(root, "home"))
    assert read(root, "home", ds="2026-11-20", table="users").equals(read_latest(root, "home", table="users"))


def test_the_reader_of_the_readme_refuses_a_damaged_file(tmp_path: Path) -> None:
    publish_night(settings_for(str(tmp_path)))
    path = Path(latest_files(str(tmp_path), "home")[0])
    data = bytearray(path.read_bytes())
    data[60] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="SHA-256"):
        readme_reader()(str(tmp_path), "home")


@pytest.mark.parametrize("named_by", ["commit", "manifest"])
@pytest.mark.parametrize("climb", ["../../../", "2026-11-20/../../../../", "/", "./../../../"])
def test_no_reader_follows_a_forged_key_out_of_the_table(tmp_path: Path, named_by: str, climb: str) -> None:
    root, table = str(tmp_path / "root"), tmp_path / "root" / "candidates" / "home"
    publish_night(settings_for(root))
    stolen = Path(latest_files(root, "home")[0]).read_bytes()
    (tmp_path / "secret.parquet").write_bytes(stolen)
    key = f"{tmp_path}/secret.parquet" if climb == "/" else f"{climb}secret.parquet"
    forge(table, named_by, key, stolen)
    says = rf"names '{re.escape(key)}', which is not below the table"
    for read in (readme_reader(), read_latest, latest_files, latest_arrow_files):
        with pytest.raises(ValueError, match=says):
            read(root, "home")


def forge(table: Path, named_by: str, key: str, data: bytes) -> None:
    """Put `key` into the table's manifest or commit, with the right hashes, as one who may write to the root could."""
    (path,) = table.glob("_commits/*/*.json")
    commit = json.loads(path.read_text())
    if named_by == "commit":
        commit |= {"manifest": key, "manifest_sha256": hashlib.sha256(data).hexdigest()}
    else:
        manifest = json.loads((table / commit["manifest"]).read_text())
        manifest["files"][0] |= {"key": key, "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        forged = json.dumps(manifest).encode()
        commit |= {"manifest": "_manifests/forged.json", "manifest_sha256": hashlib.sha256(forged).hexdigest()}
        (table / "_manifests" / "forged.json").write_bytes(forged)
    path.write_text(json.dumps(commit))
