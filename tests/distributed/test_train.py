"""Training on Ray Train: two workers, one of which dies."""

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import apply_overrides
from pipeline.distributed import train
from pipeline.distributed.runner import RayRunner
from pipeline.io.checkpoint import load_model, read_metrics
from pipeline.io.night import name_night
from pipeline.io.storage import open_storage
from pipeline.model.training import TrainingState
from pipeline.settings import Settings
from pipeline.stages import train as stage
from tests.stages.test_train import prepared


def worker_that_dies_once(config: dict[str, Any]) -> None:
    """The real worker, but rank 1 is killed once, at its second state within the second epoch.

    Records [rank, finished epochs, whether it is within an epoch] at each start.
    """
    real_fit, root = stage.fit, Path(config["night"].storage.uri)

    def fit(state, data, settings, ranks, on_epoch, say, validate):
        with (root / "starts").open("a") as file:
            file.write(json.dumps([ranks.rank, len(state.history), state.progress.num_positions > 0]) + "\n")

        def report(state):
            if ranks.rank == 1 and second_epoch(state) == 6 and not (root / "killed").exists():
                wait_for_saved_state(root / "training", state.number - 1)
                (root / "killed").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            on_epoch(state)

        real_fit(state, data, settings, ranks, report, say, validate)

    stage.fit = fit
    real_worker(config)


def second_epoch(state: TrainingState) -> int:
    """The number of steps that are done of the second epoch; 0 outside it."""
    return state.step - state.history[0].step if len(state.history) == 1 else 0


def wait_for_saved_state(folder: Path, number: int) -> None:
    """Wait until Ray Train has registered the state with this number, which takes it a moment."""
    for _ in range(600):
        for path in folder.glob("*/checkpoint_manager_snapshot.json"):
            if re.search(rf'"number\W+{number}\b', path.read_text()):
                return
        time.sleep(0.1)
    raise TimeoutError(f"no state {number} in {folder} after a minute")


real_worker = train._train_worker


@pytest.mark.ray
def test_when_a_worker_is_killed_training_resumes_within_the_epoch(local_ray, tmp_path, monkeypatch):
    night, settings = prepared(tmp_path, ["train.steps_between_states=3"])
    monkeypatch.setattr(train, "_train_worker", worker_that_dies_once)
    runner = RayRunner(settings)
    stage.train_checkpoint(runner, night, settings)
    starts = sorted(json.loads(line) for line in (tmp_path / "starts").read_text().splitlines())
    assert starts == [[0, 0, False], [0, 1, True], [1, 0, False], [1, 1, True]], "both resumed in the second epoch"
    metrics = read_metrics(night.storage, night.checkpoint)
    assert [report.epoch for report in metrics.history] == [1, 2, 3]
    assert metrics.validation_hit_rate > 1.3 * metrics.popularity_hit_rate > 0
    assert not (tmp_path / "training" / night.checkpoint.id).exists()
    loaded = load_model(night.storage, night.checkpoint)
    assert all(torch.isfinite(value).all() for value in loaded.state_dict().values())
    assert stage.train_checkpoint(runner, night, settings).id == night.checkpoint.id  # it exists: nothing runs


@pytest.mark.ray
def test_with_more_epochs_all_workers_go_on_where_the_training_has_ended(local_ray, tmp_path, caplog):
    short, settings = prepared(tmp_path, ["train.max_epochs=1"])
    stage.train_checkpoint(RayRunner(settings), short, settings)
    longer = Settings.model_validate(apply_overrides(settings.model_dump(mode="json"), ["train.max_epochs=2"]))
    night = name_night(short.storage, longer, short.inputs)
    caplog.set_level("INFO")
    stage.train_checkpoint(RayRunner(longer), night, longer)
    first, second = (read_metrics(short.storage, each.checkpoint).history for each in (short, night))
    assert [report.epoch for report in second] == [1, 2]
    assert second[0] == first[0]
    assert "go on where a training that ended sooner stands: after epoch 1" in caplog.text


@pytest.mark.s3
def test_a_runs_state_lies_below_the_root_on_s3_too(s3_uri):
    storage = open_storage(s3_uri)
    filesystem, path = storage.arrow_path("training/a-run")
    with filesystem.open_output_stream(f"{path}/state.json") as file:
        file.write(b"[]")
    assert storage.read("training/a-run/state.json") == b"[]"
    filesystem.delete_dir(path)
    assert not [info for info in storage.list("training/") if info.size]
