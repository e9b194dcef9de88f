import json
from dataclasses import replace

import pytest
import torch

from pipeline.artifacts import Manifest
from pipeline.errors import InputError
from pipeline.io.artifacts import read_manifest, write_file
from pipeline.io.checkpoint import (
    load_model,
    load_state,
    read_history,
    read_metrics,
    read_weights,
    save_state,
    write_checkpoint,
)
from pipeline.io.night import Night
from pipeline.model.model import RetrievalModel
from pipeline.model.ranks import Ranks
from pipeline.model.results import training_metrics
from pipeline.model.training import fit
from pipeline.settings import Settings, TrainSettings
from tests.model.planted import NUM_ITEMS, SMALL_MODEL, report, start, training_data
from tests.stages.worlds import SMALL, night_of

SETTINGS = Settings.model_validate({**SMALL, "model": SMALL_MODEL})
METRICS = training_metrics([report(1, ndcg=0.25)], popularity_hit_rate=0.1, settings=SETTINGS.train)


@pytest.fixture
def night(tmp_path) -> Night:
    return night_of(SETTINGS.model_copy(update={"root": str(tmp_path / "root")}))


def make_model(seed: int = 0) -> RetrievalModel:
    torch.manual_seed(seed)
    return RetrievalModel(SMALL_MODEL, NUM_ITEMS)


def write(night: Night, model: RetrievalModel) -> Manifest:
    return write_checkpoint(night, model, SETTINGS, METRICS)


def test_a_model_comes_back_as_it_was(night):
    model = make_model()
    write(night, model)
    loaded = load_model(night.storage, night.checkpoint)
    assert not loaded.training
    assert loaded.settings == SMALL_MODEL
    for (name, left), right in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(left, right), name
    assert read_metrics(night.storage, night.checkpoint) == METRICS


def test_the_manifest_says_what_the_model_is_made_of(night):
    write(night, make_model())
    manifest = read_manifest(night.storage, night.checkpoint.prefix)
    assert manifest.lineage == {"histories": night.histories.id}
    assert manifest.counts["num_items"] == NUM_ITEMS
    assert manifest.settings["model"]["dim"] == SMALL_MODEL.dim
    keys = {
        info.key.removeprefix(f"{night.checkpoint.prefix}/") for info in night.storage.list(night.checkpoint.prefix)
    }
    assert keys == {entry.key for entry in manifest.files} | {"manifest.json"}


def test_what_an_interrupted_run_left_is_not_in_the_way(night):
    write(night, make_model(seed=1))
    night.storage.delete(night.checkpoint.key("manifest.json"))
    model = make_model(seed=2)
    write(night, model)
    loaded = load_model(night.storage, night.checkpoint)
    assert torch.equal(loaded.item_embedding.weight, model.item_embedding.weight)


def test_the_first_of_two_writers_wins(night):
    write(night, make_model(seed=1))
    write(night, make_model(seed=1))  # the same model again is fine
    first = read_manifest(night.storage, night.checkpoint.prefix)
    assert write(night, make_model(seed=2)) == first
    assert torch.equal(
        load_model(night.storage, night.checkpoint).item_embedding.weight, make_model(seed=1).item_embedding.weight
    )


def test_a_missing_model_names_the_job_that_makes_it(night):
    with pytest.raises(InputError, match=r"jobs/train\.py"):
        load_model(night.storage, night.checkpoint)


@pytest.mark.parametrize("name", ["model", "config"])
def test_damage_is_found_before_it_is_used(night, name):
    write(night, make_model())
    manifest = read_manifest(night.storage, night.checkpoint.prefix)
    key = next(f"{night.checkpoint.prefix}/{e.key}" for e in manifest.files if e.key.startswith(name))
    data = bytearray(night.storage.read(key))
    data[len(data) // 2] ^= 1
    night.storage.delete(key)
    night.storage.create(key, bytes(data))
    with pytest.raises(InputError, match="SHA-256"):
        load_model(night.storage, night.checkpoint)
    night.storage.delete(key)
    with pytest.raises(InputError, match="gone since it was written"):
        load_model(night.storage, night.checkpoint)


def test_no_file_is_a_pickle(night):
    write(night, make_model())
    for info in night.storage.list(night.checkpoint.prefix):
        data = night.storage.read(info.key)
        if info.key.endswith(".json"):
            json.loads(data)
        else:
            json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])  # the header of a safetensors file


