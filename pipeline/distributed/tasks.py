"""Ray tasks, a bounded number at a time."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import ray
from ray.exceptions import RayTaskError

from pipeline.errors import InfrastructureError, NightrailsError

T = TypeVar("T")
log = logging.getLogger("nightrails")

LOG_EVERY_SECONDS = 60.0
MAX_RETRIES = 3  # of a task whose worker died, or whose store failed


def run_tasks(what: str, function: Callable[..., T], arguments: Sequence[tuple[Any, ...]]) -> Iterator[T]:
    """Results of `function(*arguments[i])` as tasks of one CPU finish, in any order.

    At most as many run as the cluster has CPUs, and no more are submitted than can run, so that memory is bounded by
    a few tasks. Our own errors come out as they are; what still runs is cancelled then.
    """
    task = ray.remote(num_cpus=1, max_retries=MAX_RETRIES, retry_exceptions=[InfrastructureError, OSError])(function)
    limit = max(1, int(ray.cluster_resources().get("CPU", 1)))
    waiting = list(reversed(arguments))
    running: list[ray.ObjectRef[T]] = []
    progress = _Progress(what, len(arguments))
    try:
        while True:
            while waiting and len(running) < limit:
                running.append(task.remote(*waiting.pop()))
            if not running:
                return
            ready, running = ray.wait(running, num_returns=1, timeout=LOG_EVERY_SECONDS)
            for reference in ready:
                yield _result(reference)
            progress.report(len(ready))
    finally:
        for reference in running:
            ray.cancel(reference)


def _result(reference: Any) -> Any:
    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, NightrailsError):
            raise error.cause from None
        raise


class _Progress:
    """One line a minute: how much is done, and how long the rest takes at this pace."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total, self.done = what, total, 0
        self.started = self.reported = time.monotonic()

    def report(self, finished: int) -> None:
        self.done += finished
        now = time.monotonic()
        if now - self.reported < LOG_EVERY_SECONDS or not self.done:
            return
        self.reported = now
        left = (now - self.started) / self.done * (self.total - self.done)
        log.info("%s: %d of %d, about %.0f s left", self.what, self.done, self.total, left)
