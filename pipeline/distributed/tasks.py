"""Ray tasks, a bounded number at a time."""

from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar

import ray

from pipeline.distributed.errors import ray_errors_translated
from pipeline.errors import InfrastructureError
from pipeline.stages.progress import SECONDS_BETWEEN_LINES, Progress

T = TypeVar("T")

MAX_RETRIES = 3  # of a task whose worker died, or whose store failed


def run_tasks(label: str, function: Callable[..., T], arguments: Sequence[tuple[Any, ...]]) -> Generator[T, None, None]:
    """Results of `function(*arguments[i])` as tasks of one CPU finish, in any order.

    At most as many run as the cluster has CPUs, and no more are submitted than can run, so that memory is bounded by
    a few tasks. Our own errors come out as they are; what still runs is cancelled then.
    """
    remote: Any = ray.remote(function)
    task = remote.options(num_cpus=1, max_retries=MAX_RETRIES, retry_exceptions=[InfrastructureError, OSError])
    limit = max(1, int(ray.cluster_resources().get("CPU", 1)))
    waiting = list(reversed(arguments))
    running: list[ray.ObjectRef[T]] = []
    progress = Progress(label, len(arguments))
    try:
        with ray_errors_translated():
            while waiting or running:
                while waiting and len(running) < limit:
                    running.append(task.remote(*waiting.pop()))
                ready, running = ray.wait(running, num_returns=1, timeout=SECONDS_BETWEEN_LINES)
                for reference in ready:
                    yield ray.get(reference)
                progress.report(len(ready))
    finally:
        for reference in running:
            ray.cancel(reference)
