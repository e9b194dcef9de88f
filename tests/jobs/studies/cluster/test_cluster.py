"""The studies of the cluster on a night of a few hundred users, each job with a Ray of its own."""

import re
import subprocess
import sys

import pytest

from jobs import study

pytestmark = [pytest.mark.slow, pytest.mark.ray]
SMALL = ("simulate.num_items=200", "model.dim=16", "model.mol.query_hidden_dim=16", "corpus.num_shards=2")
SET = [word for override in SMALL for word in ("--set", override)]


@pytest.mark.parametrize("job", ["prepare", "retrieve"])
def test_the_memory_of_a_job_and_all_its_processes_is_seen(job: str, capsys: pytest.CaptureFixture[str]):
    study.main(["memory", job, "300", *SET])
    users, rss, own_and_shared, shared, largest, seconds = map(float, capsys.readouterr().out.splitlines()[-1].split())
    assert users == 300
    assert rss > own_and_shared > shared >= 0
    assert rss > largest > 100  # MiB: Ray's driver and workers are several processes, each with torch or polars
    assert seconds > 1


def test_the_search_is_timed_on_ray_and_in_this_process():
    """In a process of its own, which takes its Ray along when it ends."""
    words = ["ray-cost", "400", "300", "--set", "search.num_preselected=200"]
    printed = subprocess.run(
        [sys.executable, study.__file__, *words], capture_output=True, text=True, check=True
    ).stdout
    seconds = re.findall(r"on Ray ([\d.]+) s, in this process ([\d.]+) s", printed)
    assert all(float(value) > 0 for value in seconds[0])
