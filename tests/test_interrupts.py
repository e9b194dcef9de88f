"""A job that is told to stop, as a process of its own: its exit code, its last words, and the processes it leaves."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# `work` is what a job does; it says "ready" when the signal may come. Without a signal its last words are "ended: …".
JOB = """
import hashlib, os, signal, subprocess, sys, threading, time
from pipeline.errors import InputError
from pipeline.interrupts import Interrupts, signal_handlers_kept

def say(words):
    print(words, flush=True)

def ready():
    say("ready")

def for_ever():
    threading.Event().wait()  # on a lock, as in ray.get

interrupts = Interrupts(last_words=lambda error: say(f"last words: {{error}}"), patience={patience})
code = 0
try:
    with interrupts.ending_the_block():
        interrupts.set_deadline({minutes})
        {work}
    say("ended")
except BaseException as error:
    say(f"ended: {{type(error).__name__}}: {{error}}")
    code = getattr(error, "exit_code", 1)
interrupts.outcome_is_told(code)
{afterwards}
sys.exit(code)
"""


def start(
    work: str, patience: float = 60.0, minutes: float = 60.0, afterwards: str = "", **options: object
) -> subprocess.Popen[str]:
    lines = work.strip().replace("\n", "\n        ")
    program = JOB.format(work=lines, patience=patience, minutes=minutes, afterwards=afterwards)
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    options.setdefault("preexec_fn", lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL))  # as outside of nohup
    command = [sys.executable, "-c", program]
    job = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, **options)  # type: ignore[call-overload]
    if "ready" in work + afterwards:
        assert job.stdout is not None
        assert "ready\n" in (job.stdout.readline(), job.stdout.readline() if afterwards else "")
    return job


def end(job: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = job.communicate(timeout=30)
    return job.returncode, output.strip()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_ends_a_job_with_30_and_a_sentence(name):
    job = start("ready(); for_ever()")
    job.send_signal(getattr(signal, name))
    assert end(job) == (
        30,
        f"ended: InfrastructureError: stopped by {name}; run the same command again to resume",
    )


def test_a_job_of_a_shells_background_obeys_ctrl_c_and_one_of_nohup_outlives_the_terminal():
    """A shell starts the one with SIGINT ignored, nohup the other with SIGHUP ignored."""
    background = start("ready(); for_ever()", preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    background.send_signal(signal.SIGINT)
    assert end(background)[0] == 30
    nohup = start("ready(); time.sleep(0.5)", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    nohup.send_signal(signal.SIGHUP)
    assert end(nohup) == (0, "ended")


def test_more_signals_do_not_interrupt_the_clearing_up():
    job = start("try:\n    ready(); for_ever()\nfinally:\n    ready(); time.sleep(0.5); say('cleared up')")
    job.send_signal(signal.SIGTERM)
    assert job.stdout is not None
    assert job.stdout.readline() == "ready\n"
    job.send_signal(signal.SIGTERM)
    job.send_signal(signal.SIGINT)
    code, output = end(job)
    assert (code, output.splitlines()[0]) == (30, "cleared up")


SWALLOWS = "ready()\nwhile True:\n    try:\n        for_ever()\n    except KeyboardInterrupt:\n        pass"
IN_NATIVE_CODE = "ready(); hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"  # one call of minutes


@pytest.mark.parametrize("work", [SWALLOWS, IN_NATIVE_CODE], ids=["swallows interrupts", "native code"])
def test_a_job_that_does_not_end_soon_is_killed_and_still_has_last_words(work):
    job = start(work, patience=0.2)
    time.sleep(0.2)  # it is ready a moment before it is where it stays
    job.send_signal(signal.SIGTERM)
    code, output = end(job)
    assert (code, output.splitlines()[-1]) == (
        30,
        "last words: stopped by SIGTERM; run the same command again to resume",
    )


STUBBORN = "import os, signal, time; signal.signal(15, signal.SIG_IGN); print(os.getpid(), flush=True); time.sleep(60)"
CHILD = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {STUBBORN!r}])"


def test_what_the_job_has_started_ends_with_it():
    job = start(
        f"child = subprocess.Popen([sys.executable, '-c', {CHILD!r}], stdout=subprocess.PIPE, text=True)\n"
        "grandchild = child.stdout.readline().strip()  # it ignores SIGTERM\n"
        "try:\n    ready(); for_ever()\nfinally:\n    say(f'{child.pid} {grandchild}')"
    )
    job.send_signal(signal.SIGTERM)
    code, output = end(job)
    processes = output.splitlines()[0].split()
    assert (code, len(processes)) == (30, 2)
    for process in processes:
        wait_until_ended(process)


def wait_until_ended(process: str) -> None:
    """Wait until the process is gone or a zombie, which its new parent has yet to fetch."""
    stat = Path(f"/proc/{process}/stat")
    for _ in range(100):
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.02)
    raise AssertionError(f"process {process} is running")


def test_after_the_outcome_is_told_a_signal_ends_the_process_at_once_with_that_outcome():
    job = start("pass", afterwards="ready(); for_ever()")
    job.send_signal(signal.SIGTERM)
    assert end(job) == (0, "")


def test_a_signal_that_a_library_takes_for_an_exit_is_a_signal_all_the_same():
    """As `ray.init` does, whose handler stays."""
    job = start(
        "with signal_handlers_kept():\n"
        "    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))\n"
        "    ready(); for_ever()"
    )
    job.send_signal(signal.SIGTERM)
    assert end(job)[1].endswith("stopped by SIGTERM; run the same command again to resume")
    kept = start("with signal_handlers_kept():\n    signal.signal(signal.SIGTERM, signal.SIG_IGN)\nready(); for_ever()")
    kept.send_signal(signal.SIGTERM)
    assert end(kept)[0] == 30


OVER = r"not finished within the deadline of \S+ minutes \(cluster.deadline_minutes\); a rerun resumes"


@pytest.mark.parametrize(
    "work",
    [
        "for_ever()",
        "try:\n    for_ever()\nexcept KeyboardInterrupt:\n    raise KeyError('a task was cancelled') from None",
    ],
    ids=["a lock", "a library with words of its own"],
)
def test_a_job_past_its_deadline_ends_with_30(work):
    code, output = end(start(work, minutes=0.2 / 60))
    assert code == 30
    assert re.fullmatch(f"ended: InfrastructureError: {OVER}", output)


def test_a_job_stuck_beyond_its_deadline_is_killed():
    code, output = end(start(SWALLOWS, minutes=0.2 / 60, patience=0.2))
    assert code == 30
    assert re.fullmatch(f"last words: {OVER}", output.splitlines()[-1])


def test_a_job_within_its_deadline_is_left_alone():
    assert end(start("pass")) == (0, "ended")
    assert end(start("raise InputError('mine')")) == (20, "ended: InputError: mine")


def test_a_deadline_ends_no_job_that_has_ended_before_it():
    assert end(start("pass", minutes=0.1 / 60, afterwards="time.sleep(0.3); say('left alone')")) == (
        0,
        "ended\nleft alone",
    )
