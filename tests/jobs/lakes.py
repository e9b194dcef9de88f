"""Small logs with a catalogue and a queries table, on disk; and whole nights in this process, which start at once."""

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl

from jobs import choose_memory, count_pairs, embed_items, evaluate, prepare, publish, retrieve, train, tune
from pipeline.config import load_config
from pipeline.io.night import Night, open_night
from pipeline.settings import Settings
from tests.jobs.nightly import TINY

STEPS = (prepare, count_pairs, train, choose_memory, embed_items, tune, evaluate, retrieve, publish)
LAST_DAY = datetime(2026, 11, 20, 12, tzinfo=UTC)


def write_lake(folder: Path, items: list[dict[str, Any]], num_users: int, num_new: int, num_steps: int) -> None:
    """Users who look at every fifth item, once a day; after them new ones, who are in the queries table alone."""
    events = [
        {
            "user_id": f"u{user:02d}",
            "item_id": items[(user + 5 * step) % len(items)]["item_id"],
            "event_ts": LAST_DAY - timedelta(days=num_steps - 1 - step, minutes=user),
        }
        for user in range(num_users)
        for step in range(num_steps)
    ]
    queries = [{"user_id": f"u{user:02d}"} for user in range(num_users + num_new)]
    for name, rows in (("log", events), ("items", items), ("queries", queries)):
        pl.DataFrame(rows).write_parquet(folder / f"{name}.parquet")


def tables_of(lake: Path) -> dict[str, object]:
    """The settings that name its tables."""
    tables: dict[str, object] = {f"{name}.uri": lake / f"{name}.parquet" for name in ("log", "items", "queries")}
    return tables | {"log.source": "default"}


def opened(root: Path, **keys: object) -> tuple[Settings, Night]:
    """The settings and the night of `jobs/nightly_candidates.py` with these keys."""
    overrides = [f"{key}={value}" for key, value in (TINY | {"root": root} | keys).items()]
    settings = load_config(Settings, Path("conf/nightly.yaml"), overrides)
    return settings, open_night(settings)


def run_here(root: Path, **keys: object) -> None:
    """Run every step of this night, as `jobs/nightly_candidates.py` does, in this process."""
    settings, night = opened(root, **keys)
    for step in STEPS:
        step.run(settings, night)
