"""A time limit for a job."""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

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
    finished, expired, lock = threading.Event(), threading.Event(), threading.Lock()
    message = f"not finished within the deadline of {minutes:g} minutes (cluster.deadline_minutes); a rerun resumes"
    watched = threading.get_ident()
    arguments = (watched, minutes * 60, grace, finished, expired, lock, message)
    with _interruptible():
        threading.Thread(target=_watch, args=arguments, daemon=True).start()
        try:
            try:
                yield
            finally:
                with lock:  # no interrupt is under way, and none follows
                    finished.set()
        except KeyboardInterrupt:
            if not expired.is_set():
                raise
            raise InfrastructureError(message) from None
        except Exception as error:
            if not expired.is_set():
                raise
            raise InfrastructureError(message) from error


def _watch(
    watched: int,
    seconds: float,
    grace: float,
    finished: threading.Event,
    expired: threading.Event,
    lock: threading.Lock,
    message: str,
) -> None:
    """Interrupt the thread `watched` after `seconds` until `finished` is set; `grace` seconds later end the process."""
    if finished.wait(seconds):
        return
    log.error("%s", message)
    end = time.monotonic() + grace
    while (left := end - time.monotonic()) > 0:
        with lock:
            if finished.is_set():
                return
            expired.set()
            signal.pthread_kill(watched, signal.SIGINT)  # also ends a wait on a lock
        if finished.wait(min(left, INTERRUPT_AGAIN_SECONDS)):
            return
    print(f"error: {message}", file=sys.stderr, flush=True)  # noqa: T201
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
