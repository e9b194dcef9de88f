"""Models made from those of an earlier night, whose items have other numbers: as a start, and as they are."""

from dataclasses import replace
from datetime import date
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import apply_overrides
from pipeline.data.ids import rows_among
from pipeline.data.lists import Lists
from pipeline.errors import InputError
from pipeline.io.artifacts import read_manifest, require_manifest, seal
from pipeline.io.checkpoint import load_config, load_model, read_metrics
from pipeline.io.earlier import Earlier
from pipeline.io.histories import items_claims, read_items, write_items
from pipeline.io.night import Night, name_night
from pipeline.model.model import RetrievalModel
from pipeline.retrieval.bonuses import Bonuses
from pipeline.settings import Settings
from pipeline.stages import local_training, train
from pipeline.stages.local import LocalRunner
from pipeline.stages.rules import TonightsRules
from tests.item_index import item_index
from tests.model.planted import NUM_ITEMS, SMALL_MODEL, histories
from tests.stages.test_train import NUM_USERS, prepared
from tests.stages.worlds import replace_items, write_histories

ONE_WORKER = ["train.num_workers=1", "train.refit=0.5"]
NEW = {"a-new", "i010-new", "z-new"}
GONE = {"i000", "i017"}
ID_SETS = st.sets(st.integers(0, 30), min_size=1)


@given(ID_SETS, ID_SETS, st.integers(0, 100))
def test_every_item_that_both_know_keeps_its_row_and_the_others_keep_what_was_drawn(before, now, seed):
    torch.manual_seed(seed)
    earlier, model = (RetrievalModel(SMALL_MODEL, len(each)) for each in (before, now))
    drawn = model.item_embedding.weight.detach().clone()
    with torch.no_grad():
        earlier.item_embedding.weight[-1] = 7.0  # padding
    ids_before, ids_now = (np.random.default_rng(seed).permutation(sorted(each)) for each in (before, now))
    model.copy_from(earlier, torch.from_numpy(rows_among(pa.array(ids_now), pa.array(ids_before))))
    of_before = dict(zip(ids_before.tolist(), earlier.item_embedding.weight, strict=False))
    for row, item in enumerate(ids_now.tolist()):
        assert torch.equal(model.item_embedding.weight[row], of_before.get(item, drawn[row]))
    assert (model.item_embedding.weight[-1] == 7.0).all()
    others = {name: value for name, value in earlier.state_dict().items() if name != "item_embedding.weight"}
    assert all(torch.equal(model.state_dict()[name], value) for name, value in others.items())


def first_night(root: Path, *overrides: str) -> tuple[Night, Settings]:
    night, settings = prepared(root, [*ONE_WORKER, *overrides])
    train.train_checkpoint(LocalRunner(settings), night, settings)
    return night, settings


def next_night(first: Night, settings: Settings, *overrides: str, is_reused: bool = False) -> tuple[Night, Settings]:
    """The night after, with two items fewer and three more, so that nearly every item has another row."""
    settings = Settings.model_validate(apply_overrides(settings.model_dump(mode="json"), overrides))
    earlier = Earlier(first.ds, first.selected, first.measured, first.checkpoint, is_reused)
    inputs = replace(first.inputs, ds=date(2026, 11, 21), earlier=earlier)
    night = name_night(first.storage, settings, inputs)
    old = [f"i{row:03d}" for row in range(NUM_ITEMS)]
    ids = sorted({*old, *NEW} - GONE)
    row_of = {item: row for row, item in enumerate(ids)}
    rows = [np.array([row_of[old[row]] for row in each if old[row] not in GONE]) for each in histories(NUM_USERS)]
    write_histories(night, settings.output.num_buckets, {f"u{user:04d}": each for user, each in enumerate(rows)})
    counts = np.bincount(np.concatenate([each[:-2] for each in rows]), minlength=len(ids))
    write_items(night.storage, night.histories, item_index(pa.array(ids), counts))
    seal(night.storage, night.histories, kind="histories", lineage={}, settings={}, files=(), counts={})
    return night, settings


def run_training(night: Night, settings: Settings) -> dict[str, torch.Tensor]:
    """Train, or take over, and return the weights of the model that serves."""
    train.train_checkpoint(LocalRunner(settings), night, settings)
    return load_model(night.storage, night.checkpoint).state_dict()


def assert_carried(night: Night, before: Night, tonight: RetrievalModel, earlier: RetrievalModel) -> list[int]:
    """Every weight is the earlier one, by item id; returns the rows of the items that are new."""
    ids, old = sorted({f"i{row:03d}" for row in range(NUM_ITEMS)} - GONE | NEW), range(NUM_ITEMS)
    rows = {f"i{row:03d}": row for row in old}
    known = [row for row, item in enumerate(ids) if item in rows]
    table, before_table = tonight.item_embedding.weight, earlier.item_embedding.weight
    assert torch.equal(table[known], before_table[[rows[ids[row]] for row in known]])
    others = {name: value for name, value in earlier.state_dict().items() if name != "item_embedding.weight"}
    assert all(torch.equal(tonight.state_dict()[name], value) for name, value in others.items())
    return sorted(set(range(len(ids))) - set(known))


