import json

import torch

from jobs import train
from pipeline.io import night as night_module
from pipeline.io.checkpoint import write_checkpoint
from pipeline.model.model import RetrievalModel
from pipeline.model.results import training_metrics
from tests.distributed.test_train import prepare
from tests.model.planted import NUM_ITEMS, SMALL_MODEL, report


def test_a_trained_model_is_told_and_not_trained_again(tmp_path, monkeypatch):
    """No Ray runs here: the artifact exists."""
    storage, night, settings = prepare(tmp_path)
    monkeypatch.setattr(night_module, "open_night", lambda settings, ds: (storage, night))
    torch.manual_seed(0)
    model = RetrievalModel(SMALL_MODEL, NUM_ITEMS)
    metrics = training_metrics([report(1, 0.3), report(2, 0.4)], popularity_hit_rate=0.1)
    write_checkpoint(storage, night.checkpoint, model, settings, metrics, {"histories": night.histories.id})
    outcome = train.run(settings, night.ds)
    assert json.loads(json.dumps(outcome)) == {
        "status": "trained",
        "checkpoint": night.checkpoint.id,
        "uri": f"{storage.uri}/{night.checkpoint.prefix}",
        "cutoff": 10,
        "best_epoch": 2,
        "validation_hit_rate": 0.4,
        "num_validation_users": 50,
        "positions_per_second": 500.0,
        "seconds": 4.0,
        "popularity_hit_rate": 0.1,
    }
