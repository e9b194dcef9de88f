"""Lines that workers want a person to see. Of their output as it is, most is Ray's own and says nothing to anybody."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.actor import ActorHandle

SECONDS_BETWEEN_LOOKS = 1.0

log = logging.getLogger("nightrails")


class Messages:
    """Keeps what workers say until the driver fetches it."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def say(self, line: str) -> None:
        self._lines.append(line)

    def fetch(self) -> list[str]:
        lines, self._lines = self._lines, []
        return lines


@contextmanager
def messages_logged() -> Iterator[ActorHandle[Messages]]:
    """Yields an actor to whose `say` workers send lines; the driver logs them as they come."""
    messages: Any = ray.remote(Messages).options(num_cpus=0).remote()
    over = threading.Event()
    thread = threading.Thread(target=_log_all, args=(messages, over), daemon=True)
    thread.start()
    try:
        yield messages
    finally:
        over.set()
        thread.join(timeout=10)
        ray.kill(messages)


def _log_all(messages: ActorHandle[Messages], over: threading.Event) -> None:
    is_last = False
    while not is_last:
        is_last = over.wait(SECONDS_BETWEEN_LOOKS)
        try:
            lines: list[str] = ray.get(messages.fetch.remote(), timeout=5)
            for line in lines:
                log.info("   %s", line)
        except ray.exceptions.RayError:  # the cluster is going; whoever needs it will say so
            return
