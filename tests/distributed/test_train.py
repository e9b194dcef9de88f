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


def worker_that_dies(config: dict[str, Any]) -> None:
    """The real worker, but rank 1 is killed twice: at its second state within the second epoch of the selection, and
    within the second epoch of the first refit.

    Records [rank, epochs of the training, finished epochs, whether it is within an epoch] at each start.
    """
    real_fit, root = stage.fit, Path(config["night"].storage.uri)

    def fit(state, data, settings, ranks, on_epoch, say, validate):
        epochs = settings.max_epochs
        with (root / "starts").open("a") as file:
            start = [ranks.rank, epochs, len(state.history), state.progress.num_positions > 0]
            file.write(json.dumps(start) + "\n")

        def report(state):
            killed = root / f"killed-{epochs}"
            if ranks.rank == 1 and second_epoch(state) == 6 and not killed.exists():
                wait_for_saved_state(root / "training", state.number - 1)
                killed.touch()
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
def test_when_a_worker_is_killed_the_model_under_way_resumes_within_the_epoch(local_ray, tmp_path, monkeypatch):
    """One run of Ray Train makes all three models: the selection in three epochs, each refit in two."""
    night, settings = prepared(tmp_path, ["train.steps_between_states=3", "train.refit=0.67"])
    monkeypatch.setattr(train, "_train_worker", worker_that_dies)
    runner = RayRunner(settings)
    stage.train_checkpoint(runner, night, settings)
    starts = [json.loads(line) for line in (tmp_path / "starts").read_text().splitlines()]
    for rank in (0, 1):
        selection, refits = [3, 0, False], [2, 0, False]
        mine = [start for number, *start in starts if number == rank]
        assert mine == [selection, [3, 1, True], refits, [2, 1, True], refits], "both ranks resumed where they were"
    assert not night.storage.list("training/")
    metrics = read_metrics(night.storage, night.checkpoint)
    assert [report.epoch for report in metrics.history] == [1, 2, 3]
    assert metrics.validation_hit_rate > 1.3 * metrics.popularity_hit_rate > 0
    assert metrics.is_refit_served
    assert metrics.refit_epochs == 2
    for model in (night.selected, night.measured, night.checkpoint):
        loaded = load_model(night.storage, model)
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
