import os
import signal
from pathlib import Path

import pytest

from jobs import embed_items, retrieve
from pipeline.artifacts import FileEntry
from pipeline.distributed import runner
from pipeline.errors import InputError
from pipeline.io.night import Night
from pipeline.io.publication.units import units_of
from pipeline.settings import Settings
from pipeline.stages import search
from pipeline.stages.embed import embed_corpora
from pipeline.stages.local import LocalRunner
from pipeline.stages.search import ShardSearcher
from tests.stages.worlds import World, make_world, read_table, run_search

NUM_UNITS = 6
ONE_WAVE = [f"output.num_buckets={NUM_UNITS}", "cluster.threads_per_actor=2"]
TWO_WAVES = [*ONE_WAVE, "cluster.max_stages_per_wave=2"]


class DyingSearcher(ShardSearcher):
    """A searcher that kills its process once, in the middle of a unit."""

    def __init__(self, night: Night, settings: Settings, entry: FileEntry) -> None:
        super().__init__(night, settings, entry)
        self._mark = Path(night.storage.uri) / "died"

    def __call__(self, unit: int, payload: bytes):
        improved = super().__call__(unit, payload)
        if unit == 2 and not self._mark.exists():
            self._mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return improved


@pytest.fixture
def expected(tmp_path: Path):
    """The tables (candidates, users) of a search in one process."""
    world = make_world(tmp_path / "expected", overrides=TWO_WAVES)
    run_search(world, LocalRunner(world.settings))
    return read_table(world, "candidates"), read_table(world, "users")


def locally(world: World) -> Settings:
    return world.settings.model_copy(update={"cluster": world.settings.cluster.model_copy(update={"mode": "local"})})


@pytest.mark.ray
def test_a_run_is_the_same_on_ray_with_a_killed_searcher_and_a_rerun_computes_only_what_is_missing(
    local_ray, tmp_path, monkeypatch, expected
):
    monkeypatch.setattr(search, "ShardSearcher", DyingSearcher)
    monkeypatch.setattr(runner, "SHARED_BYTES", -1)  # each shard in a process of its own, as large ones are
    world = make_world(tmp_path / "root", overrides=TWO_WAVES)
    embedded = embed_items.run(locally(world), world.night)
    assert (embedded["status"], embedded["num_items"]) == ("made", 120)
    assert embed_items.run(world.settings, world.night) == embedded | {"status": "exists"}
    outcome = retrieve.run(world.settings, world.night)
    assert outcome == {
        "status": "made",
        "run_id": world.night.run.run_id,
        "uri": f"{world.storage.uri}/{world.night.run.prefix}",
        "units": NUM_UNITS,
        "computed": NUM_UNITS,
    }
    assert (tmp_path / "root" / "died").exists()
    assert (read_table(world, "candidates"), read_table(world, "users")) == expected
    units = units_of(world.storage, world.night.run)
    for unit in (1, 4):
        world.storage.delete(units.key(unit))
    assert retrieve.run(locally(world), world.night)["computed"] == 2
    assert (read_table(world, "candidates"), read_table(world, "users")) == expected
    assert sorted(units.done()) == list(range(NUM_UNITS))
    assert retrieve.run(world.settings, world.night) == outcome | {"status": "exists", "computed": 0}


@pytest.mark.ray
def test_actors_that_do_not_fit_are_refused_before_any_starts(local_ray, tmp_path):
    world = make_world(tmp_path, overrides=["cluster.replicas=9"])
    embed_corpora(LocalRunner(world.settings), world.night, world.settings)
    with pytest.raises(InputError, match=r"4 CPUs.*no place for .* lower the cluster"):
        retrieve.run(world.settings, world.night)


def test_searching_before_embedding_says_what_to_run(tmp_path):
    world = make_world(tmp_path, overrides=["cluster.mode=local"])
    with pytest.raises(InputError, match=r"run jobs/embed_items\.py first"):
        retrieve.run(world.settings, world.night)