def test_a_training_that_finds_nothing_better_keeps_the_weights_that_it_started_from(tmp_path, caplog):
    """With a learning rate of nearly 0 the start is the best round; new items have rows of their own."""
    first, settings = first_night(tmp_path)
    night, settings = next_night(first, settings, "train.learning_rate=1e-30", "train.refit=0", "train.patience=1")
    caplog.set_level("INFO")
    run_training(night, settings)
    metrics = read_metrics(night.storage, night.selected)
    assert metrics.history[0].step == metrics.best_epoch == 0
    assert metrics.ended_by == "patience"
    assert metrics.validation_ndcg == metrics.history[0].ndcg > 0.1
    models = (load_model(night.storage, each) for each in (night.selected, first.selected))
    tonight = load_model(night.storage, night.selected)
    new = assert_carried(night, first, *models)
    assert len({tuple(tonight.item_embedding.weight[row].tolist()) for row in new}) == len(new) == 3
    assert f"start from model {first.selected.id} of ds=2026-11-20; 3 of 41 items are new" in caplog.text


def test_a_start_is_from_the_selected_model_and_learns_on_to_a_better_one(tmp_path):
    first, settings = first_night(tmp_path)
    night, settings = next_night(first, settings)
    run_training(night, settings)
    manifests = [require_manifest(night.storage, each, "train") for each in (night.selected, night.checkpoint)]
    assert manifests[0].lineage == {"histories": night.histories.id, "started_from": first.selected.id}
    assert manifests[1].lineage == {"histories": night.histories.id, "selected": night.selected.id}
    metrics = read_metrics(night.storage, night.selected)
    assert metrics.validation_ndcg > metrics.history[0].ndcg > 0
    assert metrics.refit_epochs == 0
    assert read_metrics(night.storage, night.checkpoint).refit_epochs >= 1


def test_a_start_is_worth_more_than_as_many_epochs_from_scratch(tmp_path):
    first, settings = first_night(tmp_path, "train.refit=0")
    started, _ = next_night(first, settings)
    scratch = name_night(started.storage, settings, replace(started.inputs, earlier=None))
    assert scratch.histories == started.histories
    for night in (started, scratch):
        run_training(night, settings)
    ndcgs = [read_metrics(night.storage, night.selected).validation_ndcg for night in (started, scratch)]
    assert ndcgs[0] > ndcgs[1] > 0.1


def test_a_start_that_was_killed_goes_on_to_the_same_weights_without_the_earlier_model(tmp_path, monkeypatch):
    """Killed at the second state; then the earlier night is removed, and the training still ends as it would have."""
    first, settings = first_night(tmp_path / "whole")
    expected = run_training(*next_night(first, settings))
    first, settings = first_night(tmp_path / "killed")
    night, settings = next_night(first, settings)
    real, lines = train.progress_line, []

    def line(state, *others):
        lines.append(state.step)
        if len(lines) == 2:
            raise KeyboardInterrupt
        return real(state, *others)

    monkeypatch.setattr(train, "progress_line", line)
    with pytest.raises(KeyboardInterrupt):
        run_training(night, settings)
    for prefix in (first.selected.prefix, first.checkpoint.prefix, first.histories.prefix):
        for info in night.storage.list(f"{prefix}/"):
            night.storage.delete(info.key)
    weights = run_training(night, settings)
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


def test_models_are_taken_over_whole_without_a_training(tmp_path, monkeypatch, caplog):
    first, settings = first_night(tmp_path)
    night, settings = next_night(first, settings, is_reused=True)
    caplog.set_level("INFO")
    monkeypatch.setattr(local_training, "train_rank", None)
    run_training(night, settings)
    for kind in ("selected", "measured", "checkpoint"):
        tonight, earlier = getattr(night, kind), getattr(first, kind)
        manifest = require_manifest(night.storage, tonight, "train")
        assert manifest.lineage == {
            "histories": night.histories.id,
            "carried_from": earlier.id,
            "trained_on": "2026-11-20",
        }
        model, before = (load_model(night.storage, each) for each in (tonight, earlier))
        new = assert_carried(night, first, model, before)
        assert load_config(night.storage, tonight).unknown_rows == tuple(new)
        mean = before.item_embedding.weight[:-1].mean(dim=0)
        torch.testing.assert_close(model.item_embedding.weight[new], mean.expand(3, -1))
        expected = read_metrics(night.storage, earlier).model_copy(update={"num_unknown_items": 3})
        assert read_metrics(night.storage, tonight) == expected
    assert "the models of ds=2026-11-20 do not know 3 of 41 items; these are shown only where" in caplog.text


