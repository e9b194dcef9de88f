import json

import torch

from jobs import train
from pipeline.io.checkpoint import write_checkpoint
from pipeline.model.model import RetrievalModel
from pipeline.model.results import training_metrics
from tests.model.planted import NUM_ITEMS, SMALL_MODEL, report
from tests.stages.test_train import prepared


def test_a_trained_model_is_reported_and_not_trained_again(tmp_path):
    """No runner is opened, because the artifact exists. The states that a crash at the very end left are removed."""
    night, settings = prepared(tmp_path)
    for kept in (f"{night.checkpoint.id}-local/epoch-00001.json", f"{night.checkpoint.id}/checkpoint_1/state", "other"):
        night.storage.create(f"training/{kept}", b"{}")
    torch.manual_seed(0)
    model = RetrievalModel(SMALL_MODEL, NUM_ITEMS)
    metrics = training_metrics([report(1, 0.15), report(2, 0.2)], popularity_hit_rate=0.1, settings=settings.train)
    write_checkpoint(night, model, settings, metrics)
    assert json.loads(json.dumps(train.run(settings, night))) == {
        "status": "exists",
        "checkpoint": night.checkpoint.id,
        "uri": f"{night.storage.uri}/{night.checkpoint.prefix}",
        "cutoff": 10,
        "best_epoch": 2,
        "validation_hit_rate": 0.4,
        "validation_ndcg": 0.2,
        "num_validation_users": 50,
        "positions_per_second": 500.0,
        "seconds": 4.0,
        "ended_by": None,
        "refit_epochs": 0.0,
        "refit_loss": None,
        "refit_ndcg": None,
        "is_refit_served": False,
        "num_unknown_items": 0,
        "popularity_hit_rate": 0.1,
        "backend": "torch",
    }
    assert [info.key for info in night.storage.list("training/")] == ["training/other"]
