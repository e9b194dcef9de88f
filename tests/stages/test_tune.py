import numpy as np
import pytest

from pipeline.errors import InputError
from pipeline.io.histories import read_bucket
from pipeline.io.tuning import as_chosen
from pipeline.retrieval import tuning
from pipeline.stages.embed import embed_corpora
from pipeline.stages.low_rank import fitted_users, judging_users
from pipeline.stages.tune import judging_batches, tune_search
from tests.stages.worlds import RecordingRunner, World, make_world, retrieve

TUNED = ["search.method=tuned", "corpus.low_rank.ranks=[8,16]", "search.tuning.max_seconds=20"]


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
