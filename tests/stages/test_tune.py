import numpy as np
import pytest

from pipeline.errors import InputError
from pipeline.io.artifacts import seal
from pipeline.io.histories import read_bucket
from pipeline.io.tuning import are_searches_tried, as_chosen
from pipeline.retrieval import tuning
from pipeline.stages.embed import embed_corpora
from pipeline.stages.low_rank import fitted_users, judging_users
from pipeline.stages.tune import judging_batches, tune_search
from tests.stages.worlds import RecordingRunner, World, make_world, retrieve

TUNED = [
    "search.method=tuned",
    "search.tuning.min_pairs=0",
    "search.tuning.max_seconds=20",
    "corpus.low_rank.ranks=[8,16]",
]


@pytest.fixture(autouse=True)
def _short_timings(monkeypatch):
    monkeypatch.setattr(tuning, "TIMING_SECONDS", 0.01)


def embedded(tmp_path, **keys) -> tuple[World, RecordingRunner]:
    world = make_world(tmp_path, **keys)
    runner = RecordingRunner(world.settings)
    embed_corpora(runner, world.night, world.settings)
    return world, runner


def test_a_search_is_chosen_once_and_then_stands(tmp_path):
    world, runner = embedded(tmp_path, num_users=150, num_items=300, overrides=TUNED)
    with pytest.raises(InputError, match=r"run jobs/tune\.py first"):
        as_chosen(world.night, world.settings)
    chosen = tune_search(runner, world.night, world.settings)
    assert chosen.measured["chosen"]["recall_low"] >= 0.99
    runner.ran.clear()
    assert tune_search(runner, world.night, world.settings) == chosen
    assert not runner.ran
    search = as_chosen(world.night, world.settings).search
    assert (search.method, search.num_preselected) == (chosen.method, chosen.num_preselected)
    assert search.k == 10
    # Not divided by the number of shards: similar items often have neighbouring ids, and so the same shard.
    assert chosen.measured["k"] == 10


def sealed(world: World, **counts: int) -> World:
    """With a manifest of the histories, which says how many users and items there are."""
    seal(world.storage, world.night.histories, kind="histories", lineage={}, settings={}, files=(), counts=counts)
    return world


def test_few_users_and_items_are_searched_exactly_and_nothing_is_tried_or_fitted(tmp_path):
    overrides = [key for key in TUNED if "min_pairs" not in key]
    world = sealed(make_world(tmp_path, overrides=overrides), users=40, items=120)
    runner = RecordingRunner(world.settings)
    embed_corpora(runner, world.night, world.settings)
    chosen = tune_search(runner, world.night, world.settings)
    assert [names for names, _ in runner.ran] == ["ShardEmbedder"]
    assert chosen.reason.startswith("4,800 pairs of a user and an item are too few for a choice to pay")
    search = as_chosen(world.night, world.settings).search
    assert search == world.settings.search.model_copy(update={"method": "exact"})
    assert tune_search(runner, world.night, world.settings) == chosen


@pytest.mark.parametrize(("min_pairs", "is_tried"), [(12_000, True), (12_001, False), (0, True)])
def test_searches_are_tried_from_so_many_pairs_on(tmp_path, min_pairs, is_tried):
    world = make_world(tmp_path, overrides=[*TUNED, f"search.tuning.min_pairs={min_pairs}"])
    if min_pairs:
        with pytest.raises(InputError, match=r"not there; run jobs/prepare\.py first"):
            are_searches_tried(world.night, world.settings)
    sealed(world, users=100, items=120)
    assert are_searches_tried(world.night, world.settings) is is_tried
    named = world.settings.with_search({"method": "topk_avg"})
    assert not are_searches_tried(world.night, named)


def test_a_search_is_chosen_without_a_low_rank_table_where_the_users_are_too_few_for_one(tmp_path):
    """Of six users in three buckets none is left to try searches with either; of six in one bucket one is."""
    one_bucket = [*TUNED, "output.num_buckets=1"]
    world, runner = embedded(tmp_path / "one", num_users=6, num_items=300, overrides=one_bucket)
    tried = tune_search(runner, world.night, world.settings).measured["trials"]
    assert {trial["method"] for trial in tried} >= {"exact", "topk_avg"}
    assert "topk_low_rank" not in {trial["method"] for trial in tried}
    world, runner = embedded(tmp_path / "three", num_users=6, num_items=300, overrides=TUNED)
    chosen = tune_search(runner, world.night, world.settings)
    assert (chosen.method, chosen.reason) == ("exact", "there is no user to try searches with")
    named = world.with_settings("search.method=topk_low_rank")
    with pytest.raises(InputError, match=r"users are too few for search\.method topk_low_rank; use exact"):
        embed_corpora(runner, named.night, named.settings)
    assert named.night.corpus != world.night.corpus


def test_without_a_corpus_nothing_can_be_chosen(tmp_path):
    world = make_world(tmp_path, overrides=TUNED)
    with pytest.raises(InputError, match=r"not there; run jobs/embed_items\.py first"):
        tune_search(RecordingRunner(world.settings), world.night, world.settings)


def test_settings_that_name_a_method_are_left_alone(tmp_path):
    world = make_world(tmp_path)
    assert as_chosen(world.night, world.settings) is world.settings


def test_a_user_who_serves_the_fit_does_not_judge_it(tmp_path):
    world = make_world(tmp_path, num_users=60)
    for unit in range(3):
        bucket = read_bucket(world.storage, world.night.histories, unit)
        fitted, judging = fitted_users(bucket), judging_users(bucket)
        assert not np.intersect1d(fitted, judging).size
        assert len(fitted) + len(judging) == bucket.num_users
        assert len(fitted) >= 0.8 * bucket.num_users


def test_the_items_of_a_judges_history_are_excluded(tmp_path):
    world = make_world(tmp_path, num_users=60, overrides=["search.tuning.num_queries=7"])
    batches = judging_batches(world.night, world.settings)
    assert sum(len(batch.excluded) for batch in batches) == 7
    assert all((np.diff(batch.excluded.offsets) > 0).all() for batch in batches)


def test_a_tuned_night_is_searched_as_chosen(tmp_path):
    world, runner = embedded(tmp_path, num_users=150, num_items=300, overrides=TUNED)
    tune_search(runner, world.night, world.settings)
    resolved = as_chosen(world.night, world.settings)
    candidates = retrieve(World(resolved, world.night))
    assert candidates.num_rows == 1_500


def test_a_shard_with_fewer_items_than_a_list_is_tuned_for_all_it_has(tmp_path):
    world, runner = embedded(
        tmp_path, num_users=150, num_items=36, overrides=[*TUNED, "search.k=30", "corpus.num_shards=3"]
    )
    assert tune_search(runner, world.night, world.settings).measured["k"] == 12
    resolved = as_chosen(world.night, world.settings)
    assert resolved.search.k == 30
    retrieve(World(resolved, world.night))
