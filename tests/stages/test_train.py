"""Training: the data of each rank, and a training in this process that is killed and resumes."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.config import apply_overrides
from pipeline.data.columns import DAY_US
from pipeline.data.histories import Bucket
from pipeline.data.lists import Lists
from pipeline.data.seen import IN_ALL_PARTS
from pipeline.errors import InfrastructureError, InputError
from pipeline.io.artifacts import read_file, require_manifest, seal
from pipeline.io.checkpoint import load_model, read_metrics
from pipeline.io.histories import write_items
from pipeline.io.night import Night
from pipeline.io.storage.base import Storage
from pipeline.io.storage.local import LocalStorage
from pipeline.model.ranks import Ranks
from pipeline.model.validation import RankingSums
from pipeline.native.backend import Backend
from pipeline.retrieval import backends
from pipeline.retrieval.backends import describe_backend
from pipeline.settings import ModelSettings, SearchSettings, Settings, TrainSettings
from pipeline.stages import local, local_training, train, training_data, training_states
from pipeline.stages.local import LocalRunner
from pipeline.stages.training_states import saved_states
from pipeline.stages.validation import rank_by_search
from tests.item_index import item_index
from tests.model.planted import NUM_ITEMS, SMALL_MODEL, histories
from tests.stages.worlds import night_of, write_histories

PLAIN: dict[str, Any] = {
    "log": {"uri": "unused", "source": "default"},
    "model": SMALL_MODEL.model_dump(mode="json"),
    "train": {
        "num_workers": 2,
        "refit": 0,
        "max_epochs": 3,
        "batch_positions": 120,
        "num_negatives": 16,
        "positions_per_negatives": 32,
        "learning_rate": 5e-3,
        "warmup_steps": 5,
    },
    "output": {"num_buckets": 5},
}
NUM_USERS = 200


def prepared(root: Path | str, overrides: list[str] | None = None, rows: list[np.ndarray] | None = None):
    """A night with prepared histories, and its settings."""
    settings = Settings.model_validate(apply_overrides(PLAIN | {"root": str(root)}, overrides or []))
    night = night_of(settings)
    rows = histories(NUM_USERS) if rows is None else rows
    write_histories(night, settings.output.num_buckets, {f"u{u:04d}": row for u, row in enumerate(rows)})
    counts = np.bincount(np.concatenate([row[:-2] for row in rows]).astype(np.int64), minlength=NUM_ITEMS)
    ids = pa.array([f"i{row:03d}" for row in range(NUM_ITEMS)])
    write_items(night.storage, night.histories, item_index(ids, counts))
    seal(night.storage, night.histories, kind="histories", lineage={}, settings={}, files=(), counts={})
    return night, settings


def read_whole(night: Night, settings: Settings, world_size: int, monkeypatch):
    """The data of `world_size` ranks, read in one process: each rank takes its own count as the count of all ranks."""

    def gather(count: int, ranks: Ranks, device: torch.device) -> list[int]:
        return [count] * ranks.world_size

    monkeypatch.setattr(training_data, "counts_by_rank", gather)
    cpu = torch.device("cpu")
    return [
        training_data.read_training_data(night, settings, Ranks(rank, world_size), cpu) for rank in range(world_size)
    ]


def test_ranks_read_disjoint_buckets_that_make_up_the_whole(tmp_path, monkeypatch):
    night, settings = prepared(tmp_path)
    (whole,) = read_whole(night, settings, 1, monkeypatch)
    parts = read_whole(night, settings, 3, monkeypatch)
    keys = [set(part.windows.user_keys.tolist()) for part in parts]
    assert sum(map(len, keys)) == len(set.union(*keys))
    assert set.union(*keys) == set(whole.windows.user_keys.tolist())
    assert sum(part.windows.num_targets for part in parts) == whole.windows.num_targets
    assert sum(len(part.validation) for part in parts) == len(whole.validation) > 0.9 * NUM_USERS * 0.8
    assert all(torch.equal(part.item_counts_N, whole.item_counts_N) for part in parts)


class OneOfThree(Ranks):
    """Rank 1; the two others have counted seven and nine."""

    def sum_(self, values: torch.Tensor) -> torch.Tensor:
        return values + torch.tensor([7, 0, 9])


def test_every_rank_learns_the_count_of_each():
    assert training_data.counts_by_rank(5, OneOfThree(1, 3), torch.device("cpu")) == [7, 5, 9]
    assert training_data.counts_by_rank(5, Ranks(), torch.device("cpu")) == [5]


def test_a_log_without_sequences_is_refused(tmp_path):
    night, settings = prepared(tmp_path, rows=[np.array([1, 2, 3]), np.array([4])])
    with pytest.raises(InputError, match="no user has two events"):
        training_data.read_training_data(night, settings, Ranks(), torch.device("cpu"))


def test_training_needs_prepared_histories(tmp_path):
    settings = Settings.model_validate(PLAIN | {"root": str(tmp_path)})
    with pytest.raises(InputError, match=r"jobs/prepare\.py"):
        train.train_checkpoint(LocalRunner(settings), night_of(settings), settings)


def test_a_local_training_that_was_killed_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    """Killed before the state of its third epoch is saved, and again between the last epoch and the artifact."""
    whole, settings = prepared(tmp_path / "whole", ["train.num_workers=1"])
    train.train_checkpoint(LocalRunner(settings), whole, settings)
    night, settings = prepared(tmp_path / "killed", ["train.num_workers=1"])
    epochs: list[int] = []
    real_line, real_keep = train.progress_line, local_training.keep_best

    def line(state, popularity, settings, is_refit):
        epochs.append(state.history[-1].epoch)
        if epochs == [1, 2, 3]:
            raise KeyboardInterrupt
        return real_line(state, popularity, settings, is_refit)

    monkeypatch.setattr(train, "progress_line", line)
    with pytest.raises(KeyboardInterrupt):
        train.train_checkpoint(LocalRunner(settings), night, settings)
    assert list(saved_states(night).done()) == [1, 2]
    monkeypatch.setattr(local_training, "keep_best", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.train_checkpoint(LocalRunner(settings), night, settings)
    assert list(saved_states(night).done()) == [2, 3], "the newest, and one in case that is damaged"
    assert len(night.storage.list("training/")) == 2 * 3, "and nothing of the first"
    monkeypatch.setattr(local_training, "keep_best", real_keep)
    train.train_checkpoint(LocalRunner(settings), night, settings)
    assert epochs == [1, 2, 3, 3]
    expected = load_model(whole.storage, whole.checkpoint).state_dict()
    weights = load_model(night.storage, night.checkpoint).state_dict()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    assert [report.epoch for report in read_metrics(night.storage, night.checkpoint).history] == [1, 2, 3]
    assert not night.storage.list("training/")


class OvertakenStorage(LocalStorage):
    """Another process finishes the same training, and removes its states, right after epoch `epoch` was claimed."""

    epoch = 0

    def create(self, key: str, data: bytes) -> bool:
        created = super().create(key, data)
        if key.endswith(f"state-{self.epoch:05d}.json"):
            for info in self.list("training/"):
                self.delete(info.key)
        return created


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_two_processes_may_train_the_same_model_and_leave_it_once(tmp_path, monkeypatch, epoch):
    night, settings = prepared(tmp_path, ["train.num_workers=1"])
    storage = OvertakenStorage(tmp_path)
    monkeypatch.setattr(storage, "epoch", epoch)
    train.train_checkpoint(LocalRunner(settings), replace(night, storage=storage), settings)
    assert [report.epoch for report in read_metrics(night.storage, night.checkpoint).history] == [1, 2, 3]
    assert not night.storage.list("training/")


def test_a_state_that_is_removed_while_it_is_fetched_is_worth_a_retry_and_a_damaged_one_is_not(tmp_path, monkeypatch):
    night, settings = prepared(tmp_path, ["train.num_workers=1"])
    monkeypatch.setattr(local_training, "keep_best", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.train_checkpoint(LocalRunner(settings), night, settings)

    for spoil, kind, says in (
        (flip_a_bit, InputError, "damaged.*remove it to train from the start"),
        (LocalStorage.delete, InfrastructureError, "gone or damaged; does another process train the same model"),
    ):

        def spoilt(storage, prefix, entry, remedy, spoil=spoil):
            spoil(storage, f"{prefix}/{entry.key}")
            return read_file(storage, prefix, entry, remedy)

        monkeypatch.setattr(training_states, "read_file", spoilt)
        with pytest.raises(kind, match=says):
            train.train_checkpoint(LocalRunner(settings), night, settings)


def test_a_state_whose_file_is_lost_is_passed_over_for_the_one_before(tmp_path, monkeypatch):
    night, settings = prepared(tmp_path, ["train.num_workers=1"])
    monkeypatch.setattr(local_training, "keep_best", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.train_checkpoint(LocalRunner(settings), night, settings)
    states = saved_states(night)
    night.storage.delete(f"{states.prefix}/{states.read(3).files[0].key}")
    lines: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        local_training.train_locally(night, settings, lines.append)
    assert [line.partition(" of")[0] for line in lines] == ["epoch 3"]
    assert list(states.done()) == [2, 3]


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def flip_a_bit(storage: Storage, key: str) -> None:
    data = bytearray(storage.read(key))
    data[len(data) // 2] ^= 1
    storage.delete(key)
    storage.create(key, bytes(data))


@pytest.mark.parametrize("overrides", [[], ["train.num_workers=1", "train.use_gpu=true"]])
def test_several_workers_or_a_gpu_are_refused_by_the_local_runner(tmp_path, overrides):
    night, settings = prepared(tmp_path, overrides)
    with pytest.raises(InputError, match=r"set train\.num_workers 1, use_gpu false"):
        train.train_checkpoint(LocalRunner(settings), night, settings)


def test_the_weight_of_a_target_is_the_logs_and_halves_with_its_age():
    two_days = 2 * DAY_US
    bucket = Bucket(
        user_ids=pa.array(["a", "b"]),
        offsets=np.array([0, 3, 4]),
        item_rows=np.array([5, 6, 7, 8], np.int32),
        event_ts=np.array([0, two_days, 2 * two_days, two_days]),
        weights=np.array([1, 0, 4, 8], np.float32),
        hides=np.full(4, IN_ALL_PARTS, np.uint8),
        num_train=np.array([2, 1], np.int32),
        num_validation=np.array([1, 0], np.int32),
        left_out=pa.array(["", ""]),
        also_seen=Lists.empty(2),
    )
    end = 2 * two_days
    assert training_data.target_weights(bucket, "train", None, end).tolist() == [1, 0, 8]
    assert training_data.target_weights(bucket, "whole", 2.0, end).tolist() == [0.25, 0, 4, 4]


def test_validation_takes_a_fifth_of_the_training_or_as_many_users_as_one_likes():
    settings = Settings(train=TrainSettings(num_negatives=100), model=ModelSettings(max_length=25))
    assert training_data.num_validation_queries(settings, 1e6, 1_000) == pytest.approx(0.2 * 1e8 / (100 + 400))
    assert training_data.num_validation_queries(settings, 1e6, 100_000) == pytest.approx(0.2 * 1e8 / (10_000 + 400))
    assert training_data.num_validation_queries(settings, 1e3, 1_000) == 1_000
    few = Settings(train=TrainSettings(validation_queries=7))
    assert training_data.num_validation_queries(few, 1e6, 1_000) == 7


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_training_validates_by_search_on_the_backend_that_it_trains_with(tmp_path, monkeypatch, backend):
    """`search.backend` is of the machines that search, which may be others."""
    night, settings = prepared(tmp_path, ["train.num_workers=1", f"train.backend={backend}", "search.backend=triton"])
    sums: list[RankingSums] = []
    asked = set()

    def describe(search: SearchSettings, device_type: str) -> Backend:
        asked.add(search.backend)
        return describe_backend(search, device_type)

    def validate(*arguments: Any) -> RankingSums:
        sums.append(rank_by_search(*arguments))
        return sums[-1]

    monkeypatch.setattr(backends, "describe_backend", describe)
    monkeypatch.setattr(train, "rank_by_search", validate)
    train.train_checkpoint(LocalRunner(settings), night, settings)
    history = read_metrics(night.storage, night.checkpoint).history
    assert [each.hit_rate for each in history] == [each.num_hits / history[0].num_validation_users for each in sums]
    assert asked == {backend}


def refitted(root: Path, overrides: list[str] | None = None) -> tuple[Night, Settings]:
    night, settings = prepared(root, ["train.num_workers=1", "train.refit=0.5", *(overrides or [])])
    train.train_checkpoint(LocalRunner(settings), night, settings)
    return night, settings


def test_what_serves_is_refitted_on_all_events(tmp_path):
    """Half of the best epoch's number of epochs, on the validation and test events too, and no state stays."""
    night, settings = refitted(tmp_path)
    selection, metrics = (read_metrics(night.storage, model) for model in (night.selected, night.checkpoint))
    assert metrics.refit_epochs == max(1, round(0.5 * selection.best_epoch))
    assert metrics.is_refit_served
    assert metrics.validation_ndcg == selection.validation_ndcg
    manifest = require_manifest(night.storage, night.checkpoint, "train")
    assert manifest.lineage == {"histories": night.histories.id, "selected": night.selected.id}
    assert not night.storage.list("training/")
    for part, num_held_out in (("whole", 0), ("before_test", 1), ("train", 2)):
        data = training_data.read_training_data(night, settings, Ranks(), torch.device("cpu"), part)
        assert data.windows.num_targets == sum(max(len(row) - 1 - num_held_out, 0) for row in histories(NUM_USERS))
    models = [load_model(night.storage, model) for model in (night.selected, night.measured, night.checkpoint)]
    for one, other in itertools.combinations(models, 2):
        assert not torch.equal(one.item_embedding.weight, other.item_embedding.weight)