def test_an_item_that_the_model_does_not_know_needs_a_bonus_only_in_a_night_that_took_it_over(tmp_path):
    first, settings = first_night(tmp_path)
    assert TonightsRules(first, settings).for_queries(None, None).needs_bonus_N is None
    night, settings = next_night(first, settings, is_reused=True)
    run_training(night, settings)
    for each in (night, night.selection):
        needs_bonus_N = TonightsRules(each, settings).for_queries(None, None).needs_bonus_N
        assert needs_bonus_N.nonzero().flatten().tolist() == list(
            load_config(night.storage, night.selected).unknown_rows
        )


def test_the_accounting_counts_the_unseen_items_that_the_rules_hide(tmp_path):
    """Of the catalogue, and those that the model does not know where the user has no bonus for them."""
    first, settings = first_night(tmp_path)
    night, settings = next_night(first, settings, is_reused=True)
    run_training(night, settings)
    rules = TonightsRules(night, settings)
    unknown = load_config(night.storage, night.checkpoint).unknown_rows
    num_items = len(rules.is_eligible_N)
    hide = np.ones(num_items, dtype=bool)
    hide[[3, unknown[0]]] = False
    excluded = Lists.of([[0, 3], [unknown[1], 5], [], [unknown[0]]])
    rows = Lists.of([[1, unknown[2]], [unknown[1]], [unknown[0], 3, unknown[1]], []])
    bonuses = Bonuses(rows, np.ones(len(rows.values), np.float32), num_items)
    for is_eligible_N in (rules.is_eligible_N, hide):
        items = read_items(night.storage, night.histories)
        column = items.column_names.index("is_eligible")
        replace_items(night, items.set_column(column, items.field(column), pa.array(is_eligible_N)))
        rules = TonightsRules(night, settings)
        for has_bonuses in (True, False):
            expected = [0] * len(excluded)
            for query, row in product(range(len(excluded)), range(num_items)):
                may_be_shown = row not in unknown or (has_bonuses and row in rows[query])
                is_hidden = not (is_eligible_N[row] and may_be_shown)
                expected[query] += is_hidden and row not in excluded[query]
            assert rules.num_hidden(excluded, bonuses if has_bonuses else None).tolist() == expected


def test_a_night_that_was_killed_between_two_models_takes_over_the_other(tmp_path):
    first, settings = first_night(tmp_path)
    night, settings = next_night(first, settings, is_reused=True)
    expected = run_training(night, settings)
    night.storage.delete(night.checkpoint.key("manifest.json"))
    weights = run_training(night, settings)
    assert all(torch.equal(weights[name], value) for name, value in expected.items())


@pytest.mark.parametrize("is_reused", [True, False])
@pytest.mark.parametrize("removed", ["selected", "histories"])
def test_models_that_were_removed_are_named_with_the_way_out(tmp_path, is_reused, removed):
    first, settings = first_night(tmp_path)
    night, settings = next_night(first, settings, is_reused=is_reused)
    if removed == "histories":
        night.storage.delete(items_claims(night.storage, first.histories).key(0))
    else:
        night.storage.delete(first.selected.key("manifest.json"))
    use = "taken over" if is_reused else "started from"
    prefix = getattr(first, removed).prefix
    with pytest.raises(InputError, match=rf"{prefix}: removed, but the models of ds=2026-11-20 are to be {use}; .*set"):
        train.train_checkpoint(LocalRunner(settings), night, settings)
    assert read_manifest(night.storage, night.checkpoint.prefix) is None


OF_CONTENT = 'model.content={"values": ["item_id"], "num_hashes": 512}'


@pytest.mark.parametrize("is_reused", [False, True])
def test_with_content_new_items_are_known_by_their_features(tmp_path, is_reused):
    first, settings = first_night(tmp_path, OF_CONTENT, "train.max_epochs=1")
    night, settings = next_night(first, settings, is_reused=is_reused)
    train.train_checkpoint(LocalRunner(settings), night, settings)
    ids = read_items(night.storage, night.histories)["item_id"].to_pylist()
    for each, earlier in ((night.selected, first.selected), (night.checkpoint, first.checkpoint)):
        tonight = load_model(night.storage, each)
        tower, before = tonight.item_embedding, load_model(night.storage, earlier).item_embedding
        assert torch.equal(torch.diff(tower.feature_offsets)[:-1], torch.ones(len(ids), dtype=torch.int64))
        assert [item for item, is_met in zip(ids, tower.is_met.tolist(), strict=False) if not is_met] == sorted(NEW)
        if is_reused:
            assert torch.equal(tower.content_weight, before.content_weight)
        new = torch.tensor([ids.index(item) for item in sorted(NEW)])
        assert torch.equal(tower(new), tower._by_features(new)), "nothing of a row that was never trained"
        assert load_config(night.storage, each).unknown_rows == ()
