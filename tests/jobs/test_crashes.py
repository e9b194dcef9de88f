"""The whole night in this process, on a store that dies: wherever it does, a rerun publishes the same rows."""

from dataclasses import replace
from itertools import count, cycle
from pathlib import Path

import pyarrow as pa
import pytest

from jobs import (
    choose_memory,
    count_pairs,
    embed_items,
    evaluate,
    prepare,
    publish,
    retrieve,
    simulate_log,
    train,
    tune,
)
from pipeline.config import apply_overrides, validate
from pipeline.io.night import open_night
from pipeline.io.publication.commits import published
from pipeline.io.publication.reader import read_latest
from pipeline.io.storage import open_storage
from pipeline.io.storage.base import Storage
from pipeline.settings import Settings
from pipeline.stages.local import LocalRunner
from tests.jobs.crashing import Crash, CrashingStorage
from tests.jobs.nightly import TINY
from tests.quality.nights import fresh_memory

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = (prepare, count_pairs, train, choose_memory, embed_items, tune, evaluate, retrieve, publish)
SMALLER = {
    "cluster.mode": "local",
    "simulate.num_users": 40,
    "simulate.num_events": 1_500,
    "output.num_buckets": 2,
    "corpus.num_shards": 2,
    "corpus.low_rank.ranks": "[4]",
    "search.k": 5,
    "search.num_preselected": 20,
    "evaluate.cutoffs": "[5]",
    "gates.min_overlap": 0.0,
}


@pytest.fixture(params=["exact", "topk_low_rank"])
def settings(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """A night with its log on disk; everything else goes to the store that a test gives it. A wave holds one shard."""
    monkeypatch.setattr(LocalRunner, "num_fitting", lambda self, stages, beside: 1)
    keys = TINY | SMALLER | {"root": tmp_path, "search.method": request.param}
    made = validate(Settings, apply_overrides({}, [f"{key}={value}" for key, value in keys.items()]), "test")
    simulate_log.run(made, None)
    return made


def run_night(settings: Settings, storage: Storage) -> str:
    """Every step in order, as jobs/nightly_candidates.py runs them; returns the status of the last."""
    night = replace(open_night(settings), storage=storage)
    for step in STEPS:
        outcome = step.run(settings, night)
    return str(outcome["status"])


def is_dead(settings: Settings, storage: Storage, at: int, when: str) -> bool:
    """Run the night on a store that dies at operation `at`; False when the night was over before."""
    try:
        run_night(settings, CrashingStorage(storage, at, when))
    except Crash:
        return True
    return False


def rows_of(storage: Storage) -> pa.Table:
    return read_latest(storage.uri, "candidates")


def left_behind(storage: Storage) -> list[str]:
    """What should have been removed."""
    temporary = ("_scratch/", "_wave/", "training/")
    return [info.key for info in storage.list() if any(part in info.key for part in temporary)]


def fresh() -> Storage:
    return open_storage(fresh_memory())


def test_a_night_that_dies_again_and_again_a_little_later_publishes_the_same_rows(settings: Settings) -> None:
    whole, storage = fresh(), fresh()
    assert run_night(settings, whole) == "published"
    deaths = 0
    for at, when in zip(count(1, 2), cycle(("before", "after"))):
        if not is_dead(settings, storage, at, when):
            break
        deaths += 1
        head = published(storage, "candidates")
        assert head is None or rows_of(storage).equals(rows_of(whole))
    assert deaths > 20
    assert rows_of(storage).equals(rows_of(whole))
    assert len(storage.list("candidates/candidates/_commits/")) == 1
    assert left_behind(storage) == left_behind(whole) == []


@pytest.mark.parametrize("settings", ["exact"], indirect=True)
def test_a_night_that_dies_once_publishes_the_same_rows(settings: Settings) -> None:
    whole = CrashingStorage(fresh(), 0, "before")
    run_night(settings, whole)
    for share in (0.2, 0.5, 0.8):
        storage = fresh()
        assert is_dead(settings, storage, int(share * len(whole.operations)), "after")
        assert run_night(settings, storage) == "published"
        assert rows_of(storage).equals(rows_of(whole))
        assert left_behind(storage) == []
