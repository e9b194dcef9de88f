"""Peak memory of prepare against the size of the log: python -m jobs.studies.cluster.memory 1000000 10000000

The log is simulated with 50 events per user, on 20,000 items. `rows_per_task` is the same for every size, and a bucket
holds 2,500 users whatever their number, so that there are more buckets in a larger log. Each size runs in a process of
its own, with a Ray of its own of 2 CPUs. Measured every quarter of a second: the largest RSS of this process, that of
the largest worker, and that of this process and all workers together (RSS counts a shared page for each that maps it).
"""

import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

EVENTS_PER_USER = 50
USERS_PER_BUCKET = 2_500
NUM_ITEMS = 20_000
ROWS_PER_TASK = 250_000
NUM_CPUS = 2
MIB = 1 << 20


def main() -> None:
    print("    events  buckets  driver MiB  worker MiB  all MiB  seconds", flush=True)
    for size in sys.argv[1:]:
        subprocess.run([sys.executable, "-m", "jobs.studies.cluster.memory", "--one", size], check=True)


def measure(num_events: int) -> None:
    import ray

    from pipeline.distributed.prepare import prepare
    from pipeline.io.night import open_night
    from pipeline.settings import Settings
    from pipeline.stages.prepare.tasks import open_job

    num_users = num_events // EVENTS_PER_USER
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings.model_validate(
            {
                "root": folder,
                "simulate": {
                    "num_users": num_users,
                    "num_items": NUM_ITEMS,
                    "num_events": num_events,
                    "bot_share": 0.0002,
                },
                "prepare": {"rows_per_task": ROWS_PER_TASK},
                "output": {"num_buckets": num_users // USERS_PER_BUCKET},
            }
        )
        subprocess.run([sys.executable, "-c", SIMULATE, settings.model_dump_json()], check=True)
        ray.init(address="local", num_cpus=NUM_CPUS, include_dashboard=False, logging_level="ERROR")
        job = open_job(settings, *open_night(settings))
        peaks = Peaks()
        started = time.monotonic()
        manifest = prepare(job)
        seconds = time.monotonic() - started
        driver, worker, everything = peaks.stop()
        ray.shutdown()
        assert manifest.counts["rows_read"] >= num_events
    buckets = settings.output.num_buckets
    print(
        f"{num_events:10,d}  {buckets:7d}  {driver / MIB:10.0f}  {worker / MIB:10.0f}  {everything / MIB:7.0f}  "
        f"{seconds:7.0f}",
        flush=True,
    )


SIMULATE = """
import sys
from pipeline.io.simulated import write_simulated_log
from pipeline.io.storage.base import open_storage
from pipeline.settings import Settings
settings = Settings.model_validate_json(sys.argv[1])
write_simulated_log(open_storage(settings.root), settings.simulate)
"""


class Peaks:
    """Watches this process and Ray's workers below it until stopped."""

    def __init__(self) -> None:
        self.driver = self.worker = self.everything = 0
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()

    def stop(self) -> tuple[int, int, int]:
        self.over.set()
        self.thread.join()
        return self.driver, self.worker, self.everything

    def _watch(self) -> None:
        while not self.over.wait(0.25):
            workers = [rss(pid) for pid in descendants(os.getpid()) if is_worker(pid)]
            driver = rss(os.getpid())
            self.driver = max(self.driver, driver)
            self.worker = max([self.worker, *workers])
            self.everything = max(self.everything, driver + sum(workers))


def descendants(root: int) -> list[int]:
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    found, waiting = [], [root]
    while waiting:
        parent = waiting.pop()
        children = [pid for pid, of in parents.items() if of == parent]
        found += children
        waiting += children
    return found


def is_worker(pid: int) -> bool:
    return b"ray::" in read(pid, "cmdline")


def rss(pid: int) -> int:
    """Bytes; 0 for a process that has ended."""
    for line in read(pid, "status").splitlines():
        if line.startswith(b"VmRSS:"):
            return int(line.split()[1]) * 1024
    return 0


def read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


if __name__ == "__main__":
    if sys.argv[1] == "--one":
        measure(int(sys.argv[2]))
    else:
        main()
