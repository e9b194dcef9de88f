"""How a job is ended from outside: by SIGTERM, Ctrl-C (SIGINT), SIGHUP, or its deadline.

The main thread may be anywhere: in an import, in a library's native code, in a wait for a cluster that hangs. So a
thread watches. What ends the job raises KeyboardInterrupt in the main thread, as Ctrl-C does, so that temporary files
are removed and tasks are cancelled. A job that has not ended some seconds later is killed.
"""

import atexit
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

from pipeline.errors import InfrastructureError

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
MAX_INTERRUPTS = 3  # a library may have swallowed one
SECONDS_AFTER_INTERRUPT = 2.0  # until the next, and after the last until the process is killed


class Interrupts:
    """Interrupts the main thread, which makes one of these for the life of its process.

    `reason` says why the job must end, and is "" until then. When the job does not end `patience` seconds after any of
    MAX_INTERRUPTS, `last_words` gets the error, and the process ends with its exit code.
    """

    def __init__(
        self, last_words: Callable[[InfrastructureError], None], patience: float = SECONDS_AFTER_INTERRUPT
    ) -> None:
        self.reason = ""
        self._last_words, self._patience = last_words, patience
        self._main_thread = threading.get_ident()
        self._deadline, self._after_deadline = math.inf, ""
        self._is_raised = False
        self._is_stopped, self._is_over, self._is_told = threading.Event(), threading.Event(), threading.Event()
        self._exit_code = InfrastructureError.exit_code
        self._reader, self._writer = socket.socketpair()  # Python writes the number of each signal to the writer

    @contextmanager
    def ending_the_block(self) -> Iterator[None]:
        """Raise InfrastructureError when the block was interrupted; whatever fails after that fails because of it."""
        try:
            try:
                self._start()
                yield
            finally:
                self._is_over.set()
        except BaseException as error:
            self._is_over.set()
            if isinstance(error, SystemExit):  # ray.init answers SIGTERM so; the watcher knows of the signal too
                self._is_stopped.wait(1.0)
            if not self.reason:
                raise
            raise InfrastructureError(self.reason) from error

    def set_deadline(self, minutes: float) -> None:
        """Interrupt the block `minutes` from now."""
        self._after_deadline = (
            f"not finished within the deadline of {minutes:g} minutes (cluster.deadline_minutes); a rerun resumes"
        )
        self._deadline = time.monotonic() + minutes * 60
        self._writer.send(b"\0")  # wakes the watcher

    def outcome_is_told(self, exit_code: int) -> None:
        """Say that the last line is out. A process that was stopped ends now; from now on a signal ends it at once.

        Such an end leaves out Ray's own, which may take long, hang, or abort the process.
        """
        self._exit_code = exit_code
        self._is_told.set()
        if self.reason:
            end_process(exit_code)

    def _start(self) -> None:
        self._writer.setblocking(False)
        signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # ignored: started by nohup
                signal.signal(number, self._handle)
        threading.Thread(target=self._watch, daemon=True).start()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Interrupt the main thread. Further signals change nothing: they would interrupt the clearing up."""
        self._note(number)
        if not self._is_raised and not self._is_over.is_set():
            self._is_raised = True
            raise KeyboardInterrupt

    def _note(self, number: int) -> None:
        if not self.reason:
            self.reason = f"stopped by {signal.Signals(number).name}; run the same command again to resume"
            self._is_stopped.set()

    def _watch(self) -> None:
        """Wait for a signal or the deadline, then see to it that the process ends; for a thread of its own."""
        self._wait()
        for _ in range(MAX_INTERRUPTS - 1):
            if self._is_over.wait(self._patience):
                break
            self._interrupt()
        if self._is_over.wait(self._patience):
            self._is_told.wait(self._patience)
        else:
            self._last_words(InfrastructureError(self.reason))
        end_process(self._exit_code)

    def _wait(self) -> None:
        """Return when there is a reason to end."""
        while not self.reason:
            left = math.inf if self._is_over.is_set() else self._deadline - time.monotonic()
            if left <= 0:
                self.reason = self._after_deadline
                self._interrupt()
                return
            self._reader.settimeout(None if math.isinf(left) else left)
            with suppress(TimeoutError):
                for number in self._reader.recv(64):
                    if number in SIGNALS:
                        self._note(number)

    def _interrupt(self) -> None:
        self._is_raised = False
        signal.pthread_kill(self._main_thread, signal.SIGINT)  # also ends a wait on a lock


@contextmanager
def signal_handlers_kept() -> Iterator[None]:
    """Put our handlers back after the block: `ray.init` replaces that of SIGTERM."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def leave(exit_code: int) -> NoReturn:
    """End this process as sys.exit does, with all exit handlers, but leave the interpreter standing.

    While Python 3.11 tears itself down, a thread of a library that lets go of one of Python's objects, as those of
    pyarrow do some time after a file was read, aborts the process: exit code 134 for a job that has done its work.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # nobody reads it; the exit code still counts
            stream.flush()
    os._exit(exit_code)


def end_process(exit_code: int) -> None:
    """End this process now, and the processes that it has started with theirs."""
    processes: list[int] = []
    while new := [process for process in _descendants(os.getpid()) if process not in processes]:
        for process in new:
            _send(process, signal.SIGSTOP)  # a stopped process starts no other
        processes += new
    for process in processes:
        _send(process, signal.SIGKILL)
    os._exit(exit_code)


def _send(process: int, number: signal.Signals) -> None:
    with suppress(OSError):  # it has ended, or is another person's
        os.kill(process, number)


def _descendants(ancestor: int) -> list[int]:
    """The processes that `ancestor` has started, the processes that these have started, and so on."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            parent = path.read_text(errors="replace").rpartition(")")[2].split()[1]
            children.setdefault(int(parent), []).append(int(path.parent.name))
    found = list(children.get(ancestor, []))
    for process in found:
        found += children.get(process, [])
    return found
