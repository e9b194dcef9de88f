"""Peak memory of one job against the number of users.

A log of 50 events per user is simulated for each number of users; a bucket holds 2,500 of them whatever their number.
The jobs before JOB run first; then JOB runs with a Ray of its own, and all its processes (driver, raylet, workers) are
watched: RSS, in which a shared page counts for each process that maps it; own and shared memory, in which it counts
once and program files do not count; shared memory (the object store) alone; the largest RSS of one process.
"""

import subprocess
import time
from dataclasses import astuple, dataclass

from jobs.studies.cluster.nights import job_command, night_before
from jobs.studies.machine import family, memory_of

EVENTS_PER_USER = 50
USERS_PER_BUCKET = 2_500
SECONDS_BETWEEN_LOOKS = 0.5
MIB = 1 << 20


@dataclass(frozen=True)
class Usage:
    """Bytes of a family of processes at one moment, or the largest value of each over time."""

    rss: int = 0
    own_and_shared: int = 0
    shared: int = 0
    largest_process: int = 0


def usage_of(root: int) -> Usage:
    """Look at a process and all its descendants."""
    each = [memory_of(process, "smaps_rollup") for process in family(root)]
    rss, own, shared = ([memory.get(name, 0) for memory in each] for name in ("Rss", "Pss_Anon", "Pss_Shmem"))
    return Usage(sum(rss), sum(own) + sum(shared), sum(shared), max(rss))


def peak_of(process: subprocess.Popen[str]) -> Usage:
    """Watch a process until it ends."""
    peak = Usage()
    while process.poll() is None:
        now = usage_of(process.pid)
        peak = Usage(*(max(pair) for pair in zip(astuple(peak), astuple(now), strict=True)))
        time.sleep(SECONDS_BETWEEN_LOOKS)
    return peak


def measure(job: str, num_users: int, overrides: list[str]) -> tuple[Usage, float]:
    """Run one night up to the job; return the job's peak and seconds."""
    sizes = (
        f"simulate.num_users={num_users}",
        f"simulate.num_events={EVENTS_PER_USER * num_users}",
        f"output.num_buckets={max(1, num_users // USERS_PER_BUCKET)}",
    )
    with night_before(job, (*sizes, *overrides)) as settings:
        begun = time.monotonic()
        command = job_command(job, settings)
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            peak = peak_of(process)
            assert process.stderr is not None
            if process.returncode:
                raise RuntimeError(f"{job} failed: {process.stderr.read()}")
        return peak, time.monotonic() - begun


def main(job: str, num_users: list[int], overrides: list[str]) -> None:
    """Print one line per number of users."""
    print("     users   RSS MiB  own + shared MiB  shared MiB  largest process MiB  seconds", flush=True)
    for number in num_users:
        peak, seconds = measure(job, number, overrides)
        print(
            f"{number:10,d} {peak.rss / MIB:9.0f} {peak.own_and_shared / MIB:17.0f} {peak.shared / MIB:11.0f} "
            f"{peak.largest_process / MIB:20.0f} {seconds:8.1f}",
            flush=True,
        )
