"""Lines that workers want a person to see. Of their output as it is, most is Ray's own and says nothing to anybody."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray.actor import ActorHandle

SECONDS_BETWEEN_LOOKS = 1.0

log = logging.getLogger("nightrails")


@ray.remote(num_cpus=0)
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
def messages_logged() -> Iterator[ActorHandle]:
    """Yields an actor to whose `say` workers send lines; the driver logs them as they come."""
    messages = Messages.remote()
    over = threading.Event()
    thread = threading.Thread(target=_log_all, args=(messages, over), daemon=True)
    thread.start()
    try:
        yield messages
    finally:
        over.set()
        thread.join(timeout=10)
        ray.kill(messages)


def _log_all(messages: ActorHandle, over: threading.Event) -> None:
    is_last = False
    while not is_last:
        is_last = over.wait(SECONDS_BETWEEN_LOOKS)
        try:
            for line in ray.get(messages.fetch.remote(), timeout=5):
                log.info("   %s", line)
        except ray.exceptions.RayError:  # the cluster is going; whoever needs it will say so
            return
