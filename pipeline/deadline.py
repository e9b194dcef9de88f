"""The time that a job has."""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from pipeline.errors import InfrastructureError

# A job past its deadline is interrupted; when that does not end it, its process is ended this many seconds later.
GRACE_SECONDS = 120.0
INTERRUPT_AGAIN_SECONDS = 30.0

log = logging.getLogger("nightrails")


@contextmanager
def deadline(minutes: float, grace: float = GRACE_SECONDS) -> Iterator[None]:
    """Raise InfrastructureError when the block takes longer; what is done stays done. For the main thread only.

    Some hangs of a cluster can only be seen from outside. The thread is interrupted as by Ctrl-C, which Ray answers
    by cleaning up, and again in case the first was swallowed; a process that is stuck beyond that exits with 30.
    """
    over, expired, turn = threading.Event(), threading.Event(), threading.Lock()
    message = f"not finished within the deadline of {minutes:g} minutes (cluster.deadline_minutes); a rerun resumes"
    watched = threading.get_ident()
    arguments = (watched, minutes * 60, grace, over, expired, turn, message)
    with _interruptible():
        threading.Thread(target=_watch, args=arguments, daemon=True).start()
        try:
            try:
                yield
            finally:
                with turn:  # no interrupt is under way, and none follows
                    over.set()
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
    over: threading.Event,
    expired: threading.Event,
    turn: threading.Lock,
    message: str,
) -> None:
    if over.wait(seconds):
        return
    log.error("%s", message)
    end = time.monotonic() + grace
    while (left := end - time.monotonic()) > 0:
        with turn:
            if over.is_set():
                return
            expired.set()
            signal.pthread_kill(watched, signal.SIGINT)  # also ends a wait on a lock
        if over.wait(min(left, INTERRUPT_AGAIN_SECONDS)):
            return
    print(f"error: {message}", file=sys.stderr, flush=True)  # noqa: T201
    os._exit(InfrastructureError.exit_code)


@contextmanager
def _interruptible() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt: in a shell's background job it comes switched off."""
    previous = signal.getsignal(signal.SIGINT)
    if previous not in (signal.SIG_IGN, signal.SIG_DFL, None):
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous or signal.SIG_DFL)
