"""The choice of the backend that trains the pair network, and whole trainings on each."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from pipeline.data.batches import epoch_batches
from pipeline.errors import InputError
from pipeline.io.checkpoint import read_metrics
from pipeline.model import backends
from pipeline.model.backends import training_backend
from pipeline.model.mol import MixtureOfLogits
from pipeline.model.negatives import Negatives
from pipeline.model.ranks import Ranks
from pipeline.model.step import accumulate_gradients
from pipeline.model.training import fit
from pipeline.native.backend import Backend
from pipeline.native.loader import Kernels, native_kernels
from pipeline.settings import MolSettings, TrainSettings
from pipeline.stages.local import LocalRunner
from pipeline.stages.train import train_checkpoint
from tests.model.planted import SMALL_MODEL, SMALL_MOL, start, training_data
from tests.stages.test_train import prepared

needs_kernels = pytest.mark.skipif(native_kernels().functions is None, reason="no kernels for this CPU")
SETTINGS = TrainSettings(
    max_epochs=3,
    batch_positions=240,
    num_negatives=16,
    positions_per_negatives=64,
    learning_rate=5e-3,
    warmup_steps=5,
)
# Gates that differ: where one pair has most of the gate, the gates' gradients are small beside bfloat16's rounding.
SURE_MOL = SMALL_MOL.model_copy(update={"gate_dropout": 0.0, "item_dropout": 0.0, "first_pair_share": 0.0})
SURE_MODEL = SMALL_MODEL.model_copy(update={"dropout": 0.0, "mol": SURE_MOL})


def chosen(backend: str, mol: nn.Module | None = None) -> Backend:
    return training_backend(mol or MixtureOfLogits(4, SMALL_MOL), TrainSettings(backend=backend))


@needs_kernels
def test_auto_takes_the_kernels_and_says_where_they_are():
    kernels = native_kernels()
    assert chosen("auto") == chosen("native") == Backend(f"native {kernels.instruction_set}", origin=kernels.origin)
    assert chosen("torch") == Backend("torch")


def test_without_kernels_auto_says_why_and_native_is_refused(monkeypatch):
    monkeypatch.setattr(backends, "native_kernels", lambda: Kernels(None, reason="no kernels: no C++ compiler"))
    assert chosen("auto") == Backend("torch", "no kernels: no C++ compiler")
    with pytest.raises(InputError, match=r"backend=native: no kernels: no C\+\+ compiler; set train.backend=auto"):
        chosen("native")


@pytest.mark.parametrize(
    ("mol", "says"),
    [
        (
            MixtureOfLogits(4, MolSettings(cross_dropout=0.1)),
            r"no dropout of logits \(model.mol.cross_dropout is 0.1\)",
        ),
        (MixtureOfLogits(4, SMALL_MOL).double(), "its parameters are torch.float64, not float32"),
        (nn.Linear(2, 2), "the kernels train Mixture-of-Logits, not Linear"),
    ],
)
def test_a_model_that_the_kernels_cannot_train_is_trained_by_pytorch_or_refused(mol, says):
    assert chosen("auto", mol).name == "torch"
    with pytest.raises(InputError, match=f"train.backend=native: .*{says}; set train.backend=auto"):
        chosen("native", mol)


def test_on_a_gpu_auto_is_pytorch():
    elsewhere = MixtureOfLogits(4, SMALL_MOL).to("meta")  # neither is a CPU
    assert chosen("auto", elsewhere) == chosen("torch", elsewhere) == Backend("torch")
    with pytest.raises(InputError, match=r"train\.use_gpu"):
        chosen("native", elsewhere)


@needs_kernels
@pytest.mark.parametrize("positions_per_negatives", [1, 5, 1000])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_step_has_about_the_same_gradients_on_both_backends(positions_per_negatives, precision):
    settings = SETTINGS.model_copy(
        update={"positions_per_negatives": positions_per_negatives, "precision": precision, "backend": "native"}
    )
    data = training_data(settings, num_users=20)
    batch = next(epoch_batches(data.windows, 2, seed=0, epoch=1, rank=0))
    model = start(settings, SURE_MODEL).model.train()
    expected = copy.deepcopy(model)
    losses = []
    for each, backend in ((model, "native"), (expected, "torch")):
        torch.manual_seed(9)
        sampler = Negatives.of(data.item_counts_N, settings)
        both = settings.model_copy(update={"backend": backend})
        losses.append(accumulate_gradients(each, batch, sampler, both).loss)
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=0.01)
    for (name, left), right in zip(model.named_parameters(), expected.parameters(), strict=True):
        off = float((left.grad - right.grad).norm() / right.grad.norm())
        assert off < (0.02 if precision == "float32" else 0.1), name


@needs_kernels
@pytest.mark.parametrize("seed", [0, 1])
def test_a_training_learns_as_much_on_both_backends(seed):
    """Without dropout, from the same weights and with the same negatives; small differences grow with every step."""
    losses = {}
    for backend in ("native", "torch"):
        settings = SETTINGS.model_copy(
            update={"backend": backend, "seed": seed, "max_epochs": 2, "learning_rate": 2e-3}
        )
        state = start(settings, SURE_MODEL)
        fit(state, training_data(settings), settings, Ranks(), lambda state: None)
        losses[backend] = [report.loss for report in state.history]
        assert losses[backend][1] < 0.6 * losses[backend][0]
    assert losses["native"] == pytest.approx(losses["torch"], rel=0.1)


@needs_kernels
def test_a_checkpoint_says_which_backend_trained_it_and_its_id_which_was_asked_for(tmp_path: Path, caplog):
    caplog.set_level("INFO", logger="nightrails")
    few = ["train.num_workers=1", "train.max_epochs=1", "cluster.mode=local"]
    ids = set()
    for backend in ("auto", "torch"):
        night, settings = prepared(tmp_path / backend, [*few, f"train.backend={backend}"])
        train_checkpoint(LocalRunner(settings), night, settings)
        used = f"native {native_kernels().instruction_set}" if backend == "auto" else "torch"
        metrics = read_metrics(night.storage, night.checkpoint)
        assert metrics.backend == metrics.history[0].backend == used
        assert f"the pair network trains with {used}" in caplog.text
        ids.add(night.checkpoint.id)
    assert len(ids) == 2
