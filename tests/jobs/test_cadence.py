"""Three nights in a row, in this process: one trains from scratch, one goes on, one takes over what was trained."""

import json
from datetime import date
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from jobs import nightly_candidates, simulate_log
from pipeline.io.publication.reader import read_latest
from tests.jobs.test_encoders import settings_of

pytestmark = pytest.mark.usefixtures("one_thread")
START = {"train.start_from": "previous"}
REUSE = START | {"train.every_days": 3}
NEW = [f"i{number:06d}" for number in range(0, 90, 9)]  # items that the catalogue has on the third day only


def run_night(root: Path, day: int, keys: dict[str, Any], catalogue: str) -> dict[str, Any]:
    others = {"items.uri": root / f"{catalogue}.parquet", "prepare.max_orphan_share": 0.5}
    return nightly_candidates.run(settings_of(root, keys | others), date(2026, 11, day))


def run_manifest(root: Path, day: int) -> dict[str, Any]:
    table = root / "candidates" / "candidates"
    commit = json.loads(max(table.glob(f"_commits/ds=2026-11-{day}/*.json")).read_text())
    return json.loads((table / commit["manifest"]).read_text())


def lineage_of(root: Path, model: str) -> dict[str, str]:
    return json.loads((root / "models" / model / "manifest.json").read_text())["lineage"]


def metrics_of(root: Path, model: str) -> dict[str, Any]:
    (file,) = (root / "models" / model).glob("metrics-*.json")
    return json.loads(file.read_text())


def test_a_night_goes_on_from_the_one_before_or_takes_it_over_and_says_so(tmp_path):
    simulate_log.run(settings_of(tmp_path, {}), None)
    (items,) = tmp_path.glob("simulated/*/items-*.parquet")
    catalogue = pl.read_parquet(items)
    catalogue.filter(~pl.col("item_id").is_in(NEW)).write_parquet(tmp_path / "old.parquet")
    catalogue.write_parquet(tmp_path / "whole.parquet")
    nights = ((18, START, "old"), (19, START, "old"), (20, REUSE, "whole"))
    outcomes = [run_night(tmp_path, *night) for night in nights]
    assert [outcome["status"] for outcome in outcomes] == ["published"] * 3
    scratch, started, reused = (run_manifest(tmp_path, day)["lineage"] for day in (18, 19, 20))

    assert not {"started_from", "carried_from", "selected_carried_from", "trained_on"} & scratch.keys()
    assert started["started_from"] == scratch["selected"] == lineage_of(tmp_path, started["selected"])["started_from"]
    assert metrics_of(tmp_path, started["selected"])["history"][0]["step"] == 0
    assert reused["carried_from"] == started["model"] == lineage_of(tmp_path, reused["model"])["carried_from"]
    assert reused["selected_carried_from"] == started["selected"]
    assert reused["trained_on"] == "2026-11-19"
    assert metrics_of(tmp_path, reused["model"])["num_unknown_items"] == len(NEW)
    num_new = pl.from_arrow(read_latest(str(tmp_path), "candidates")).filter(pl.col("item_id").is_in(NEW)).height
    assert num_new > 0, "counts speak for some of the items that the reused model does not know"

    # The earlier nights are not needed any more, and each night keeps its name.
    for manifest in (tmp_path / "models").glob("*/manifest.json"):
        manifest.unlink()
    again = [run_night(tmp_path, *night) for night in nights]
    assert [outcome["status"] for outcome in again] == ["already published"] * 3
    assert [outcome["run_id"] for outcome in again] == [outcome["run_id"] for outcome in outcomes]
