"""Bonuses on their way through a night: from the encoder to the published lists, the evaluation and the tuning."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.data.lists import Lists
from pipeline.io.corpus import open_corpus, read_shard, shard_entries
from pipeline.io.histories import read_bucket, read_item_ids, read_items
from pipeline.model.mol import QuerySide
from pipeline.retrieval import tuning
from pipeline.retrieval.bonuses import Bonuses
from pipeline.retrieval.brute_force import brute_force
from pipeline.retrieval.filters import Eligibility, Rules
from pipeline.retrieval.topk import empty_topk
from pipeline.stages import heldout, search, tune
from pipeline.stages.embed import embed_corpora
from pipeline.stages.encode import encode_queries
from pipeline.stages.evaluate import evaluate
from pipeline.stages.local import LocalRunner
from pipeline.stages.neighbours import count_neighbours
from pipeline.stages.queries import TonightsUsers
from pipeline.stages.query_batch import QueryBatch, decode_batch, encode_batch
from tests.stages.worlds import RecordingRunner, World, make_world, model_of, replace_items, retrieve

NUM_ITEMS = 120


def neighbours(histories: Lists, _: Lists) -> Bonuses:
    """A stand-in for memory: the three items after the last event get 30, 0.25 and -3; every fifth user has none."""
    last = [history[-1] for history in histories]
    rows = [
        [] if query % 5 == 0 else [(row + step) % NUM_ITEMS for step in (1, 2, 3)] for query, row in enumerate(last)
    ]
    order = [np.argsort(each) for each in rows]
    amounts = [np.array([30, 0.25, -3], np.float32)[by_row] for by_row in order if len(by_row)]
    return Bonuses(Lists.of(np.sort(each) for each in rows), np.concatenate([np.empty(0, np.float32), *amounts]), 120)


with_neighbours = partial(encode_queries, bonus_source=neighbours)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture
def _with_bonuses(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (search, tune):
        monkeypatch.setattr(module, "bonus_source", lambda night, settings: neighbours)


def batch_of(world: World, encode: Callable[..., QueryBatch], unit: int = 0) -> QueryBatch:
    bucket = read_bucket(world.storage, world.night.histories, unit)
    return encode(model_of(world), bucket, TonightsUsers(None, 3), unit)


def test_bonuses_come_out_of_a_payload_as_they_went_in_and_none_leave_it_as_it_was(world):
    for rows in (slice(None), slice(0, 0)):
        batch = batch_of(world, with_neighbours)
        some = np.arange(len(batch.excluded))[rows]
        queries = QuerySide(batch.queries.components_BQD[rows], batch.queries.gate_BP[rows])
        cut = replace(batch, queries=queries, excluded=batch.excluded.take(some), bonuses=batch.bonuses.take(some))
        again, _ = decode_batch(encode_batch(cut, empty_topk(len(some), 10)))
        assert again.bonuses.num_items == 120
        for one, other in ((again.bonuses, cut.bonuses), (again, cut)):
            lists = [each.rows if isinstance(each, Bonuses) else each.excluded for each in (one, other)]
            assert lists[0].offsets.tolist() == lists[1].offsets.tolist()
            assert lists[0].values.tolist() == lists[1].values.tolist()
        assert again.bonuses.amounts.tobytes() == cut.bonuses.amounts.tobytes()
    payload = encode_batch(batch_of(world, encode_queries), empty_topk(len(batch.excluded), 10))
    source = pa.BufferReader(payload)
    pa.ipc.open_stream(source).read_all()
    schema = pa.ipc.open_stream(source).schema
    assert schema.names == ["components", "gate", "excluded", "scores", "rows", "bound"]
    assert set(schema.metadata) == {b"num_components", b"backends"}
    assert decode_batch(payload)[0].bonuses is None


def test_a_source_is_given_the_visible_histories_of_the_users_that_have_a_query(world):
    model, bucket = model_of(world), read_bucket(world.storage, world.night.histories, 0)
    visible = bucket.cut("before_test")
    first = int(np.flatnonzero(visible.lengths)[0])
    model.item_embedding.weight[int(visible[first][-1])] = torch.nan
    given = []

    def source(histories: Lists, seen: Lists) -> Bonuses:
        given.extend([histories, seen])
        return Bonuses(Lists.empty(len(histories)), np.empty(0, np.float32), NUM_ITEMS)

    batch = encode_queries(model, bucket, TonightsUsers(None, 3, part="before_test"), 0, source)
    assert first not in batch.searched
    expected = [visible[user].tolist() for user in batch.searched]
    assert [given[0][query].tolist() for query in range(len(given[0]))] == expected
    seen = bucket.seen("before_test").take(batch.searched)
    assert [given[1][query].tolist() for query in range(len(seen))] == [
        seen[query].tolist() for query in range(len(seen))
    ]
    assert 0 < len(batch.bonuses) == len(batch.excluded)


@pytest.mark.usefixtures("_with_bonuses")
@pytest.mark.parametrize(("shards_at_once", "hidden_step"), [(64, 1_000), (1, 3)])
def test_a_published_score_is_the_mol_score_plus_the_bonus(tmp_path: Path, shards_at_once, hidden_step):
    """Also in waves, and beside items that the catalogue hides."""
    world = make_world(tmp_path)
    is_eligible = np.arange(NUM_ITEMS) % hidden_step != 5 % hidden_step
    items = read_items(world.storage, world.night.histories)
    column = items.column_names.index("is_eligible")
    replace_items(world.night, items.set_column(column, items.field(column), pa.array(is_eligible)))
    lists = retrieve(world, RecordingRunner(world.settings, shards_at_once)).to_pylist()
    item_ids = read_item_ids(world.storage, world.night.histories).to_pylist()
    entries = shard_entries(open_corpus(world.storage, world.night.corpus))
    shards = [read_shard(world.storage, world.night.corpus, entry) for entry in entries]
    num_raised = 0
    for unit in range(3):
        batch = batch_of(world, with_neighbours, unit)
        mol = model_of(world).mol
        eligibility = Eligibility(torch.from_numpy(is_eligible)[None], np.zeros(len(batch.excluded), np.int64))
        rules = Rules(batch.excluded, eligibility, batch.bonuses)
        scores, rows = brute_force(mol, batch.queries, shards, rules, k=10)
        plain, plain_rows = brute_force(mol, batch.queries, shards, Rules(batch.excluded), k=NUM_ITEMS)
        for query, user in enumerate(batch.searched_user_ids.to_pylist()):
            mine = [row for row in lists if row["user_id"] == user]
            assert [row["item_id"] for row in mine] == [item_ids[row] for row in rows[query] if row >= 0]
            assert [row["score"] for row in mine] == scores[query].tolist()[: len(mine)]
            mol_score = dict(zip(plain_rows[query].tolist(), plain[query], strict=True))
            first, end = batch.bonuses.rows.offsets[query : query + 2]
            bonus = dict(zip(batch.bonuses.rows[query].tolist(), batch.bonuses.amounts[first:end], strict=True))
            for row in mine:
                item = item_ids.index(row["item_id"])
                assert row["score"] == mol_score[item] + bonus.get(item, np.float32(0))  # in float32
                num_raised += item in bonus
    assert num_raised > 20


@pytest.mark.usefixtures("_with_bonuses")
def test_the_checks_of_an_evaluation_measure_the_sum(tmp_path: Path, monkeypatch):
    """Both hold where both searches add bonuses, and fail where one of the two does not."""
    world = make_world(tmp_path)
    embed_corpora(LocalRunner(world.settings), world.night, world.settings)
    count_neighbours(LocalRunner(world.settings), world.night, world.settings)

    def overlap(*overrides: str) -> float:
        other = world.with_settings(*overrides)
        other = replace(other, night=replace(other.night, corpus=world.night.corpus))
        return evaluate(LocalRunner(other.settings), other.night, other.settings).overlap.mean

    everything = ("search.method=topk_avg", "search.num_preselected=120")
    assert (overlap("evaluate.seed=1"), overlap(*everything, "evaluate.seed=1")) == (1.0, 1.0)
    monkeypatch.setattr(heldout, "brute_force", lambda *a: brute_force(*a[:3], replace(a[3], bonuses=None), a[4]))
    assert overlap("evaluate.seed=2") < 1.0


@pytest.mark.usefixtures("_with_bonuses")
def test_a_search_is_chosen_with_the_bonuses_of_its_judges(tmp_path: Path, monkeypatch):
    tuned = ["search.method=tuned", "search.tuning.min_pairs=0", "search.tuning.max_seconds=2"]
    world = make_world(tmp_path, num_users=100, overrides=tuned)
    monkeypatch.setattr(tuning, "TIMING_SECONDS", 0.01)
    embed_corpora(LocalRunner(world.settings), world.night, world.settings)
    given = []

    def spy(open_with, sample, *others):
        given.append(sample.rules)
        return tuning.tune(open_with, sample, *others)

    monkeypatch.setattr(tune, "tune", spy)
    tune.tune_search(LocalRunner(world.settings), world.night, world.settings)
    batches = tune.judging_batches(world.night, world.settings)
    assert len(batches) > 1
    (rules,) = given
    assert rules.bonuses.rows.values.tolist() == [row for batch in batches for row in batch.bonuses.rows.values]
    assert rules.bonuses.amounts.tolist() == [amount for batch in batches for amount in batch.bonuses.amounts]
    assert len(rules.bonuses) == len(rules) > 0
