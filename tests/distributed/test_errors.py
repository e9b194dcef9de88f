"""The translation of the errors that Ray makes of ours."""

import importlib
import re

import pytest
from ray.exceptions import RayError

from pipeline.distributed.errors import ADVICE_OF_RAY, ray_errors_translated, translated
from pipeline.errors import InfrastructureError, InputError


def ray_ways_to_fail():
    """Pairs (name, call that fails): ways in which code on a cluster fails; Ray wraps each one differently."""
    import ray
    import ray.data

    def fails(*_: object) -> None:
        raise InputError("column 'x' is missing:\n  two lines")

    class FailsToStart:
        def __init__(self) -> None:
            fails()

        def __call__(self, batch: object) -> object:
            return batch

    task = ray.remote(max_retries=0)(fails)
    actor = ray.remote(FailsToStart)
    yield "task", lambda: ray.get(task.remote())
    yield "task of a task", lambda: ray.get(ray.remote(max_retries=0)(lambda: ray.get(task.remote())).remote())
    yield "actor", lambda: ray.get(actor.remote().__call__.remote(1))
    yield "data", lambda: ray.data.range(4).map_batches(fails).materialize()
    pool = ray.data.ActorPoolStrategy(size=1)
    yield "data actor", lambda: ray.data.range(4).map_batches(FailsToStart, compute=pool).materialize()


@pytest.mark.ray
def test_our_error_is_read_out_of_whatever_ray_makes_of_it(local_ray):
    for way, fail in ray_ways_to_fail():
        with pytest.raises(Exception) as caught:  # noqa: PT011  (Ray chooses the type)
            fail()
        error = translated(caught.value)
        assert (type(error), str(error)) == (InputError, "column 'x' is missing:\n  two lines"), way


@pytest.mark.ray
def test_a_package_that_a_node_lacks_is_named(local_ray, tmp_path, monkeypatch):
    """Only this process can import the module, like a package that is installed on the driver's node only."""
    import ray
    import ray.data

    def imports(*_: object) -> None:
        import nowhere  # noqa: F401

    (tmp_path / "only_here.py").write_text("class Stage:\n    def __call__(self, batch):\n        return batch\n")
    monkeypatch.syspath_prepend(tmp_path)
    stage = importlib.import_module("only_here").Stage
    pool = ray.data.ActorPoolStrategy(size=1)
    for missing, fail in (
        ("nowhere", lambda: ray.get(ray.remote(max_retries=0)(imports).remote())),
        ("nowhere", lambda: ray.data.range(2).map_batches(imports).materialize()),
        ("only_here", lambda: ray.get(ray.remote(stage).remote().__call__.remote(1))),
        ("only_here", lambda: ray.data.range(2).map_batches(stage, compute=pool).materialize()),
    ):
        with pytest.raises(Exception) as caught:  # noqa: PT011  (Ray chooses the type)
            fail()
        error = translated(caught.value)
        assert type(error) is InputError
        assert f"has no package '{missing}': install nightrails into the Python of every node" in str(error)
        assert re.search(r"on node \d+\.\d+\.\d+\.\d+ has", str(error))


@pytest.mark.ray
def test_a_fault_of_ours_on_the_cluster_is_not_taken_for_a_fault_of_the_cluster(local_ray):
    import ray
    import ray.data

    def divides(batch: object) -> object:
        return 1 / 0

    def times_out(batch: object) -> object:
        raise TimeoutError("the store did not answer")

    for function, kind in ((divides, RuntimeError), (times_out, OSError)):
        with pytest.raises(ray.exceptions.RayError) as caught:
            ray.data.range(4).map_batches(function).materialize()
        assert type(translated(caught.value)) is kind


TRACEBACK = """ray::StageActor() (pid=7, ip=10.0.0.3)
  File "pipeline/io/artifacts.py", line 58, in read_file
KeyError: 'a/b'

During handling of the above exception, another exception occurred:

pipeline.errors.InputError: a/b: gone since it was written;
  remove it

During handling of the above exception, another exception occurred:

pipeline.errors.InfrastructureError: a/b: gone or damaged; run again"""


def test_of_our_own_errors_in_a_traceback_the_outermost_is_meant():
    found = translated(RayError(TRACEBACK))
    assert (type(found), str(found)) == (InfrastructureError, "a/b: gone or damaged; run again")
    inner = translated(RayError(TRACEBACK.rpartition("\n\nDuring")[0]))
    assert (type(inner), str(inner)) == (InputError, "a/b: gone since it was written;\n  remove it")


def test_rays_advice_on_its_own_retries_is_no_part_of_our_message():
    advice = f"{ADVICE_OF_RAY}. Set max_errored_blocks to ignore it."
    for error in (InputError(f"no column 'x'{advice}"), RayError(f"pipeline.errors.InputError: no column 'x'{advice}")):
        found = translated(error)
        assert (type(found), str(found)) == (InputError, "no column 'x'")
    ours = InputError("no column 'x'")
    assert translated(ours) is ours


def test_an_error_that_is_not_rays_is_left_alone():
    with pytest.raises(ZeroDivisionError), ray_errors_translated():
        print(1 / 0)