def test_without_a_refit_the_selected_model_serves(tmp_path):
    night, _ = prepared(tmp_path)
    assert night.selection == night.measurement == night
    refit, _ = prepared(tmp_path / "refit", ["train.refit=0.5"])
    assert refit.selected == night.selected
    assert len({refit.checkpoint.id, refit.measured.id, refit.selected.id}) == 3
    assert len({refit.corpus.id, refit.measured_corpus.id}) == 2


def test_a_refit_that_was_killed_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    """Killed when the selection is kept, and at the first state of the refit."""
    whole, _ = refitted(tmp_path / "whole", ["train.refit=1"])
    real, kills = train.progress_line, [0]

    def line(state, popularity, settings, is_refit):
        kills[0] += is_refit
        if kills[0] == 2:
            raise KeyboardInterrupt
        return real(state, popularity, settings, is_refit)

    monkeypatch.setattr(train, "progress_line", line)
    with pytest.raises(KeyboardInterrupt):
        refitted(tmp_path / "killed", ["train.refit=1"])
    night, _ = refitted(tmp_path / "killed", ["train.refit=1"])
    expected = load_model(whole.storage, whole.checkpoint).state_dict()
    weights = load_model(night.storage, night.checkpoint).state_dict()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_a_refit_that_spoils_the_model_is_not_served(tmp_path, monkeypatch, caplog):
    real = train.refit_settings

    def too_fast(settings, best_epoch):
        return real(settings, best_epoch).model_copy(update={"learning_rate": 3.0, "max_gradient_norm": 1e9})

    monkeypatch.setattr(train, "refit_settings", too_fast)
    night, _ = refitted(tmp_path)
    for events, model in (("the events before the test", night.measured), ("all events", night.checkpoint)):
        assert f"the refit on {events} ranks even" in caplog.text
        assert "the selected model takes its place; lower train.learning_rate" in caplog.text
        assert not read_metrics(night.storage, model).is_refit_served
        selected, refit = (load_model(night.storage, each).state_dict() for each in (night.selected, model))
        assert all(torch.equal(selected[name], refit[name]) for name in selected)


@pytest.mark.parametrize("removed", ["selected", "measured", "checkpoint"])
def test_a_model_that_was_removed_is_trained_again_and_no_other(tmp_path, monkeypatch, removed):
    night, settings = refitted(tmp_path)
    artifact = getattr(night, removed)
    expected = load_model(night.storage, artifact).state_dict()
    for info in night.storage.list(f"{artifact.prefix}/"):
        night.storage.delete(info.key)
    assert not train.are_trained(night)
    trained, real = [], local.train_locally
    monkeypatch.setattr(
        local, "train_locally", lambda each, *rest: (trained.append(each.checkpoint), real(each, *rest))
    )
    train.train_checkpoint(LocalRunner(settings), night, settings)
    assert trained == [artifact]
    weights = load_model(night.storage, artifact).state_dict()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
