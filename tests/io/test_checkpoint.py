import json

import pytest
import torch

from pipeline.artifacts import Checkpoint
from pipeline.errors import ConflictError, InputError
from pipeline.io.artifacts import read_manifest
from pipeline.io.checkpoint import (
    load_model,
    load_state,
    read_best_weights,
    read_history,
    read_metrics,
    save_state,
    write_checkpoint,
)
from pipeline.io.storage import open_storage
from pipeline.io.storage.base import Storage
from pipeline.model.model import RetrievalModel
from pipeline.model.results import training_metrics
from pipeline.model.training import Ranks, fit
from pipeline.settings import Settings, TrainSettings
from tests.model.planted import NUM_ITEMS, SMALL_MODEL, report, start, training_data

CHECKPOINT = Checkpoint("0123456789abcdef")
SETTINGS = Settings(model=SMALL_MODEL)
METRICS = training_metrics([report(1, hit_rate=0.25)], popularity_hit_rate=0.1)


@pytest.fixture
def storage(tmp_path) -> Storage:
    return open_storage(str(tmp_path / "root"))


def make_model(seed: int = 0) -> RetrievalModel:
    torch.manual_seed(seed)
    return RetrievalModel(SMALL_MODEL, NUM_ITEMS)


def write(storage: Storage, model: RetrievalModel) -> None:
    write_checkpoint(storage, CHECKPOINT, model, SETTINGS, METRICS, {"histories": "fedc"})


def test_a_model_comes_back_as_it_was(storage):
    model = make_model()
    write(storage, model)
    loaded = load_model(storage, CHECKPOINT)
    assert not loaded.training
    assert loaded.settings == SMALL_MODEL
    for (name, left), right in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(left, right), name
    assert read_metrics(storage, CHECKPOINT) == METRICS


def test_the_manifest_says_what_the_model_is_made_of(storage):
    write(storage, make_model())
    manifest = read_manifest(storage, CHECKPOINT.prefix)
    assert manifest.lineage == {"histories": "fedc"}
    assert manifest.counts["num_items"] == NUM_ITEMS
    assert manifest.settings["model"]["dim"] == SMALL_MODEL.dim
    keys = {info.key.removeprefix(f"{CHECKPOINT.prefix}/") for info in storage.list(CHECKPOINT.prefix)}
    assert keys == {entry.key for entry in manifest.files} | {"manifest.json"}


def test_what_an_interrupted_run_left_is_not_in_the_way(storage):
    write(storage, make_model(seed=1))
    storage.delete(f"{CHECKPOINT.prefix}/manifest.json")
    model = make_model(seed=2)
    write(storage, model)
    loaded = load_model(storage, CHECKPOINT)
    assert torch.equal(loaded.item_embedding.weight, model.item_embedding.weight)


def test_the_first_of_two_writers_wins(storage):
    write(storage, make_model(seed=1))
    write(storage, make_model(seed=1))  # the same model again is fine
    with pytest.raises(ConflictError):
        write(storage, make_model(seed=2))
    assert torch.equal(load_model(storage, CHECKPOINT).item_embedding.weight, make_model(seed=1).item_embedding.weight)


def test_a_missing_model_names_the_job_that_makes_it(storage):
    with pytest.raises(InputError, match=r"jobs/train\.py"):
        load_model(storage, CHECKPOINT)


@pytest.mark.parametrize("name", ["model", "config"])
def test_damage_is_found_before_it_is_used(storage, name):
    write(storage, make_model())
    manifest = read_manifest(storage, CHECKPOINT.prefix)
    key = next(f"{CHECKPOINT.prefix}/{e.key}" for e in manifest.files if e.key.startswith(name))
    data = bytearray(storage.read(key))
    data[len(data) // 2] ^= 1
    storage.delete(key)
    storage.create(key, bytes(data))
    with pytest.raises(InputError, match="SHA-256"):
        load_model(storage, CHECKPOINT)
    storage.delete(key)
    with pytest.raises(InputError, match="is gone"):
        load_model(storage, CHECKPOINT)


def test_no_file_is_a_pickle(storage):
    write(storage, make_model())
    for info in storage.list(CHECKPOINT.prefix):
        data = storage.read(info.key)
        if info.key.endswith(".json"):
            json.loads(data)
        else:
            json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])  # the header of a safetensors file


def test_a_saved_training_run_goes_on_as_if_it_had_never_stopped(tmp_path):
    settings = TrainSettings(max_epochs=2, batch_size=32, num_negatives=16, learning_rate=5e-3, weight_decay=0.01)
    data = training_data(settings, num_users=60)
    whole = start(settings)
    fit(whole, data, settings, Ranks(), lambda state: save_state(tmp_path, state) if len(state.history) == 1 else None)
    torch.manual_seed(99)
    resumed = start(settings.model_copy(update={"seed": 5}))
    load_state(tmp_path, resumed)
    assert [entry.epoch for entry in resumed.history] == [1]
    assert read_history(tmp_path) == resumed.history
    for name, value in read_best_weights(tmp_path).items():
        assert torch.equal(value, resumed.best_weights[name])
    fit(resumed, data, settings, Ranks(), lambda state: None)
    for left, right in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(left, right)
    assert [entry.loss for entry in whole.history] == [entry.loss for entry in resumed.history]
