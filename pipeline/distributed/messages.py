"""Log lines from workers to the job's log. The workers' output itself is not shown: most of it is Ray's own."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.actor import ActorHandle

SECONDS_BETWEEN_FETCHES = 1.0

log = logging.getLogger("nightrails")


class Messages:
    """An actor that keeps the lines of the workers until the driver fetches them."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def say(self, line: str) -> None:
        self._lines.append(line)

    def fetch(self) -> list[str]:
        lines, self._lines = self._lines, []
        return lines


@contextmanager
def messages_logged() -> Iterator[ActorHandle[Messages]]:
    """Yield a `Messages` actor; a thread of the driver logs the lines that workers send to its `say`."""
    from pipeline.distributed.cluster import on_this_node  # imports torch, which the actor's process does not need

    messages: Any = ray.remote(Messages).options(num_cpus=0, scheduling_strategy=on_this_node()).remote()
    is_over = threading.Event()
    thread = threading.Thread(target=_log_all, args=(messages, is_over), daemon=True)
    thread.start()
    try:
        yield messages
    finally:
        is_over.set()
        thread.join(timeout=10)
        ray.kill(messages)


def _log_all(messages: ActorHandle[Messages], is_over: threading.Event) -> None:
    is_last = False
    while not is_last:
        is_last = is_over.wait(SECONDS_BETWEEN_FETCHES)
        try:
            lines: list[str] = ray.get(messages.fetch.remote(), timeout=5)
            for line in lines:
                log.info("   %s", line)
        except ray.exceptions.RayError:  # the cluster is going away, and the training itself will fail with that error
            return
