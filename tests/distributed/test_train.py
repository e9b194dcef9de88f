"""Training on Ray Train: two workers, one of which dies."""

import json
import os
import signal
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.artifacts import Manifest, Night, name_night
from pipeline.config import apply_overrides
from pipeline.distributed import train
from pipeline.errors import InputError
from pipeline.io.artifacts import now, write_manifest
from pipeline.io.checkpoint import load_model, read_metrics
from pipeline.io.parquet import write_parquet_bytes
from pipeline.io.storage import open_storage
from pipeline.io.storage.base import Storage, put
from pipeline.model.training import Ranks
from pipeline.schema import items as items_schema
from pipeline.settings import Settings
from tests.distributed.worlds import write_histories
from tests.model.planted import NUM_ITEMS, SMALL_MODEL, histories

PLAIN: dict[str, Any] = {
    "log": {"uri": "unused", "source": "default"},
    "model": SMALL_MODEL.model_dump(mode="json"),
    "train": {
        "num_workers": 2,
        "max_epochs": 3,
        "batch_size": 16,
        "num_negatives": 16,
        "positions_per_negatives": 32,
        "learning_rate": 5e-3,
    },
    "output": {"num_buckets": 5},
}
NUM_USERS = 200


def prepare(root: Path, overrides: list[str] | None = None, rows: list[np.ndarray] | None = None):
    """The store with prepared histories, tonight's names, and the settings."""
    settings = Settings.model_validate(apply_overrides(PLAIN | {"root": str(root)}, overrides or []))
    storage = open_storage(settings.root)
    night = name_night(settings, date(2026, 11, 20), [], {})
    rows = histories(NUM_USERS) if rows is None else rows
    write_histories(storage, night, settings.output.num_buckets, {f"u{u:04d}": row for u, row in enumerate(rows)})
    counts = np.bincount(np.concatenate([row[:-2] for row in rows]).astype(np.int64), minlength=NUM_ITEMS)
    columns = [pa.array([f"i{row:03d}" for row in range(NUM_ITEMS)]), *[pa.array(counts)] * 3]
    items = pa.Table.from_arrays(columns, schema=items_schema(pa.string()))
    put(storage, night.histories.items_key, write_parquet_bytes(items))
    manifest = Manifest(
        kind="histories", id=night.histories.id, lineage={}, settings={}, files=(), created_at=now(), versions={}
    )
    write_manifest(storage, night.histories.prefix, manifest)
    return storage, night, settings


def read_whole(storage: Storage, night: Night, settings: Settings, world_size: int, monkeypatch):
    """What each of `world_size` ranks reads, in one process: counts are exchanged by running all ranks twice."""
    sent: list[list[int]] = []

    def gather(count: int, ranks: Ranks, device: torch.device) -> list[int]:
        sent.append([ranks.rank, count])
        return [count] * ranks.world_size

    monkeypatch.setattr(train, "_by_rank", gather)
    cpu = torch.device("cpu")
    return [
        train.read_training_data(storage, night.histories, settings, Ranks(rank, world_size), cpu)
        for rank in range(world_size)
    ]


def test_ranks_read_disjoint_buckets_that_make_up_the_whole(tmp_path, monkeypatch):
    storage, night, settings = prepare(tmp_path)
    (whole,) = read_whole(storage, night, settings, 1, monkeypatch)
    parts = read_whole(storage, night, settings, 3, monkeypatch)
    keys = [set(part.windows.user_keys.tolist()) for part in parts]
    assert not keys[0] & keys[1] | keys[0] & keys[2] | keys[1] & keys[2]
    assert set.union(*keys) == set(whole.windows.user_keys.tolist())
    assert sum(part.windows.num_targets for part in parts) == whole.windows.num_targets
    assert sum(len(part.validation) for part in parts) == len(whole.validation) > 0.9 * NUM_USERS * 0.8
    assert all(torch.equal(part.item_counts_N, whole.item_counts_N) for part in parts)


def test_a_log_without_sequences_is_refused(tmp_path):
    storage, night, settings = prepare(tmp_path, rows=[np.array([1, 2, 3]), np.array([4])])
    with pytest.raises(InputError, match="no user has two events"):
        train.read_training_data(storage, night.histories, settings, Ranks(), torch.device("cpu"))


def test_training_needs_prepared_histories(tmp_path):
    settings = Settings.model_validate(PLAIN | {"root": str(tmp_path)})
    night = name_night(settings, date(2026, 11, 20), [], {})
    with pytest.raises(InputError, match=r"jobs/prepare\.py"):
        train.train_checkpoint(open_storage(settings.root), night, settings)


def worker_that_dies_once(config: dict[str, Any]) -> None:
    """The worker as it is, but rank 1 is killed once, in its second epoch; writes down where each worker starts."""
    real_fit, root = train.fit, Path(config["root"])

    def fit(state, data, settings, ranks, on_epoch):
        with (root / "starts").open("a") as file:
            file.write(json.dumps([ranks.rank, len(state.history)]) + "\n")

        def report(state):
            if ranks.rank == 1 and len(state.history) == 2 and not (root / "killed").exists():
                wait_for_saved_state(root / "training")
                (root / "killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            on_epoch(state)

        real_fit(state, data, settings, ranks, report)

    train.fit = fit
    real_worker(config)


def wait_for_saved_state(folder: Path) -> None:
    """Ray Train counts a reported checkpoint when it next looks, which is not at once."""
    for _ in range(600):
        if any("checkpoint_" in path.read_text() for path in folder.glob("*/checkpoint_manager_snapshot.json")):
            return
        time.sleep(0.1)
    raise TimeoutError(f"no checkpoint in {folder} after a minute")


real_worker = train._train_worker


@pytest.mark.ray
def test_when_a_worker_is_killed_training_goes_on_from_the_last_epoch(local_ray, tmp_path, monkeypatch):
    storage, night, settings = prepare(tmp_path)
    monkeypatch.setattr(train, "_train_worker", worker_that_dies_once)
    train.train_checkpoint(storage, night, settings)
    starts = sorted(json.loads(line) for line in (tmp_path / "starts").read_text().splitlines())
    assert starts == [[0, 0], [0, 1], [1, 0], [1, 1]], "both went on after the first epoch"
    metrics = read_metrics(storage, night.checkpoint)
    assert [report.epoch for report in metrics.history] == [1, 2, 3]
    assert metrics.validation_hit_rate > 1.3 * metrics.popularity_hit_rate > 0
    assert not (tmp_path / "training" / night.checkpoint.id).exists()
    loaded = load_model(storage, night.checkpoint)
    assert all(torch.isfinite(value).all() for value in loaded.state_dict().values())
    assert train.train_checkpoint(storage, night, settings).id == night.checkpoint.id  # it exists: nothing runs


@pytest.mark.s3
def test_a_runs_state_lies_below_the_root_on_s3_too_and_is_removed(s3_uri):
    settings = Settings.model_validate(PLAIN | {"root": s3_uri})
    storage, night = open_storage(s3_uri), name_night(settings, date(2026, 11, 20), [], {})
    filesystem, path = train._place(storage, f"training/{night.checkpoint.id}")
    with filesystem.open_output_stream(f"{path}/state.json") as file:
        file.write(b"[]")
    assert storage.read(f"training/{night.checkpoint.id}/state.json") == b"[]"
    train._remove_run(storage, night)
    assert not [info for info in storage.list("training/") if info.size]
