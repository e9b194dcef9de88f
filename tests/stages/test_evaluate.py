"""The evaluation against metrics that the tests compute user by user from brute-force scores."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipeline.data.histories import Bucket
from pipeline.errors import InputError, MismatchError
from pipeline.evaluation.lists import intra_list_distance, novelty
from pipeline.evaluation.metrics import overlap_at_k
from pipeline.evaluation.results import RANKINGS, Metrics
from pipeline.evaluation.segments import DIVISIONS
from pipeline.evaluation.targets import Turnout, count_turnout, evaluable_users, sampling_keys
from pipeline.io.checkpoint import write_checkpoint
from pipeline.io.evaluation import (
    CheckedLists,
    Sample,
    checked_claims,
    overlap_claims,
    read_metrics,
    read_users,
    sample_claims,
    score_claims,
)
from pipeline.io.histories import read_bucket, read_item_ids, read_items, write_items
from pipeline.model.model import RetrievalModel
from pipeline.model.results import training_metrics
from pipeline.retrieval.filters import Eligibility, Rules
from pipeline.retrieval.search import search_shard
from pipeline.retrieval.topk import TopK
from pipeline.stages import heldout
from pipeline.stages import search as stages
from pipeline.stages.embed import embed_corpora
from pipeline.stages.encode import encode_queries, encode_sequences
from pipeline.stages.evaluate import draw_sample, evaluate
from pipeline.stages.local import LocalRunner
from pipeline.stages.neighbours import count_neighbours
from pipeline.stages.query_batch import QueryBatch
from pipeline.stages.runner import Runner
from pipeline.stages.sample import NUM_VERIFIED, draw_unit, make_sample
from tests.model.planted import report
from tests.stages.worlds import RecordingRunner, World, make_world, model_of, replace_items, write_histories

CUTOFFS = (3, 10)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Forty users; the popularity of an item is the number of its events before the test events."""
    made = make_world(tmp_path_factory.mktemp("world"), overrides=["evaluate.cutoffs=[10, 3, 99]"])
    counts = np.zeros(120, dtype=np.int64)
    for bucket in buckets(made):
        np.add.at(counts, bucket.cut("before_test").values, 1)
    items = read_items(made.storage, made.night.histories)
    for name, part in (("num_train_events", counts - counts // 3), ("num_validation_events", counts // 3)):
        column = items.column_names.index(name)
        items = items.set_column(column, items.field(column), pa.array(part))
    replace_items(made.night, items)
    embed_corpora(LocalRunner(made.settings), made.night, made.settings)
    count_neighbours(LocalRunner(made.settings), made.night, made.settings)
    return made


def other(world: World, *overrides: str) -> World:
    """The same corpus under changed settings of the evaluation."""
    changed = world.with_settings(*overrides)
    corpora = {"corpus": world.night.corpus, "measured_corpus": world.night.measured_corpus}
    return World(changed.settings, replace(changed.night, **corpora))


def run(world: World, runner: Runner | None = None) -> Metrics:
    return evaluate(runner or LocalRunner(world.settings), world.night, world.settings)


def sample_of(world: World) -> Sample:
    return sample_claims(world.night).require(0, "")


def without_seconds(metrics: Metrics) -> Metrics:
    return metrics.model_copy(update={"seconds": 0.0})


def buckets(world: World) -> Iterator[Bucket]:
    for unit in range(world.settings.output.num_buckets):
        yield read_bucket(world.storage, world.night.histories, unit)


def lists_of(world: World) -> Iterator[tuple[set[int], list[int], list[int], list[int], str]]:
    """Per evaluable user: targets, the ten items of the model, of popularity and of counts, and the user id."""
    model = model_of(world)
    counts = np.zeros(model.num_items, dtype=np.int64)
    for bucket in buckets(world):
        np.add.at(counts, bucket.cut("before_test").values, 1)
    num_events = read_items(world.storage, world.night.histories)["num_train_events"].to_numpy()
    pairs = count_followers(world)
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
            score = follower_scores(pairs, num_events, visible[user].tolist())
            by_pairs = sorted(unseen, key=lambda row: (-score.get(row, 0.0), -counts[row] * (row not in score), row))
            yield targets, by_model[:10], by_count[:10], by_pairs[:10], bucket.user_ids[user].as_py()


def count_followers(world: World) -> Counter[tuple[int, int]]:
    """How often one item comes one, two and three places after another in training, in sixths."""
    pairs: Counter[tuple[int, int]] = Counter()
    for bucket in buckets(world):
        train = bucket.cut("train")
        for rows in (train[user].tolist() for user in range(bucket.num_users)):
            for distance in (1, 2, 3):
                for pair in zip(rows, rows[distance:], strict=False):
                    pairs[pair] += 6 // distance
    return pairs


def follower_scores(pairs: Counter[tuple[int, int]], num_events: np.ndarray, history: list[int]) -> dict[int, float]:
    scores: Counter[int] = Counter()
    for age, first in enumerate(reversed(history[-10:])):
        for second in range(120):
            if pairs[first, second]:
                norm = math.sqrt(num_events[first] + 10) * math.sqrt(num_events[second] + 10)
                scores[second] += 0.8**age * float(np.float32(pairs[first, second] / 6 / norm))
    return {row: float(np.float32(score)) for row, score in scores.items()}


def slow_metrics(pairs: list[tuple[set[int], list[int]]]) -> dict[str, float]:
    sums: dict[str, list[float]] = {}
    for targets, ranked in pairs:
        for k in CUTOFFS:
            hits = [rank for rank, row in enumerate(ranked[:k], start=1) if row in targets]
            ideal = sum(1 / math.log2(1 + rank) for rank in range(1, min(k, len(targets)) + 1))
            sums.setdefault(f"hr@{k}", []).append(float(bool(hits)))
            sums.setdefault(f"ndcg@{k}", []).append(sum(1 / math.log2(1 + rank) for rank in hits) / ideal)
            sums.setdefault(f"recall@{k}", []).append(len(hits) / len(targets))
        first = [rank for rank, row in enumerate(ranked, start=1) if row in targets]
        sums.setdefault("mrr", []).append(1 / first[0] if first else 0.0)
    return {name: sum(values) / len(values) for name, values in sums.items()}


def test_metrics_equal_those_worked_out_user_by_user(world):
    metrics = run(world)
    users = list(lists_of(world))
    assert metrics.queries == len(users) > 30
    for name, column in (("model", 1), ("popularity", 2), ("counts", 3)):
        expected = slow_metrics([(user[0], user[column]) for user in users])
        estimates = getattr(metrics, name)
        assert {key: value.mean for key, value in estimates.items()} == pytest.approx(expected)
        shown = np.bincount([row for user in users for row in user[column]], minlength=120)
        assert getattr(metrics.coverage, name) == pytest.approx((shown > 0).mean())
        differences = np.abs(shown[:, None] - shown[None, :]).mean()  # Gini's own definition
        assert getattr(metrics.gini, name) == pytest.approx(differences / (2 * shown.mean()))
        assert all(value.low <= value.mean <= value.high for value in estimates.values())
    assert metrics.gini.popularity > metrics.gini.model > 0
    assert metrics.proven == 1
    assert (metrics.k, metrics.cutoffs, metrics.method) == (10, (3, 10), "exact")
    assert metrics.protocol.startswith(f"all {len(users)} users with something to find, from their histories before")


def test_each_user_is_kept_with_the_ranks_of_what_was_to_be_found(world):
    run(world)
    kept = {row["user_id"]: row for row in read_users(world.storage, world.night.evaluation).to_pylist()}
    expected = list(lists_of(world))
    assert kept.keys() == {user[-1] for user in expected}
    visible: dict[str, int] = {}
    for bucket in buckets(world):
        visible |= dict(zip(bucket.user_ids.to_pylist(), bucket.cut("before_test").lengths.tolist(), strict=True))
    ids = read_item_ids(world.storage, world.night.histories).to_pylist()
    for targets, model, popularity, counts, user in expected:
        rows = sorted(targets)
        assert kept[user]["item_ids"] == [ids[row] for row in rows]
        assert kept[user]["num_visible"] == visible[user]
        for name, ranked in (("model", model), ("popularity", popularity), ("counts", counts)):
            assert kept[user][f"{name}_ranks"] == [ranked.index(row) + 1 if row in ranked else 0 for row in rows]
        assert kept[user]["mol_ranks"] is None


def test_segments_are_told_apart_and_their_users_found_again_in_the_files(world):
    """By history every user is in one class, so that the classes add up to the whole."""
    metrics = run(world)
    for by, names in DIVISIONS.items():
        segments = [segment for segment in metrics.segments if segment.by == by]
        assert [each.name for each in segments] == [name for name in names if name in {each.name for each in segments}]
        assert all(each.rankings.keys() == {"model", "popularity", "counts"} for each in segments)
        assert max(each.queries for each in segments) <= metrics.queries <= sum(each.queries for each in segments)
    histories = [segment for segment in metrics.segments if segment.by == "history"]
    assert len(histories) >= 3
    for name in ("hr@3", "ndcg@3", "mrr"):
        total = sum(each.queries * each.rankings["model"][name].mean for each in histories)
        assert total / metrics.queries == pytest.approx(metrics.model[name].mean)


def test_lists_are_measured_by_their_first_places(world):
    metrics = run(world)
    model = model_of(world)
    counts = np.zeros(120, dtype=np.int64)
    for bucket in buckets(world):
        np.add.at(counts, bucket.cut("before_test").values, 1)
    first = [{"model": user[1][:3], "popularity": user[2][:3], "counts": user[3][:3]} for user in lists_of(world)]
    vectors = model.item_embedding.weight.detach().numpy()
    for name in RANKINGS:
        rows = np.array([lists[name] for lists in first])
        assert getattr(metrics.novelty, name) == pytest.approx(novelty(rows, counts).mean())
        assert getattr(metrics.distance, name) == pytest.approx(intra_list_distance(rows, vectors).mean())
    assert metrics.novelty.model > metrics.novelty.popularity


def test_the_gates_weights_are_the_means_over_the_shown_items(world):
    expected, model = [], model_of(world)
    by_user = {user: ranked[:3] for _, ranked, _, _, user in lists_of(world)}
    for bucket in buckets(world):
        queries = encode_sequences(model, bucket.cut("before_test"), bucket.user_keys)
        for user, user_id in enumerate(bucket.user_ids.to_pylist()):
            if user_id in by_user:
                items = model.item_side(torch.tensor(by_user[user_id]))
                expected.append(model.mol.pairs(queries.take(slice(user, user + 1)), items).gates_BNP[0])
    assert run(world).gates == pytest.approx(torch.cat(expected).mean(dim=0).tolist(), abs=1e-6)


def test_a_lost_file_of_users_is_written_again(world):
    again = other(world, "evaluate.seed=18")
    whole = run(again)
    first = sample_of(again).units[0]
    entry = score_claims(again.night).require(first, "").users
    for lost in (again.night.evaluation.key(entry.key), again.night.evaluation.key("manifest.json")):
        world.storage.delete(lost)
    runner = RecordingRunner(again.settings)
    assert without_seconds(run(again, runner)) == without_seconds(whole)
    assert [units for _, units in runner.ran] == [[first]]


def test_users_without_an_event_before_the_test_are_counted_apart(world):
    alone = sum(
        int(((bucket.cut("before_test").lengths == 0) & (bucket.held_out("test").lengths > 0)).sum())
        for bucket in buckets(world)
    )
    metrics = run(world)
    assert metrics.without_history == alone > 0
    assert metrics.with_test_events == metrics.queries + alone + metrics.only_repeats


def test_exact_search_is_verified_against_brute_force(world):
    overlap = run(world).overlap
    assert (overlap.mean, overlap.queries, overlap.k) == (1.0, NUM_VERIFIED, 10)
    assert (
        list(overlap_claims(world.night).done()) == sample_of(world).checked_units
    )  # one, and no other is read for it
    assert overlap.against == "brute force in float64"


def test_a_search_that_loses_its_best_item_fails_the_verification(world, monkeypatch):
    def lossy(index, queries, rules, *others):
        every_second = Eligibility((torch.arange(120) % 2 == 0)[None], np.zeros(len(rules), dtype=np.int64))
        return search_shard(index, queries, Rules(rules.excluded, every_second), *others)

    monkeypatch.setattr(stages, "search_shard", lossy)
    assert run(other(world, "evaluate.seed=5")).overlap.mean < 0.8


def test_an_approximate_search_is_checked_with_exact_search_on_the_sample(world):
    coarse = other(world, "search.method=topk_avg", "search.num_preselected=10", "evaluate.num_checked=12")
    metrics = run(coarse)
    overlap = metrics.overlap
    assert (overlap.queries, overlap.against) == (12, "exact search")
    assert 0.2 < overlap.mean < 1.0
    sample = sample_of(coarse)
    checked, exact = [], []
    exactly = {user: ranked for _, ranked, _, _, user in lists_of(world)}
    for unit in sample.checked_units:
        bucket = read_bucket(world.storage, world.night.histories, unit)
        users = heldout.CheckedUsers(sample, coarse.settings.evaluate.seed).select(unit, bucket)
        checked += checked_claims(coarse.night).require(unit, "").item_rows
        exact += [exactly[user] for user in users.user_ids.to_pylist()]
    assert overlap.mean == pytest.approx(overlap_at_k(np.array(checked), np.array(exact), 10).mean())
    assert metrics.overlap.low < metrics.overlap.mean < metrics.overlap.high


def test_preselecting_everything_overlaps_fully(world):
    metrics = run(other(world, "search.method=topk_avg", "search.num_preselected=200"))
    assert metrics.overlap.mean == 1.0
    assert metrics.overlap.queries == metrics.queries


def test_a_sample_has_the_asked_size_and_is_the_same_for_any_number_of_buckets(world):
    few = other(world, "evaluate.max_queries=9")
    metrics = run(few)
    assert metrics.queries == 9
    assert metrics.protocol.startswith("9 of ")
    chosen = {
        user
        for unit, bucket in enumerate(buckets(few))
        for user in heldout.HeldOutUsers(sample_of(few), few.settings.evaluate.seed)
        .select(unit, bucket)
        .user_ids.to_pylist()
    }
    everybody = {}
    for bucket in buckets(few):
        rows = heldout.evaluable_users(bucket)
        keys = heldout.sampling_keys(bucket.user_keys[rows], seed=0)
        everybody |= dict(zip(bucket.user_ids.take(pa.array(rows)).to_pylist(), keys.tolist(), strict=True))
    assert chosen == set(sorted(everybody, key=everybody.__getitem__)[:9])


def test_an_interrupted_evaluation_computes_only_what_is_missing(world):
    again = other(world, "evaluate.seed=11")
    whole = run(again)
    lost = sample_of(again).units[1]
    world.storage.delete(score_claims(again.night).key(lost))
    world.storage.delete(again.night.evaluation.key("manifest.json"))
    assert read_metrics(world.storage, again.night.evaluation) is None
    runner = RecordingRunner(again.settings)
    resumed = run(again, runner)
    assert [units for _, units in runner.ran] == [[lost]], "and no recall check"
    assert without_seconds(resumed) == without_seconds(whole)


def test_a_lost_recall_check_is_done_again_by_itself(world):
    first = other(world, "search.method=topk_avg", "evaluate.seed=12")
    whole = run(first)
    (unit, *_) = sample_of(first).checked_units
    world.storage.delete(overlap_claims(first.night).key(unit))
    world.storage.delete(first.night.evaluation.key("manifest.json"))
    runner = RecordingRunner(first.settings)
    assert run(first, runner).overlap == whole.overlap
    assert [units for _, units in runner.ran] == [[unit]]


def test_a_lost_verification_of_an_exact_search_is_done_again(world):
    verified = other(world, "evaluate.seed=15")
    whole = run(verified)
    (unit,) = sample_of(verified).checked_units
    for lost in (overlap_claims(verified.night).key(unit), verified.night.evaluation.key("manifest.json")):
        world.storage.delete(lost)
    runner = RecordingRunner(verified.settings)
    assert without_seconds(run(verified, runner)) == without_seconds(whole)
    assert [units for _, units in runner.ran] == [[unit]]


def test_a_finished_evaluation_is_read_back_as_it_was_returned(world):
    metrics = run(world)
    assert read_metrics(world.storage, world.night.evaluation) == metrics


def test_a_damaged_unit_is_computed_again(world):
    broken = other(world, "evaluate.seed=13")
    whole = run(broken)
    key = score_claims(broken.night).key(1)
    for lost in (key, broken.night.evaluation.key("manifest.json")):
        world.storage.delete(lost)
    world.storage.create(key, b'{"queries": 1}')
    runner = RecordingRunner(broken.settings)
    assert without_seconds(run(broken, runner)) == without_seconds(whole)
    assert [units for _, units in runner.ran] == [[1]]


def test_nobody_to_ask_is_an_error_that_says_what_to_do(world):
    empty = other(world, "evaluate.seed=14")
    night = replace(empty.night, histories=replace(empty.night.histories, id="nobody"))
    write_histories(night, 3, {"a": np.array([5, 5, 5]), "b": np.array([4])})
    write_items(world.storage, night.histories, read_items(world.storage, world.night.histories))
    with pytest.raises(InputError, match=r"nobody has a test event .*1 have no earlier .* split\.test_days"):
        evaluate(LocalRunner(empty.settings), night, empty.settings)


def test_without_counts_the_evaluation_names_the_job_to_run(world):
    changed = other(world, "counts.num_neighbours=7")
    with pytest.raises(InputError, match=r"neighbours/.*not there; run jobs/count_pairs\.py first"):
        run(changed)


class WithoutTasks(LocalRunner):
    def run_tasks(self, label, function, arguments):
        raise AssertionError(f"{label}: nothing is to do")


def test_a_sample_that_was_drawn_stands(world):
    drawn = other(world, "evaluate.seed=16")
    run(drawn)
    sample = sample_of(drawn)
    assert draw_sample(WithoutTasks(drawn.settings), drawn.night, drawn.settings) == sample


@pytest.mark.parametrize("most", [1, 4, 1_000])
def test_a_unit_draws_the_smallest_keys_of_those_who_can_be_asked(world, most):
    is_learned = read_items(world.storage, world.night.histories)["num_train_events"].to_numpy() > 0
    for unit, bucket in enumerate(buckets(world)):
        at = evaluable_users(bucket)
        keys = sorted(sampling_keys(bucket.user_keys[at], 3).tolist())
        draw = draw_unit(world.night, unit, 3, most)
        assert draw.keys.tolist() == keys[:most]
        assert (draw.unit, draw.num_evaluable) == (unit, len(at))
        assert draw.turnout == count_turnout(bucket, is_learned)


def test_nobody_is_checked_who_is_not_asked(world):
    keys = {0: np.array([5, 6], dtype=np.uint64), 1: np.array([7], dtype=np.uint64)}
    coarse = ["search.method=topk_avg", "search.num_preselected=10", "evaluate.max_queries=2"]
    sample = make_sample(keys, other(world, *coarse, "evaluate.num_checked=3").settings, 3, Turnout())
    assert (sample.query_threshold, sample.checked_threshold, sample.checked_units) == (6, 6, [0])
    sample = make_sample(keys, other(world, *coarse, "evaluate.num_checked=1").settings, 3, Turnout())
    assert (sample.query_threshold, sample.checked_threshold, sample.checked_units) == (6, 5, [0])


def asked(world: World, unit: int) -> tuple[QueryBatch, TopK]:
    """A unit's queries, but for the first user, whose query is not finite; and their lists."""
    bucket = read_bucket(world.storage, world.night.histories, unit)
    users = heldout.HeldOutUsers(sample_of(world), world.settings.evaluate.seed)
    batch = encode_queries(model_of(world), bucket, users, unit)
    reasons = pa.array(["the query is not a finite number", *[""] * (len(batch.user_ids) - 1)])
    rest = np.arange(1, len(batch.user_ids))
    lists = {user: ranked for _, ranked, _, _, user in lists_of(world)}
    rows_BK = torch.tensor([lists[user] for user in batch.user_ids.to_pylist()[1:]])
    spoilt = QueryBatch(batch.user_ids, reasons, batch.queries.take(torch.from_numpy(rest)), batch.excluded.take(rest))
    return spoilt, TopK(torch.zeros(rows_BK.shape), rows_BK, torch.zeros(len(rows_BK)))


def test_a_user_whose_query_could_not_be_made_is_a_miss_and_shifts_nobody(world):
    coarse = other(world, "search.method=topk_avg", "search.num_preselected=120", "evaluate.seed=17")
    whole = run(coarse)
    scores, overlaps = score_claims(coarse.night), overlap_claims(coarse.night)
    unit = sample_of(coarse).units[0]
    before = scores.require(unit, "")
    checked = checked_claims(coarse.night)
    lists = checked.require(unit, "").item_rows
    batch, result = asked(coarse, unit)
    for claims in (scores, overlaps, checked):
        coarse.storage.delete(claims.key(unit))
    heldout.EvaluationSink(coarse.night, coarse.settings).write(unit, batch, result)
    after = scores.require(unit, "")
    assert after.queries == before.queries == len(batch.user_ids)
    assert after.popularity == before.popularity
    heldout.CheckedListsSink(coarse.night, coarse.settings).write(unit, batch, result)
    assert checked.require(unit, "").item_rows == [[-1] * 10, *lists[1:]]
    heldout.RecallCheckSink(coarse.night, coarse.settings).write(unit, batch, result)
    assert overlaps.require(unit, "").overlap.count == len(batch.user_ids)
    assert whole.overlap.mean == 1.0
    assert overlaps.require(unit, "").overlap.total == pytest.approx(len(batch.user_ids) - 1, abs=1)


def test_lists_that_were_kept_for_other_users_are_not_compared(world):
    coarse = other(world, "search.method=topk_avg", "search.num_preselected=120", "evaluate.seed=18")
    run(coarse)
    unit = sample_of(coarse).units[0]
    batch, result = asked(coarse, unit)
    checked = checked_claims(coarse.night)
    lists = checked.require(unit, "").item_rows
    checked.storage.delete(checked.key(unit))
    checked.claim(unit, CheckedLists(item_rows=lists[1:]))
    with pytest.raises(MismatchError, match=rf"unit {unit}: .* lists were kept .*evaluations/.* to evaluate again"):
        heldout.RecallCheckSink(coarse.night, coarse.settings).write(unit, batch, result)


def test_a_sample_of_equal_keys_is_not_cut_short(world):
    keys = {0: np.array([5, 5], dtype=np.uint64), 1: np.array([7], dtype=np.uint64), 2: np.array([], dtype=np.uint64)}
    sample = make_sample(keys, other(world, "evaluate.max_queries=2").settings, 3, Turnout())
    assert (sample.query_threshold, sample.units, sample.checked_units) == (5, [0], [0])


def test_the_metrics_are_those_of_the_measured_model_and_the_recall_check_is_of_the_one_that_serves(tmp_path, world):
    """The serving model is another one, with other random weights: the measured one is that of `world`."""
    approximate = ["search.method=topk_avg", "search.num_preselected=10", "evaluate.num_checked=12"]
    refit = make_world(tmp_path, overrides=["train.refit=0.5", "evaluate.cutoffs=[10, 3, 99]", *approximate])
    runner = LocalRunner(refit.settings)
    torch.manual_seed(5)
    serving = RetrievalModel(refit.settings.model, 120).eval().requires_grad_(False)
    with torch.no_grad():
        serving.item_embedding.weight.normal_()
    metrics = training_metrics([report(1, 0.1)], 0.1, refit.settings.train)
    for night, model in (
        (refit.night.selection, serving),
        (refit.night.measurement, model_of(refit)),
        (refit.night, serving),
    ):
        if night.has_refit:
            for info in refit.storage.list(night.checkpoint.prefix):
                refit.storage.delete(info.key)
        write_checkpoint(night, model, refit.settings, metrics)
    embed_corpora(runner, refit.night, refit.settings)
    count_neighbours(runner, refit.night.measurement, refit.settings)
    measured = run(refit)
    alone = run(other(world, *approximate, "evaluate.seed=0"))
    assert measured.model == alone.model
    assert measured.overlap != alone.overlap
    sample = sample_of(refit)
    users = heldout.CheckedUsers(sample, refit.settings.evaluate.seed)
    for unit in sample.checked_units:
        bucket = read_bucket(refit.storage, refit.night.histories, unit)
        batch = encode_queries(serving, bucket, users, unit)
        lists = checked_claims(refit.night).require(unit, "").item_rows
        scores = serving.mol(batch.queries, serving.item_side(torch.arange(120)))
        for rank in range(9):
            first, second = (scores[np.arange(len(lists)), np.array(lists)[:, at]] for at in (rank, rank + 1))
            assert (first >= second - 1e-4).all(), "in the order of the serving model"
