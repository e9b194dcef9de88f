"""Tasks on Ray whose worker processes die."""

import os
import signal
from pathlib import Path

import pytest

from pipeline.distributed.tasks import run_tasks


def dies_once(marker: str, number: int) -> int:
    """A task whose worker is killed the first time it runs."""
    if number == 1 and not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_a_task_whose_worker_is_killed_runs_again(tmp_path):
    marker = tmp_path / "died"
    results = run_tasks("counting", dies_once, [(str(marker), number) for number in range(6)])
    assert sorted(results) == [0, 1, 2, 3, 4, 5]
    assert marker.exists()
