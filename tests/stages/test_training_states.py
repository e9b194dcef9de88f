"""A training that ends later goes on where another one has ended, to the weights that it would have without it."""

from pathlib import Path

import pytest
import torch

from pipeline.config import apply_overrides
from pipeline.errors import InfrastructureError
from pipeline.io.checkpoint import load_model, read_metrics
from pipeline.io.night import Night, name_night
from pipeline.settings import Settings
from pipeline.stages import train
from pipeline.stages.local import LocalRunner
from pipeline.stages.training_states import ENDED, fetch_ended, keep_ended
from tests.stages.test_train import prepared

ALONE = ["train.num_workers=1", "train.refit=0"]


def trained(root: Path, *overrides: str, before: Night | None = None) -> tuple[Night, Settings]:
    """A night whose model is trained; `before` is another one of the same histories."""
    if before is None:
        night, settings = prepared(root, [*ALONE, *overrides])
    else:
        keys = prepared(root / "unused", [*ALONE, *overrides])[1].model_dump(mode="json")
        settings = Settings.model_validate(apply_overrides(keys, [f"root={root}"]))
        night = name_night(before.storage, settings, before.inputs)
    train.train_checkpoint(LocalRunner(settings), night, settings)
    return night, settings


def assert_same_model(night: Night, other: Night) -> None:
    weights, expected = (load_model(each.storage, each.checkpoint).state_dict() for each in (night, other))
    assert all(torch.equal(weights[name], value) for name, value in expected.items())
    ndcgs = [[report.ndcg for report in read_metrics(each.storage, each.checkpoint).history] for each in (night, other)]
    assert ndcgs[0] == ndcgs[1]


@pytest.fixture
def steps(monkeypatch) -> list[int]:
    """The steps that trainings make, in turn."""
    made: list[int] = []
    real = train.fit

    def fit(state, data, settings, *others):
        first = state.step
        real(state, data, settings, *others)
        made.append(state.step - first)

    monkeypatch.setattr(train, "fit", fit)
    return made


def test_with_more_epochs_a_training_goes_on_to_the_same_weights(tmp_path, steps, caplog):
    whole, _ = trained(tmp_path / "whole", "train.max_epochs=5")
    short, _ = trained(tmp_path / "parts", "train.max_epochs=2")
    caplog.set_level("INFO")
    longer, _ = trained(tmp_path / "parts", "train.max_epochs=5", before=short)
    assert longer.training == short.training
    assert longer.checkpoint != short.checkpoint
    assert_same_model(longer, whole)
    assert steps[1] + steps[2] == steps[0]
    assert steps[2] < steps[0]
    assert "go on where a training that ended sooner stands: after epoch 2" in caplog.text
    assert len(longer.storage.list(ENDED)) == 3, "nothing is left of the shorter one"


def test_a_training_that_would_have_ended_there_too_makes_no_step_and_leaves_its_model(tmp_path, steps):
    short, _ = trained(tmp_path, "train.max_epochs=40", "train.patience=1", "train.learning_rate=1e-30")
    longer, _ = trained(tmp_path, "train.max_epochs=50", "train.patience=1", "train.learning_rate=1e-30", before=short)
    assert steps[1] == 0
    assert longer.checkpoint != short.checkpoint
    assert_same_model(longer, short)


def test_a_training_that_ends_sooner_begins_anew(tmp_path, steps):
    alone, _ = trained(tmp_path / "alone", "train.max_epochs=1")
    long, _ = trained(tmp_path / "both", "train.max_epochs=3")
    shorter, _ = trained(tmp_path / "both", "train.max_epochs=1", before=long)
    assert steps == [steps[0], 3 * steps[0], steps[0]]
    assert_same_model(shorter, alone)


def test_another_training_begins_anew_and_its_state_takes_the_place(tmp_path, steps):
    first, _ = trained(tmp_path, "train.max_epochs=1")
    other, settings = trained(tmp_path, "train.max_epochs=2", "train.learning_rate=1e-3", before=first)
    assert steps[1] == 2 * steps[0]
    assert all(info.key.startswith(f"{other.training.prefix}/") for info in other.storage.list(ENDED))
    assert fetch_ended(other, settings.train, tmp_path)
    assert not fetch_ended(first, settings.train, tmp_path)


def test_a_damaged_state_is_no_start(tmp_path, steps, caplog):
    short, settings = trained(tmp_path, "train.max_epochs=1")
    (tensors,) = [info for info in short.storage.list(ENDED) if "tensors" in info.key]
    short.storage.delete(tensors.key)
    short.storage.create(tensors.key, b"x" * tensors.size)
    caplog.set_level("INFO")
    trained(tmp_path, "train.max_epochs=2", before=short)
    assert steps[1] == 2 * steps[0]
    assert "the training begins anew, not where an earlier one has ended: " in caplog.text
    assert fetch_ended(short, settings.train.model_copy(update={"max_epochs": 2}), tmp_path), "the new one is whole"


def test_a_refit_leaves_the_state_of_the_selection(tmp_path, steps):
    night, settings = trained(tmp_path, "train.max_epochs=2", "train.refit=0.5")
    assert len(steps) == 3  # the selection and two refits
    longer = settings.train.model_copy(update={"max_epochs": 3})
    assert fetch_ended(night, longer, tmp_path)
    keep_ended(night, tmp_path)
    assert fetch_ended(night, longer, tmp_path)


def test_ranks_that_find_another_state_than_the_others_do_not_begin(tmp_path, monkeypatch):
    night, settings = trained(tmp_path, "train.max_epochs=1")

    class WithAnother(train.Ranks):
        def sum_(self, values: torch.Tensor) -> torch.Tensor:
            assert values.device.type == "meta", "the ranks of GPUs add up what lies on these"
            return torch.tensor([1])  # the other rank has found none

    longer = settings.train.model_copy(update={"max_epochs": 2})
    with pytest.raises(InfrastructureError, match="the state to go on from was replaced meanwhile; run the same"):
        train._fetch_ended_everywhere(night, longer, WithAnother(0, 2), tmp_path, torch.device("meta"))