def test_the_best_epoch_of_a_saved_run_need_not_be_its_last(tmp_path):
    settings = TrainSettings(max_epochs=1, num_negatives=16)
    state = start(settings)
    state.best_weights = {name: value + 1 for name, value in state.model.state_dict().items()}
    save_state(tmp_path, state)
    resumed = start(settings.model_copy(update={"seed": 5}))
    load_state(tmp_path, resumed)
    for weights in (resumed.best_weights, read_weights(tmp_path, "best")):
        assert weights.keys() == state.best_weights.keys()
        assert all(torch.equal(weights[name], value) for name, value in state.best_weights.items())
    assert all(torch.equal(value, state.model.state_dict()[name]) for name, value in resumed.model.state_dict().items())


@pytest.mark.parametrize("name", ["model", "config", "metrics"])
def test_a_file_of_another_content_is_no_model_of_ours(night, name):
    """Whole, as its manifest says, and still not what this version writes."""
    write(night, make_model())
    manifest = read_manifest(night.storage, night.checkpoint.prefix)
    strange = write_file(night.storage, night.checkpoint.prefix, f"{name}.json", b'{"strange": 1}', 1)
    files = [strange if entry.key.startswith(f"{name}-") else entry for entry in manifest.files]
    night.storage.delete(night.checkpoint.key("manifest.json"))
    changed = manifest.model_copy(update={"files": tuple(files)})
    night.storage.create(night.checkpoint.key("manifest.json"), changed.model_dump_json().encode())
    read, says = (
        (read_metrics, "not written by this version")
        if name == "metrics"
        else (load_model, "no model can be built from these files")
    )
    with pytest.raises(InputError, match=rf"{says}.*; remove the model and train again"):
        read(night.storage, night.checkpoint)


@pytest.mark.parametrize(("read", "name"), [(load_model, "config"), (load_model, "model"), (read_metrics, "metrics")])
def test_a_manifest_without_one_of_the_files_is_refused(night, read, name):
    manifest = write(night, make_model())
    others = tuple(entry for entry in manifest.files if not entry.key.startswith(f"{name}-"))
    night.storage.delete(night.checkpoint.key("manifest.json"))
    changed = manifest.model_copy(update={"files": others})
    night.storage.create(night.checkpoint.key("manifest.json"), changed.model_dump_json().encode())
    with pytest.raises(InputError, match=f"its manifest lists no file '{name}'; remove the model and train again"):
        read(night.storage, night.checkpoint)


def test_a_saved_training_run_goes_on_as_if_it_had_never_stopped(tmp_path):
    settings = TrainSettings(
        max_epochs=2, num_negatives=16, learning_rate=5e-3, weight_decay=0.01, steps_between_states=1
    )
    data = replace(training_data(settings, num_users=60), steps=3)
    whole = start(settings)
    fit(whole, data, settings, Ranks(), lambda state: save_state(tmp_path, state) if state.number == 4 else None)
    torch.manual_seed(99)
    resumed = start(settings.model_copy(update={"seed": 5}))
    load_state(tmp_path, resumed)
    assert [entry.epoch for entry in resumed.history] == [1]
    assert (resumed.number, resumed.step) == (4, 4), "in the second epoch"
    assert resumed.progress.num_positions > 0
    assert read_history(tmp_path) == resumed.history
    for name, value in read_weights(tmp_path, "best").items():
        assert torch.equal(value, resumed.best_weights[name])
    fit(resumed, data, settings, Ranks(), lambda state: None)
    for left, right in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(left, right)
    for left, right in zip(whole.average.parameters(), resumed.average.parameters(), strict=True):
        assert torch.equal(left, right)
    assert [entry.loss for entry in whole.history] == [entry.loss for entry in resumed.history]
