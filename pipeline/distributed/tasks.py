"""Tasks on Ray, a limited number at a time."""

from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar

import ray

from pipeline.distributed.errors import ray_errors_translated
from pipeline.errors import InfrastructureError
from pipeline.stages.progress import SECONDS_BETWEEN_LINES, Progress

T = TypeVar("T")

MAX_RETRIES = 3  # of a task after its worker process died or the store or network failed


def run_tasks(label: str, function: Callable[..., T], arguments: Sequence[tuple[Any, ...]]) -> Generator[T, None, None]:
    """Yield `function(*arguments[i])` for every i, as the tasks finish; each task has one CPU.

    Only as many tasks as the cluster has CPUs are submitted at once, which bounds the memory of their results. Raises
    our own error as the task raised it. At an error, or when the generator is closed, running tasks are cancelled.
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
