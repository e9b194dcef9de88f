"""Running jobs as a scheduler does: as a process, with an exit code and a last line of JSON."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]

# The smallest night that still has every part: held-out days, several shards and buckets, short lists.
TINY = {
    "simulate.num_users": 120,
    "simulate.num_items": 90,
    "simulate.num_events": 5_000,
    "simulate.num_days": 10,
    "model.dim": 16,
    "model.max_length": 16,
    "model.mol.component_dim": 8,
    "model.mol.query_hidden_dim": 16,
    "model.mol.gate_hidden_dim": 8,
    "train.max_epochs": 2,
    "train.num_negatives": 16,
    "corpus.num_shards": 3,
    "output.num_buckets": 3,
    "search.k": 20,
    "evaluate.cutoffs": "[10, 20]",
    "gates.min_lift_over_popularity": 0.0,
}


@dataclass(frozen=True)
class Ended:
    """The end of a job's process: exit code, last line and output."""

    code: int
    last_line: dict[str, Any]
    stdout: str
    stderr: str


def command_line(job: str, root: str, **keys: object) -> list[str]:
    sets = [f"--set={key}={value}" for key, value in (TINY | {"root": root} | keys).items()]
    return [
        sys.executable,
        str(REPOSITORY / "jobs" / f"{job}.py"),
        "--config",
        str(REPOSITORY / "conf" / "nightly.yaml"),
        *sets,
    ]


def run_job(
    job: str,
    root: str,
    environment: dict[str, str] | None = None,
    folder: Path = REPOSITORY,
    arguments: Sequence[str] = (),
    has_configuration: bool = True,
    **keys: object,
) -> Ended:
    """Run one job on the tiny simulated log below `root`, in `folder`, with the job's own arguments, or with these
    alone; keys with dots as `**{"a.b": value}`."""
    command = command_line(job, root, **keys)
    done = subprocess.run(
        [*(command if has_configuration else command[:2]), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | (environment or {}),
        cwd=folder,
        check=False,
    )
    lines = done.stdout.splitlines()
    return Ended(done.returncode, json.loads(lines[-1]) if lines else {}, done.stdout, done.stderr)
