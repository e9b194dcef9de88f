"""The chain on Ray: attempts, accounting, lost nodes, and Ray's notice."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
import torch

from pipeline.distributed.chain import (
    LOADING,
    MAX_ATTEMPTS,
    MAX_TRIES,
    Pool,
    StageActor,
    check_accounted,
    row,
    run_chain,
    with_backoff,
)
from pipeline.distributed.cluster import connect
from pipeline.distributed.ledger import Ledger
from pipeline.distributed.restart_notice import NOTICE, _standard_error_without
from pipeline.errors import InfrastructureError, InputError
from pipeline.settings import Settings
from pipeline.stages.runner import Stage


class Dies:
    """A stage whose process is killed the first `times` times that it gets unit 1."""

    def __init__(self, marks: str, times: int) -> None:
        self._marks, self._times = Path(marks), times

    def __call__(self, unit: int, payload: bytes) -> bytes:
        if unit == 1:
            begun = len(list(self._marks.iterdir()))
            (self._marks / str(begun)).touch()
            if begun < self._times:
                os.kill(os.getpid(), signal.SIGKILL)
        return bytes(payload) + b"x"


@pytest.mark.parametrize("failure", [OSError("reset"), InfrastructureError("503")])
def test_storage_errors_are_tried_again(failure: Exception):
    calls = []

    def call() -> str:
        calls.append(1)
        if len(calls) < MAX_TRIES:
            raise failure
        return "done"

    assert with_backoff(call, wait_seconds=0.001) == "done"
    assert len(calls) == MAX_TRIES


def test_storage_errors_are_not_tried_for_ever():
    calls = []

    def call() -> None:
        calls.append(1)
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        with_backoff(call, wait_seconds=0.001)
    assert len(calls) == MAX_TRIES


def test_a_wrong_input_is_not_tried_again():
    calls = []

    def call() -> None:
        calls.append(1)
        raise InputError("no such column")

    with pytest.raises(InputError):
        with_backoff(call, wait_seconds=0.001)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("finished", "complaint"),
    [({0: 1}, r"lost \[1\]"), ({0: 1, 1: 2}, r"doubled \[1\]"), ({0: 1, 1: 1, 5: 1}, r"unknown \[5\]")],
)
def test_units_that_go_missing_or_come_twice_are_noticed(finished, complaint):
    with pytest.raises(InfrastructureError, match=complaint):
        check_accounted("search", [0, 1], finished)


def test_only_work_that_was_begun_and_not_ended_is_counted():
    ledger = Ledger()
    assert [ledger.begin(0, 7) for _ in range(3)] == [1, 2, 3]
    assert (ledger.begin(1, 7), ledger.begin(0, 8)) == (1, 1)  # another stage, another unit
    ledger.end(0, 7)
    assert ledger.begin(0, 7) == 1  # begun again because its result was lost with a node
    ledger.end(0, 9)  # a message that comes twice


def test_a_row_carries_any_payload():
    for payload in (b"", b"abc", bytes(range(256)) * 1000):
        table = row(7, payload)
        assert table["unit"].to_pylist() == [7]
        assert table["payload"].to_pylist() == [payload]


@pytest.mark.ray
def test_a_unit_that_always_ends_its_process_is_given_up_by_name(local_ray, tmp_path):
    connect(Settings(root=str(tmp_path)))
    stage = Pool(Stage(Dies, {"marks": str(tmp_path), "times": 99}), num_actors=1, num_cpus=0.25)
    with pytest.raises(InfrastructureError, match=f"unit 1 has ended the process of Dies {MAX_ATTEMPTS} times"):
        run_chain("test", [0, 1, 2], [stage], threads=1)
    assert len(list(tmp_path.iterdir())) == MAX_ATTEMPTS


class HereLedger:
    """A ledger in this process, called as a Ray actor is."""

    def __init__(self, ledger: Ledger) -> None:
        self.begin, self.end = SimpleNamespace(remote=ledger.begin), SimpleNamespace(remote=ledger.end)


@pytest.fixture
def ledger(monkeypatch: pytest.MonkeyPatch) -> Ledger:
    """The ledger of stage actors in this process."""
    kept = Ledger()
    monkeypatch.setattr(ray, "get_actor", lambda name: HereLedger(kept))
    monkeypatch.setattr(ray, "get", lambda value: value)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    return kept


@pytest.mark.parametrize("error", [MemoryError("400 GB"), torch.OutOfMemoryError("400 GB")])
def test_a_shard_that_does_not_fit_in_memory_is_named_with_the_way_out(ledger, error):
    def is_too_large() -> None:
        raise error

    stage = StageActor(Pool(Stage(is_too_large, {}), 1, 0.25), position=0, ledger="", threads=1)
    with pytest.raises(InfrastructureError, match=r"while it loads: \w+\('400 GB'\); raise corpus.num_shards"):
        stage(row(0, b""))


@pytest.mark.parametrize("num_actors", [1, 3])
def test_a_stage_whose_processes_always_die_while_they_load_is_given_up_by_name(ledger, num_actors):
    """Linux kills a process that takes too much memory, and Ray starts another for ever."""
    pool = Pool(Stage(Dies, {"marks": "", "times": 0}), num_actors, 0.25)
    for _ in range(MAX_ATTEMPTS + num_actors - 1):  # all actors may be loading at the same time
        ledger.begin(0, LOADING)
    stage = StageActor(pool, position=0, ledger="", threads=1)
    with pytest.raises(
        InfrastructureError, match=f"ended its process {MAX_ATTEMPTS} times while it loaded.*num_shards"
    ):
        stage(row(0, b""))
    ledger.end(0, LOADING)  # another actor of the stage has loaded
    assert StageActor(pool, position=0, ledger="", threads=1)(row(0, b"a")).num_rows == 1


@pytest.mark.ray
def test_a_chain_survives_the_loss_of_a_node(tmp_path):
    program = [sys.executable, "-m", "tests.distributed.losing_a_node", str(tmp_path)]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2_000:]


def test_only_the_notice_is_swallowed(capfd):
    with _standard_error_without(NOTICE):
        os.write(2, b"core_worker.cc: Actor " + NOTICE + b". See the issue.\nanother line\nno end")
    assert capfd.readouterr().err == "another line\nno end"
