"""A simulated night for studies of the cluster, run job by job as a person would from the command line."""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

JOB_FOLDER = Path(__file__).parents[2]
CONFIG = JOB_FOLDER.parent / "conf/nightly.yaml"
JOBS = (
    "simulate_log",
    "prepare",
    "count_pairs",
    "train",
    "choose_memory",
    "embed_items",
    "tune",
    "retrieve",
    "evaluate",
)
# The training is as short as it can be: only sizes matter here.
SHORT_TRAINING = ("train.max_epochs=1", "train.num_negatives=16", "model.max_length=20")


@contextmanager
def night_before(job: str, overrides: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """Run the jobs before `job` below a temporary root; yield the overrides for `job`. RuntimeError: one has failed."""
    with TemporaryDirectory() as root:
        settings = (f"root={root}", *SHORT_TRAINING, *overrides)
        for earlier in JOBS[: JOBS.index(job)]:
            done = subprocess.run(job_command(earlier, settings), capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{earlier} failed: {done.stderr}")
        yield settings


def job_command(job: str, overrides: Sequence[str]) -> list[str]:
    """The command line of one job."""
    flags = [part for override in overrides for part in ("--set", override)]
    return [sys.executable, str(JOB_FOLDER / f"{job}.py"), "--config", str(CONFIG), *flags]
