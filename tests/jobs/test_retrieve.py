import os
import signal
from pathlib import Path

import pytest

from jobs import embed_items, retrieve
from pipeline.artifacts import FileEntry, Night
from pipeline.distributed import search
from pipeline.errors import InputError
from pipeline.io import night as night_module
from pipeline.io.publication.units import done_units, sidecar_key
from pipeline.settings import Settings
from pipeline.stages.search import ShardSearcher
from tests.distributed import worlds
from tests.distributed.worlds import World, make_world, read_table, without_ray

NUM_UNITS = 6
ONE_WAVE = [f"output.num_buckets={NUM_UNITS}", "cluster.threads_per_actor=2"]
TWO_WAVES = [*ONE_WAVE, "cluster.max_stages_per_wave=2"]


class DyingSearcher(ShardSearcher):
    """Ends its process, once, in the middle of a unit."""

    def __init__(self, storage_uri: str, night: Night, settings: Settings, entry: FileEntry) -> None:
        super().__init__(storage_uri, night, settings, entry)
        self._mark = Path(storage_uri) / "died"

    def __call__(self, unit: int, payload: bytes):
        found = super().__call__(unit, payload)
        if unit == 2 and not self._mark.exists():
            self._mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return found


def open_world(monkeypatch: pytest.MonkeyPatch, world: World) -> None:
    monkeypatch.setattr(night_module, "open_night", lambda settings, ds: (world.storage, world.night))


@pytest.fixture
def expected(tmp_path: Path):
    """What a search within one process finds."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        without_ray(monkeypatch)
        world = make_world(tmp_path / "expected", overrides=TWO_WAVES)
        worlds.retrieve(world)
        return read_table(world, "candidates"), read_table(world, "users")


@pytest.mark.ray
def test_a_run_is_the_same_on_ray_and_a_rerun_computes_only_what_is_missing(local_ray, tmp_path, monkeypatch, expected):
    world = make_world(tmp_path / "root", overrides=TWO_WAVES)
    open_world(monkeypatch, world)
    embedded = embed_items.run(world.settings, None)
    assert embedded["num_items"] == 120
    outcome = retrieve.run(world.settings, None)
    assert outcome == {
        "status": "retrieved",
        "run_id": world.night.run.run_id,
        "uri": f"{world.storage.uri}/{world.night.run.prefix}",
        "units": NUM_UNITS,
        "computed": NUM_UNITS,
    }
    assert (read_table(world, "candidates"), read_table(world, "users")) == expected
    for unit in (1, 4):
        world.storage.delete(sidecar_key(world.night.run, unit))
    ran = without_ray(monkeypatch)
    assert retrieve.run(world.settings, None)["computed"] == 2
    assert [units for _, units in ran] == [[1, 4], [1, 4]]
    assert (read_table(world, "candidates"), read_table(world, "users")) == expected
    assert sorted(done_units(world.storage, world.night.run)) == list(range(NUM_UNITS))
    ran.clear()
    assert retrieve.run(world.settings, None)["computed"] == 0
    assert not ran


@pytest.mark.ray
def test_a_searcher_killed_in_the_middle_of_a_unit_costs_no_row(local_ray, tmp_path, monkeypatch, expected):
    world = make_world(tmp_path / "root", overrides=ONE_WAVE)
    open_world(monkeypatch, world)
    monkeypatch.setattr(search, "ShardSearcher", DyingSearcher)
    with pytest.MonkeyPatch.context() as here:
        without_ray(here)
        embed_items.run(world.settings, None)
    assert retrieve.run(world.settings, None)["computed"] == NUM_UNITS
    assert (tmp_path / "root" / "died").exists()
    assert (read_table(world, "candidates"), read_table(world, "users")) == expected


@pytest.mark.ray
def test_what_does_not_fit_is_refused_before_anything_starts(local_ray, tmp_path, monkeypatch):
    world = make_world(tmp_path, overrides=["cluster.replicas=9"])
    open_world(monkeypatch, world)
    with pytest.MonkeyPatch.context() as here:
        without_ray(here)
        embed_items.run(world.settings, None)
    with pytest.raises(InputError, match=r"4 CPUs.*no place for .* lower the cluster"):
        retrieve.run(world.settings, None)


def test_searching_before_embedding_says_what_to_run(tmp_path, monkeypatch):
    world = make_world(tmp_path)
    open_world(monkeypatch, world)
    with pytest.raises(InputError, match=r"run jobs/embed_items\.py first"):
        retrieve.run(world.settings, None)
