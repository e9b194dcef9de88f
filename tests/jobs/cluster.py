"""A Ray cluster of one node, started and used by the shell lines of README.md and ended by process id.

A folder of their own below /tmp (Ray's sockets need a short path) is HOME and Ray's folder for temporary files. The
lines run in a folder below it, which holds a copy of the code and a tiny night as conf/nightly.yaml. No file of Ray's
lies in that one: Ray computes the hash of what it packs twice, and a log that grows in between would make it look for a
package that is not there.
"""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline.config import apply_overrides, read_yaml
from tests.jobs.nightly import REPOSITORY, TINY, Ended

# A cluster by these lines listens at fixed ports; here `ray` is a function that gives it free ones.
RAY_WITH_FREE_PORTS = """
ray() {{
    if [ "$1" = start ]; then shift; command ray start --disable-usage-stats {ports} "$@"; else command ray "$@"; fi
}}
"""
PORTS = ("--port", "--dashboard-port", "--dashboard-agent-listen-port", "--ray-client-server-port")


@dataclass(frozen=True)
class ReadmeCluster:
    """The home in which README.md's lines run, and the Ray that they start there."""

    folder: Path

    @property
    def checkout(self) -> Path:
        """The folder in which the lines run."""
        return self.folder / "checkout"

    @property
    def root(self) -> str:
        """The folder of the artifacts of a submitted job that sets no root: below the home directory."""
        return str(self.folder / "nightrails-data")

    def run(self, lines: list[str]) -> Ended:
        """Run the lines in a fresh shell; the last line of JSON that they print is the job's."""
        done = subprocess.run(
            ["bash", "-euo", "pipefail"],
            input=RAY_WITH_FREE_PORTS.format(ports=" ".join(_free_ports())) + "\n".join(lines) + "\n",
            cwd=self.checkout,
            env=self._environment(),
            capture_output=True,
            text=True,
            check=False,
        )
        printed = [line for line in done.stdout.splitlines() if line.startswith('{"status"')]
        return Ended(done.returncode, json.loads(printed[-1]) if printed else {}, done.stdout, done.stderr)

    def stop(self) -> None:
        """End every process that has this cluster's folder in its environment, and no other."""
        while processes := list(self._processes()):
            for process in processes:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            time.sleep(0.1)

    def _environment(self) -> dict[str, str]:
        """The environment of a fresh shell; of Ray's variables only the folder of its temporary files."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "NIGHTRAILS_"))}
        return kept | {"HOME": str(self.folder), "RAY_TMPDIR": str(self.folder), "PYTHONPATH": ""}

    def _processes(self) -> Iterator[int]:
        mark = f"RAY_TMPDIR={self.folder}".encode()
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with suppress(OSError):  # ended, or another person's
                    if mark in (entry / "environ").read_bytes().split(b"\0"):
                        yield int(entry.name)


@contextmanager
def readme_cluster(**keys: Any) -> Iterator[ReadmeCluster]:
    """A home to run README.md's lines in, with a tiny night; the Ray that they start is ended afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="nr-", dir="/tmp"))
    cluster = ReadmeCluster(folder)
    try:
        checkout = cluster.checkout
        for name in ("pipeline", "jobs", "conf"):
            shutil.copytree(REPOSITORY / name, checkout / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(REPOSITORY / ".rayignore", checkout)
        (checkout / "conf" / "nightly.yaml").write_text(_tiny_night(checkout / "conf" / "nightly.yaml", keys))
        (checkout / ".venv" / "bin").mkdir(parents=True)
        (checkout / ".venv" / "bin" / "activate").write_text(f'export PATH="{Path(sys.executable).parent}:$PATH"\n')
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


def readme_lines() -> list[str]:
    """The shell lines between <!-- cluster --> and <!-- /cluster --> of README.md."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    found = re.search(r"<!-- cluster -->\s*```sh\n(.*?)```\s*<!-- /cluster -->", text, re.DOTALL)
    assert found, "README.md has no shell lines between <!-- cluster --> and <!-- /cluster -->"
    return found[1].splitlines()


def _tiny_night(shipped: Path, keys: dict[str, Any]) -> str:
    overrides = [f"{key}={value}" for key, value in (TINY | keys).items()]
    return yaml.safe_dump(apply_overrides(read_yaml(shipped), overrides))


def _free_ports() -> list[str]:
    with ExitStack() as sockets:
        bound = [sockets.enter_context(socket.socket()) for _ in PORTS]
        for each in bound:
            each.bind(("", 0))
        return [f"{option}={each.getsockname()[1]}" for option, each in zip(PORTS, bound, strict=True)]
