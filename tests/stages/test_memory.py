"""Memory in a night: its weight is chosen on validation users, and the published scores are the sums."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from jobs import choose_memory as job
from jobs import count_pairs
from pipeline.artifacts import Artifact
from pipeline.data.neighbours import count_pairs as pairs_of
from pipeline.data.neighbours import nearest_neighbours
from pipeline.errors import InputError
from pipeline.evaluation.results import Metrics
from pipeline.io.corpus import open_corpus, read_shard, shard_entries
from pipeline.io.evaluation import score_claims
from pipeline.io.histories import read_bucket, read_item_ids, read_items
from pipeline.io.memory import gains_claims, memory_claims, read_memory, require_memory
from pipeline.io.neighbours import open_neighbours, read_neighbours
from pipeline.model.model import RetrievalModel
from pipeline.retrieval.brute_force import brute_force
from pipeline.retrieval.filters import Eligibility, Rules
from pipeline.stages import memory as memory_stage
from pipeline.stages.embed import embed_corpora
from pipeline.stages.encode import encode_queries
from pipeline.stages.evaluate import evaluate
from pipeline.stages.local import LocalRunner
from pipeline.stages.memory import MemoryTrials, bonus_source, choose_memory, memory_of_neighbours, users_to_choose_with
from pipeline.stages.neighbours import count_neighbours
from pipeline.stages.queries import TonightsUsers
from pipeline.stages.search import QueryEncoder, encoder_stage
from tests.stages.worlds import (
    RecordingRunner,
    World,
    make_world,
    model_of,
    replace_items,
    retrieve,
    search_of,
    write_histories,
)

NUM_ITEMS = 120


def world_of(folder: Path, *overrides: str, follows: bool = True, num_users: int = 60) -> World:
    """Random histories, in which item n + 1 follows item n if `follows`; every seventh item is hidden from all."""
    world = make_world(folder, 1, NUM_ITEMS, ["memory.enabled=true", *overrides])
    for info in world.storage.list(f"{world.night.histories.prefix}/bucket-"):
        world.storage.delete(info.key)
    rng = np.random.default_rng(3)
    histories = {}
    for number in range(num_users):
        length = int(rng.integers(1, 13))
        rows = rng.integers(NUM_ITEMS) + np.arange(length) if follows else rng.integers(NUM_ITEMS, size=length)
        histories[f"u{number:03d}"] = rows % NUM_ITEMS
    write_histories(world.night, 3, histories)
    train, validation = (
        np.concatenate([rows[part] for rows in histories.values()]) for part in (slice(-2), slice(-2, -1))
    )
    columns: dict[str, Sequence[object]] = {
        "num_events": np.bincount(np.concatenate(list(histories.values())), minlength=NUM_ITEMS),
        "num_train_events": np.bincount(train, minlength=NUM_ITEMS),
        "num_validation_events": np.bincount(validation, minlength=NUM_ITEMS),
        "is_eligible": np.arange(NUM_ITEMS) % 7 != 0,
    }
    items = read_items(world.storage, world.night.histories)
    for name, values in columns.items():
        at = items.column_names.index(name)
        items = items.set_column(at, items.field(at), pa.array(values))
    replace_items(world.night, items)
    return world


def counted(world: World, runner: LocalRunner | None = None) -> World:
    """The same world with its counts and the choice of their weight."""
    count_neighbours(LocalRunner(world.settings), world.night, world.settings)
    choose_memory(runner or LocalRunner(world.settings), world.night, world.settings)
    return world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return counted(world_of(tmp_path_factory.mktemp("world")))


def without_memory(world: World) -> World:
    """The same night without memory, with its own later artifacts."""
    other = world.with_settings("memory.enabled=false")
    kept = {name: getattr(world.night, name) for name in ("neighbours", "measured_neighbours", "selected_neighbours")}
    return World(other.settings, replace(other.night, **kept))


def test_counts_that_help_get_a_weight_and_the_choice_stands(tmp_path: Path) -> None:
    made = counted(world_of(tmp_path))
    record = require_memory(made.night)
    assert record.weight > 0
    assert record.ndcg > record.ndcg_without + 0.2
    assert record.ndcg == max(trial.ndcg for trial in record.trials)
    assert len(record.trials) == 24
    users = [
        users_to_choose_with(read_bucket(made.storage, made.night.histories, unit), 1_000, made.settings)
        for unit in range(3)
    ]
    assert record.num_users == sum(len(each) for each in users) > 30
    for each in users:
        assert not each.held_out.is_in(each.histories).any()
    runner = RecordingRunner(made.settings)
    assert choose_memory(runner, made.night, made.settings) == record
    assert runner.ran == []
    # Killed after some units, it does the others only.
    made.storage.delete(memory_claims(made.night).key(0))
    made.storage.delete(gains_claims(made.night).key(1))
    assert choose_memory(runner, made.night, made.settings) == record
    assert runner.ran == [("MemoryTrials", [1])]


def test_no_more_users_are_asked_than_the_settings_say(world: World) -> None:
    few = world.with_settings("memory.num_users=4")
    few = World(few.settings, replace(few.night, neighbours=world.night.neighbours))
    MemoryTrials(few.night, few.settings)(0, b"")
    assert gains_claims(few.night).require(0, "").without.count == 2  # of three buckets, rounded up


def trials_with(world: World, monkeypatch: pytest.MonkeyPatch, model: RetrievalModel) -> MemoryTrials:
    """The trials of another choice, with this model."""
    other = World(world.settings, replace(world.night, memory=Artifact("memories", "other")))
    monkeypatch.setattr(memory_stage, "load_model", lambda storage, checkpoint: model)
    return MemoryTrials(other.night, other.settings)


def test_users_whose_query_is_not_a_number_find_nothing(world: World, monkeypatch) -> None:
    known = gains_claims(world.night).require(0, "")
    model = model_of(world).requires_grad_(False)
    assert model.mol.user_table is not None
    model.mol.user_table.weight[:9] = torch.nan  # of half of the users
    trials = trials_with(world, monkeypatch, model)
    trials(0, b"")
    found = gains_claims(replace(world.night, memory=Artifact("memories", "other"))).require(0, "")
    assert found.without.count == known.without.count
    assert 0 < max(gain.total for gain in found.gains) < max(gain.total for gain in known.gains)


def test_an_item_that_is_not_a_number_names_the_model_and_a_way_out(world: World, monkeypatch) -> None:
    model = model_of(world).requires_grad_(False)
    model.item_embedding.weight[100] = torch.nan
    trials = trials_with(world, monkeypatch, model)
    with pytest.raises(InputError, match=rf"model {world.night.checkpoint.id}: the item shard .* not a number; train"):
        trials(1, b"")


def test_counts_that_are_noise_change_nothing(tmp_path: Path) -> None:
    """Neither a score nor a byte on the way to it."""
    made = counted(world_of(tmp_path, follows=False))
    assert require_memory(made.night).weight == 0
    plain = without_memory(made)
    assert bonus_source(made.night, made.settings) is None
    for unit in range(3):
        payloads = [bytes(QueryEncoder(search_of(each), 0)(unit, b"")) for each in (made, plain)]
        assert payloads[0] == payloads[1]
    assert retrieve(made).equals(retrieve(plain))
    assert evaluate(LocalRunner(made.settings), made.night, made.settings).mol == {}


@pytest.mark.parametrize("overrides", [[], ["search.method=topk_avg", "search.num_preselected=120"]])
def test_the_published_lists_are_the_best_sums_of_all_items(world: World, overrides: list[str]) -> None:
    """No item that is seen or hidden comes in by its counts, though many have the highest."""
    made = world.with_settings(*overrides)
    made = World(made.settings, replace(made.night, neighbours=world.night.neighbours, memory=world.night.memory))
    table = retrieve(made)
    item_ids = read_item_ids(made.storage, made.night.histories).to_pylist()
    record, neighbours = require_memory(made.night), read_neighbours(made.night)
    entries = shard_entries(open_corpus(made.storage, made.night.corpus))
    shards = [read_shard(made.storage, made.night.corpus, entry) for entry in entries]
    is_eligible = np.arange(NUM_ITEMS) % 7 != 0
    mol, source = model_of(made).mol, bonus_source(made.night, made.settings)
    num_raised = num_hidden = 0
    for unit in range(3):
        bucket = read_bucket(made.storage, made.night.histories, unit)
        batch = encode_queries(model_of(made), bucket, TonightsUsers(None, 3), unit, source)
        eligibility = Eligibility(torch.from_numpy(is_eligible)[None], np.zeros(len(batch.excluded), np.int64))
        rules = Rules(batch.excluded, eligibility, batch.bonuses)
        scores, rows = brute_force(mol, batch.queries, shards, rules, 10)
        plain, plain_rows = brute_force(mol, batch.queries, shards, Rules(batch.excluded), NUM_ITEMS)
        for query, user in enumerate(batch.searched_user_ids.to_pylist()):
            mine = table.filter(pa.compute.equal(table["user_id"], user))
            assert mine["item_id"].to_pylist() == [item_ids[row] for row in rows[query]]
            assert mine["score"].to_pylist() == scores[query].tolist()
            # The sum, by its definition, of the two parts.
            of_mol = dict(zip(plain_rows[query].tolist(), plain[query], strict=True))
            history = bucket.cut("whole")[int(batch.searched[query])].tolist()
            counts = slow_counts(neighbours, history)
            for row, score in zip(rows[query].tolist(), scores[query], strict=True):
                amount = np.float32(record.weight * np.log1p(np.float64(counts.get(row, 0)) / record.scale))
                assert score == of_mol[row] + amount
                num_raised += row in counts
            num_hidden += sum(not is_eligible[row] or row in history for row in counts)
            assert not set(rows[query].tolist()) & set(history)
            assert is_eligible[rows[query]].all()
    assert num_raised > 50
    assert num_hidden > 50


def slow_counts(neighbours, history: list[int]) -> dict[int, np.float32]:
    scores: dict[int, float] = {}
    for age, item in enumerate(reversed(history[-10:])):
        first, end = neighbours.items.offsets[item : item + 2]
        for row, score in zip(neighbours.items[item].tolist(), neighbours.scores[first:end], strict=True):
            scores[row] = scores.get(row, 0.0) + 0.8**age * float(score)
    return {row: np.float32(score) for row, score in scores.items()}


@pytest.mark.parametrize("overrides", [[], ["search.method=topk_avg", "search.num_preselected=12"]])
def test_an_evaluation_tells_what_the_counts_bring(world: World, overrides: list[str]) -> None:
    made = world.with_settings(*overrides)
    made = World(made.settings, replace(made.night, neighbours=world.night.neighbours, memory=world.night.memory))
    measured = measure(made)
    alone = measure(without_memory(made))
    assert measured.mol == alone.model
    assert (alone.mol, measured.counts, measured.popularity) == ({}, alone.counts, alone.popularity)
    assert measured.model["ndcg@10"].mean > alone.model["ndcg@10"].mean + 0.2
    if made.settings.search.is_exact:
        assert (measured.overlap.mean, measured.proven) == (1.0, 1.0)


def test_an_evaluation_that_was_killed_searches_for_the_missing_units_only(tmp_path: Path) -> None:
    made = counted(world_of(tmp_path))
    whole = measure(made)
    made.storage.delete(made.night.evaluation.key("manifest.json"))
    made.storage.delete(score_claims(made.night).key(1))
    runner = RecordingRunner(made.settings)
    again = evaluate(runner, made.night, made.settings)
    assert again.model_copy(update={"seconds": whole.seconds}) == whole
    assert [units for _, units in runner.ran] == [[1]]


def test_a_night_that_ends_between_choice_and_search_goes_on_with_the_choice(world: World, tmp_path: Path) -> None:
    made = counted(world_of(tmp_path))
    runner = RecordingRunner(made.settings)
    assert choose_memory(runner, made.night, made.settings) == require_memory(world.night)
    assert runner.ran == []
    assert retrieve(made, runner).equals(retrieve(world))


def measure(world: World) -> Metrics:
    embed_corpora(LocalRunner(world.settings), world.night, world.settings)
    return evaluate(LocalRunner(world.settings), world.night, world.settings)


def test_without_a_choice_a_search_names_the_job_and_the_key(tmp_path: Path) -> None:
    made = world_of(tmp_path)
    count_neighbours(LocalRunner(made.settings), made.night, made.settings)
    with pytest.raises(
        InputError, match=r"memories/\w+: not there; run jobs/choose_memory\.py first, or set memory\.enab"
    ):
        retrieve(made)
    choose_memory(LocalRunner(made.settings), made.night, made.settings)
    assert retrieve(made).num_rows > 100


def test_an_encoder_counts_the_neighbours_in_its_memory(world: World) -> None:
    more = encoder_stage(search_of(world)).memory - encoder_stage(search_of(without_memory(world))).memory
    assert more == memory_of_neighbours(world.night) == 4 * sum(f.bytes for f in open_neighbours(world.night).files) > 0


def test_with_a_refit_the_counts_to_choose_by_to_measure_and_to_serve_are_of_other_events(tmp_path: Path) -> None:
    made = world_of(tmp_path, "train.refit=0.5", "cluster.mode=local")
    assert count_pairs.run(made.settings, made.night)["status"] == "made"
    buckets = [read_bucket(made.storage, made.night.histories, unit) for unit in range(3)]
    nights = (made.night.selection, made.night.measurement, made.night)
    for night, part in zip(nights, ("train", "before_test", "whole"), strict=True):
        assert night.learned_part == part
        num_events = np.bincount(np.concatenate([each.cut(part).values for each in buckets]), minlength=NUM_ITEMS)
        pairs = type(pairs_of(buckets[0], part, NUM_ITEMS)).sum(pairs_of(each, part, NUM_ITEMS) for each in buckets)
        expected, found = nearest_neighbours(pairs, num_events, 0, NUM_ITEMS, 200), read_neighbours(night)
        assert found.items.values.tolist() == expected.items.values.tolist()
        assert found.scores.tolist() == expected.scores.tolist()
    assert len({open_neighbours(night).id for night in nights}) == 3
    assert count_pairs.run(made.settings, made.night)["status"] == "exists"


def test_the_job_says_what_was_chosen_and_what_it_brings(tmp_path: Path, caplog) -> None:
    made = world_of(tmp_path, "cluster.mode=local")
    count_neighbours(LocalRunner(made.settings), made.night, made.settings)
    with caplog.at_level(logging.INFO, logger="nightrails"):
        outcome = job.run(made.settings, made.night)
    record = read_memory(made.night)
    assert record is not None
    assert (outcome["status"], outcome["weight"], outcome["scale"]) == ("made", record.weight, record.scale)
    says = f"the score is MoL + {record.weight:g} · log(1 + item-to-item count / {record.scale:g}): NDCG@10 "
    assert (
        f"{says}{record.ndcg:.4f} instead of {record.ndcg_without:.4f} on {record.num_users} validation" in caplog.text
    )
    assert job.run(made.settings, made.night) == outcome | {"status": "exists"}
    off = without_memory(made)
    assert job.run(off.settings, off.night) == {"status": "skipped", "weight": 0.0}
    none = record.model_copy(update={"weight": 0.0, "trials": []})
    assert job.describe(none).startswith(f"the score is MoL alone: on {record.num_users} validation users its NDCG@10")
