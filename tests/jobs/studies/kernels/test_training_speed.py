"""The study of a training step's speed, with few items and one round."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from jobs.studies.kernels import training_speed
from jobs.studies.kernels.straightforward import StraightforwardStep
from pipeline.data.batches import cut_windows, epoch_batches
from pipeline.data.lists import Lists
from pipeline.model.inputs import Events
from pipeline.model.model import RetrievalModel
from pipeline.native.loader import native_kernels
from pipeline.settings import ModelSettings, MolSettings, TrainSettings

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(native_kernels().functions is None, reason="no kernels for this CPU"),
]


def test_every_backend_and_every_part_of_a_step_is_reported(capsys, monkeypatch):
    monkeypatch.setattr(training_speed, "NUM_ITEMS", 300)
    training_speed.main([300], rounds=1)
    printed = capsys.readouterr().out
    for name in training_speed.BACKENDS:
        assert printed.count(f"  {name:15} ") == 2  # for 32 and for 64 pairs
    assert printed.count("  straightforward: ") == 2
    assert "300 items: a step takes" in printed


def test_the_straightforward_step_has_the_loss_that_ours_estimates():
    """Without dropout, with all items but few drawn often: both are near the full softmax over all items."""
    settings = TrainSettings(num_negatives=4_000, popular_negatives=0.0, head_weight=0.0)
    mol = MolSettings(
        num_query_components=2, num_item_components=2, component_dim=8, gate_dropout=0.0, item_dropout=0.0
    )
    torch.manual_seed(0)
    model = RetrievalModel(ModelSettings(dim=16, num_heads=2, dropout=0.0, mol=mol), 50)
    rows = [np.array([3, 7, 9]), np.array([11, 4])]
    windows = cut_windows(Lists.of(rows), np.arange(2), 8)
    batch = next(iter(epoch_batches(windows, 1, 0, 1, 0)))
    with torch.no_grad():
        found = StraightforwardStep(model, batch, settings).loss()
        queries = model.encode_positions(Events.of(batch.item_rows_BL, batch.columns, model.device))
        scores = model.mol(model.mol.query_side(queries), model.item_side(torch.arange(50)))
        targets = torch.from_numpy(batch.targets_BL).long()
        is_target = targets >= 0
        exact = F.cross_entropy(scores[is_target], targets[is_target])
    # The negatives are 4,000 draws of 50 items: the sum over them is 80 times the sum over all.
    assert found.item() == pytest.approx(exact.item() + math.log(80), abs=0.05)
