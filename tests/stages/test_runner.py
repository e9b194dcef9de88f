"""The laws of `Runner`: each holds on the local runner and on Ray.

That both train the same model, tests/jobs/test_nightly.py shows: their nights end in the same table and metrics.
"""

from pathlib import Path

import pytest

from pipeline.errors import InputError
from pipeline.settings import Settings
from pipeline.stages.local import LocalRunner
from pipeline.stages.runner import Actors, Runner, Stage

MESSAGE = "column user_id is missing; name it in conf/sources"


@pytest.fixture(params=["local", pytest.param("ray", marks=pytest.mark.ray)])
def runner(request: pytest.FixtureRequest, tmp_path: Path) -> Runner:
    settings = Settings(root=str(tmp_path / "root"))
    if request.param == "local":
        return LocalRunner(settings)
    from pipeline.distributed.runner import RayRunner

    request.getfixturevalue("local_ray")
    return RayRunner(settings)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder that tasks and stages write to, in whatever process they run."""
    path = tmp_path / "marks"
    path.mkdir()
    return path


class Appends:
    """A stage that appends its name; it keeps each payload it gets in a file, and fails on a second one of a unit."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name

    def __call__(self, unit: int, payload: bytes) -> bytes:
        with (self._folder / f"{self._name} {unit}").open("xb") as file:
            file.write(payload)
        return bytes(payload) + self._name.encode()


class Refuses:
    """A stage that no unit passes."""

    def __call__(self, unit: int, payload: bytes) -> bytes:
        raise InputError(MESSAGE)


class CannotStart:
    """A stage that cannot be constructed."""

    def __init__(self, message: str) -> None:
        raise InputError(message)


def write_mark(folder: Path, number: int) -> int:
    (folder / str(number)).touch()
    return number


def refuse(number: int) -> int:
    raise InputError(MESSAGE)


def test_every_task_gives_its_result_once(runner, folder):
    arguments = [(folder, number) for number in range(9)]
    assert sorted(runner.run_tasks("test", write_mark, arguments)) == list(range(9))
    assert list(runner.run_tasks("test", write_mark, [])) == []


def test_when_the_results_are_closed_the_tasks_left_do_not_run(runner, folder):
    results = runner.run_tasks("test", write_mark, [(folder, number) for number in range(200)])
    next(results)
    results.close()
    assert 1 <= len(list(folder.iterdir())) < 200


def test_every_unit_passes_every_stage_once_and_in_order_whatever_the_number_of_actors(runner, folder):
    stages = [Stage(Appends, {"folder": folder, "name": kind.name}, kind) for kind in Actors]
    runner.run_chain("test", [3, 1, 4], stages)
    payloads = {"ONE": "", "REPLICAS": "ONE", "AS_MANY_AS_FIT": "ONEREPLICAS"}
    assert {file.name: file.read_text() for file in folder.iterdir()} == {
        f"{name} {unit}": payload for name, payload in payloads.items() for unit in (3, 1, 4)
    }


@pytest.mark.parametrize("stage", [Stage(Refuses, {}), Stage(CannotStart, {"message": MESSAGE})], ids=["call", "start"])
def test_our_error_in_a_stage_comes_out_as_it_was_raised(runner, folder, stage):
    with pytest.raises(InputError) as caught:
        runner.run_chain("test", [7], [Stage(Appends, {"folder": folder, "name": "first"}), stage])
    assert (type(caught.value), str(caught.value)) == (InputError, MESSAGE)


def test_our_error_in_a_task_comes_out_as_it_was_raised(runner):
    with pytest.raises(InputError) as caught:
        list(runner.run_tasks("test", refuse, [(7,)]))
    assert (type(caught.value), str(caught.value)) == (InputError, MESSAGE)


@pytest.mark.parametrize("num_shards", [1, 3, 1_000])
def test_a_wave_holds_at_least_one_shard_and_at_most_all(runner, num_shards):
    assert 1 <= runner.num_fitting([Stage(Refuses, {})] * num_shards, [Stage(Refuses, {})]) <= num_shards
