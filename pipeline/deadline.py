"""A time limit for a job."""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from pipeline.errors import InfrastructureError

# A job past its deadline is interrupted. A job that has not ended this many seconds later is killed.
GRACE_SECONDS = 120.0
INTERRUPT_AGAIN_SECONDS = 30.0

log = logging.getLogger("nightrails")


@contextmanager
def deadline(minutes: float, grace: float = GRACE_SECONDS) -> Iterator[None]:
    """Raise InfrastructureError when the block takes longer than `minutes`. For the main thread only.

    A cluster can hang where only another thread can see it. That thread interrupts the block as Ctrl-C does, so that
    Ray cleans up, and again when the block swallowed the interrupt. `grace` seconds later it ends the process with 30.
    """
    message = f"not finished within the deadline of {minutes:g} minutes (cluster.deadline_minutes); a rerun resumes"
    watcher = _Watcher(threading.get_ident(), minutes * 60, grace, message)
    with _interruptible():
        threading.Thread(target=watcher.watch, daemon=True).start()
        try:
            try:
                yield
            finally:
                watcher.finish()
        except KeyboardInterrupt:
            if not watcher.expired.is_set():
                raise
            raise InfrastructureError(message) from None
        except Exception as error:
            if not watcher.expired.is_set():
                raise
            raise InfrastructureError(message) from error


@dataclass(frozen=True)
class _Watcher:
    """Interrupts a thread after `seconds`, until it has finished; `grace` seconds later it ends the process."""

    thread_id: int
    seconds: float
    grace: float
    message: str
    finished: threading.Event = field(default_factory=threading.Event)
    expired: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def finish(self) -> None:
        """Say that the thread has finished. Afterwards no interrupt is under way, and none follows."""
        with self.lock:
            self.finished.set()

    def watch(self) -> None:
        """Wait, interrupt and kill; for a thread of its own."""
        if self.finished.wait(self.seconds):
            return
        log.error("%s", self.message)
        end = time.monotonic() + self.grace
        while (left := end - time.monotonic()) > 0:
            with self.lock:
                if self.finished.is_set():
                    return
                self.expired.set()
                signal.pthread_kill(self.thread_id, signal.SIGINT)  # also ends a wait on a lock
            if self.finished.wait(min(left, INTERRUPT_AGAIN_SECONDS)):
                return
        print(f"error: {self.message}", file=sys.stderr, flush=True)  # noqa: T201
        os._exit(InfrastructureError.exit_code)


@contextmanager
def _interruptible() -> Iterator[None]:
    """Let SIGINT raise KeyboardInterrupt; a shell starts background jobs with SIGINT ignored."""
    previous = signal.getsignal(signal.SIGINT)
    if previous not in (signal.SIG_IGN, signal.SIG_DFL, None):
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous or signal.SIG_DFL)
