"""Small logs in files, for the tests of reading them."""

from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.settings import LogSettings, Settings

NOON = datetime(2026, 11, 20, 12, tzinfo=UTC)


def events(number: int = 4, **columns: pa.Array) -> pa.Table:
    """Events of users u0, u1, … on items i0 and i1, a second apart; `columns` replace or add some."""
    seconds = pa.array([int(NOON.timestamp()) * 1_000_000 + i * 1_000_000 for i in range(number)])
    given = {
        "user_id": pa.array([f"u{i}" for i in range(number)]),
        "item_id": pa.array([f"i{i % 2}" for i in range(number)]),
        "event_ts": seconds.cast(pa.timestamp("us", tz="UTC")),
    }
    return pa.table(given | columns)


def write(path: Path, table: pa.Table, **options: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **options)
    return path


def settings_for(root: Path, uri: Path | str, source: str = "default", **sections: dict) -> Settings:
    log = LogSettings(uri=str(uri), source=source)
    return Settings.model_validate({"root": str(root), "log": log, **sections})
