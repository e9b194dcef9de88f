"""An evaluation is worked out again here, user by user, from brute-force scores."""

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.data.histories import Bucket
from pipeline.distributed import evaluate as evaluation
from pipeline.distributed import search
from pipeline.distributed.embed import embed_corpus
from pipeline.distributed.evaluate import evaluate
from pipeline.errors import InputError
from pipeline.evaluation.metrics import overlap_at_k
from pipeline.evaluation.results import Metrics
from pipeline.io.evaluation import overlap_key, read_metrics, read_sample, read_scores, scores_key
from pipeline.io.histories import read_bucket
from pipeline.io.parquet import read_parquet_bytes, write_parquet_bytes
from pipeline.retrieval.filters import Eligibility, Rules
from pipeline.retrieval.search import search_shard
from pipeline.stages import evaluate as heldout
from pipeline.stages import search as stages
from pipeline.stages.sample import NUM_VERIFIED, make_sample
from pipeline.stages.search import encode_sequences
from tests.distributed.worlds import World, make_world, model_of, without_ray, write_histories

CUTOFFS = (3, 10)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Forty users; the most popular items are those that are in most histories."""
    made = make_world(tmp_path_factory.mktemp("world"), overrides=["evaluate.cutoffs=[10, 3, 99]"])
    counts = np.zeros(120, dtype=np.int64)
    for bucket in buckets(made):
        np.add.at(counts, bucket.cut("before_test").values, 1)
    key = made.night.histories.items_key
    items = read_parquet_bytes(made.storage.read(key), key)
    at = items.column_names.index("num_train_events")
    made.storage.delete(key)
    made.storage.create(key, write_parquet_bytes(items.set_column(at, items.field(at), pa.array(counts))))
    with pytest.MonkeyPatch.context() as monkeypatch:
        without_ray(monkeypatch)
        embed_corpus(made.storage, made.night, made.settings)
    return made


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[int]]]:
    """Chains run in this process; the stages and units that ran."""
    ran = without_ray(monkeypatch)
    monkeypatch.setattr(evaluation, "run_tasks", lambda what, function, arguments: [function(*a) for a in arguments])
    monkeypatch.setattr(evaluation, "connect", search.connect)
    return ran


def other(world: World, *overrides: str) -> World:
    """The same corpus, evaluated in another way."""
    changed = world.with_settings(*overrides)
    return World(world.storage, changed.settings, replace(changed.night, corpus=world.night.corpus))


def run(world: World) -> Metrics:
    return evaluate(world.storage, world.night, world.settings)


def without_seconds(metrics: Metrics) -> Metrics:
    return metrics.model_copy(update={"seconds": 0.0})


def buckets(world: World) -> Iterator[Bucket]:
    for unit in range(world.settings.output.num_buckets):
        yield read_bucket(world.storage, world.night.histories, unit)


def lists_of(world: World) -> Iterator[tuple[set[int], list[int], list[int], str]]:
    """For each user who can be asked: targets, the model's ten and popularity's ten, the slow way, and the id."""
    model = model_of(world)
    counts = np.zeros(model.num_items, dtype=np.int64)
    for bucket in buckets(world):
        np.add.at(counts, bucket.cut("before_test").values, 1)
    items = model.item_side(torch.arange(model.num_items))
    mol = model_of(world).mol.double()
    for bucket in buckets(world):
        visible, test = bucket.cut("before_test"), bucket.held_out("test")
        queries = encode_sequences(model, visible, bucket.user_keys)
        scores = mol(
            type(queries)(queries.components_BQD.double(), queries.gate_BP.double()),
            type(items)(items.components_NXD.double(), items.gate_NP.double()),
        ).float()
        for user in range(bucket.num_users):
            seen = set(visible[user].tolist())
            targets = set(test[user].tolist()) - seen
            if not targets or not seen:
                continue
            unseen = [row for row in range(model.num_items) if row not in seen]
            by_model = sorted(unseen, key=lambda row: (-float(scores[user, row]), row))
            by_count = sorted(unseen, key=lambda row: (-counts[row], row))
            yield targets, by_model[:10], by_count[:10], bucket.user_ids[user].as_py()


def slow_metrics(pairs: list[tuple[set[int], list[int]]]) -> dict[str, float]:
    sums: dict[str, list[float]] = {}
    for targets, ranked in pairs:
        for k in CUTOFFS:
            hits = [place for place, row in enumerate(ranked[:k], start=1) if row in targets]
            ideal = sum(1 / math.log2(1 + place) for place in range(1, min(k, len(targets)) + 1))
            sums.setdefault(f"hr@{k}", []).append(float(bool(hits)))
            sums.setdefault(f"ndcg@{k}", []).append(sum(1 / math.log2(1 + place) for place in hits) / ideal)
            sums.setdefault(f"recall@{k}", []).append(len(hits) / len(targets))
        first = [place for place, row in enumerate(ranked, start=1) if row in targets]
        sums.setdefault("mrr", []).append(1 / first[0] if first else 0.0)
    return {name: sum(values) / len(values) for name, values in sums.items()}


def test_metrics_equal_those_worked_out_user_by_user(world, here):
    metrics = run(world)
    found = list(lists_of(world))
    assert metrics.queries == len(found) > 30
    for name, place in (("model", 1), ("popularity", 2)):
        expected = slow_metrics([(entry[0], entry[place]) for entry in found])
        estimates = getattr(metrics, name)
        assert {key: value.mean for key, value in estimates.items()} == pytest.approx(expected)
        shown = {row for entry in found for row in entry[place]}
        assert getattr(metrics.coverage, name) == pytest.approx(len(shown) / 120)
        assert all(value.low <= value.mean <= value.high for value in estimates.values())
    assert metrics.gini.popularity > metrics.gini.model > 0
    assert (metrics.k, metrics.cutoffs, metrics.method) == (10, (3, 10), "exact")
    assert metrics.protocol.startswith(f"all {len(found)} users with something to find, from their histories before")


def test_users_without_an_event_before_the_test_are_counted_apart(world, here):
    alone = sum(
        int(((bucket.cut("before_test").lengths == 0) & (bucket.held_out("test").lengths > 0)).sum())
        for bucket in buckets(world)
    )
    assert run(world).without_history == alone > 0


def test_exact_search_is_verified_against_brute_force(world, here):
    overlap = run(world).overlap
    assert (overlap.mean, overlap.queries, overlap.k) == (1.0, NUM_VERIFIED, 10)
    assert overlap.against == "brute force in float64"


def test_a_search_that_loses_its_best_item_fails_the_verification(world, here, monkeypatch):
    def lossy(index, queries, rules, *others):
        every_second = Eligibility((torch.arange(120) % 2 == 0)[None], np.zeros(len(rules), dtype=np.int64))
        return search_shard(index, queries, Rules(rules.excluded, every_second), *others)

    monkeypatch.setattr(stages, "search_shard", lossy)
    assert run(other(world, "evaluate.seed=5")).overlap.mean < 0.8


def test_an_approximate_search_is_audited_with_exact_search_on_the_sample(world, here):
    coarse = other(world, "search.method=topk_avg", "search.num_preselected=10", "evaluate.num_audited=12")
    metrics = run(coarse)
    overlap = metrics.overlap
    assert (overlap.queries, overlap.against) == (12, "exact search")
    assert 0.2 < overlap.mean < 1.0
    sample = read_sample(world.storage, coarse.night.evaluation)
    audited, exact = [], []
    exactly = {user: ranked for _, ranked, _, user in lists_of(world)}
    for scores in read_scores(world.storage, coarse.night.evaluation, sample.audit_units):
        bucket = read_bucket(world.storage, world.night.histories, scores.unit)
        users = heldout.AuditedUsers(world.storage.uri, coarse.night, coarse.settings).select(scores.unit, bucket)
        audited += scores.audited
        exact += [exactly[user] for user in users.user_ids.to_pylist()]
    assert overlap.mean == pytest.approx(overlap_at_k(np.array(audited), np.array(exact), 10).mean())
    assert metrics.overlap.low < metrics.overlap.mean < metrics.overlap.high


def test_preselecting_everything_overlaps_fully(world, here):
    metrics = run(other(world, "search.method=topk_avg", "search.num_preselected=200"))
    assert metrics.overlap.mean == 1.0
    assert metrics.overlap.queries == metrics.queries


def test_a_sample_has_the_asked_size_and_is_the_same_for_any_number_of_buckets(world, here):
    few = other(world, "evaluate.max_queries=9")
    metrics = run(few)
    assert metrics.queries == 9
    assert metrics.protocol.startswith("9 of ")
    chosen = {
        user
        for unit, bucket in enumerate(buckets(few))
        for user in heldout.HeldOutUsers(few.storage.uri, few.night, few.settings)
        .select(unit, bucket)
        .user_ids.to_pylist()
    }
    everybody = {}
    for bucket in buckets(few):
        at, _ = heldout.evaluable_users(bucket)
        keys = heldout.sampling_keys(bucket.user_keys[at], seed=0)
        everybody |= dict(zip(bucket.user_ids.take(pa.array(at)).to_pylist(), keys.tolist(), strict=True))
    assert chosen == set(sorted(everybody, key=everybody.__getitem__)[:9])


def test_an_interrupted_evaluation_computes_only_what_is_missing(world, here):
    whole = run(other(world, "evaluate.seed=11"))
    again = other(world, "evaluate.seed=11")
    sample = read_sample(world.storage, again.night.evaluation)
    lost = sample.units[1]
    for key in (scores_key(again.night.evaluation, lost), f"{again.night.evaluation.prefix}/metrics.json"):
        world.storage.delete(key)
    world.storage.delete(f"{again.night.evaluation.prefix}/manifest.json")
    assert read_metrics(world.storage, again.night.evaluation) is None
    here.clear()
    resumed = run(again)
    assert [units for _, units in here] == [[lost]]
    assert without_seconds(resumed) == without_seconds(whole)


def test_a_lost_audit_is_done_again_by_itself(world, here):
    first = other(world, "search.method=topk_avg", "evaluate.seed=12")
    whole = run(first)
    (unit, *_) = read_sample(world.storage, first.night.evaluation).audit_units
    world.storage.delete(overlap_key(first.night.evaluation, unit))
    world.storage.delete(f"{first.night.evaluation.prefix}/manifest.json")
    here.clear()
    assert run(first).overlap == whole.overlap
    assert [units for _, units in here] == [[unit]]


def test_a_finished_evaluation_is_read_back_as_it_was_returned(world, here):
    metrics = run(world)
    assert read_metrics(world.storage, world.night.evaluation) == metrics


def test_a_damaged_unit_file_is_named(world, here):
    broken = other(world, "evaluate.seed=13")
    run(broken)
    key = scores_key(broken.night.evaluation, 1)
    for lost in (key, f"{broken.night.evaluation.prefix}/manifest.json"):
        world.storage.delete(lost)
    world.storage.create(key, b'{"unit": 1}')
    with pytest.raises(
        InputError, match=r"unit-00001\.json: not written by this version .* remove .* to evaluate again"
    ):
        run(broken)


def test_nobody_to_ask_is_an_error_that_says_what_to_do(world, here):
    empty = other(world, "evaluate.seed=14")
    night = replace(empty.night, histories=replace(empty.night.histories, id="nobody"))
    write_histories(world.storage, night, 3, {"a": np.array([5, 5, 5]), "b": np.array([4])})
    world.storage.create(night.histories.items_key, world.storage.read(world.night.histories.items_key))
    with pytest.raises(InputError, match=r"nobody has a test event .*\(1 users .* split\.test_days"):
        evaluate(world.storage, night, empty.settings)


def test_a_sample_of_equal_keys_is_not_cut_short(world):
    keys = {0: np.array([5, 5], dtype=np.uint64), 1: np.array([7], dtype=np.uint64), 2: np.array([], dtype=np.uint64)}
    sample = make_sample(keys, other(world, "evaluate.max_queries=2").settings, 3, 0)
    assert (sample.query_threshold, sample.units, sample.audit_units) == (5, [0], [0])


@pytest.mark.ray
def test_on_ray_the_metrics_are_the_same(world, here, local_ray, monkeypatch):
    alone = run(world)
    monkeypatch.undo()
    seeded = other(world, "search.item_tile=16")
    night = replace(seeded.night, evaluation=replace(seeded.night.evaluation, id="on-ray"))
    together = evaluate(world.storage, night, seeded.settings)
    assert without_seconds(together) == without_seconds(alone)
