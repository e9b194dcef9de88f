import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from pipeline.deadline import deadline
from pipeline.errors import InfrastructureError


def test_a_block_within_its_deadline_is_left_alone():
    with deadline(minutes=1):
        pass
    with pytest.raises(KeyError), deadline(minutes=1):
        raise KeyError("mine")


@pytest.fixture(params=[signal.default_int_handler, signal.SIG_IGN], ids=["foreground", "background"])
def handler(request: pytest.FixtureRequest) -> Iterator[object]:
    """What a shell's job has for SIGINT: in the background it comes switched off."""
    before = signal.signal(signal.SIGINT, request.param)
    yield request.param
    signal.signal(signal.SIGINT, before)


def test_a_block_past_its_deadline_is_an_infrastructure_error(handler):
    with pytest.raises(InfrastructureError, match="deadline"), deadline(minutes=0.2 / 60):
        threading.Event().wait()  # on a lock, as in ray.get, and for ever
    assert signal.getsignal(signal.SIGINT) is handler, "as it was"


def wait_and_complain() -> None:
    """As Ray does, which has words of its own for being interrupted."""
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        raise KeyError("a task was cancelled") from None


def test_what_fails_past_the_deadline_has_failed_because_of_it():
    with pytest.raises(InfrastructureError, match="deadline") as caught, deadline(minutes=0.1 / 60):
        wait_and_complain()
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_person_who_interrupts_in_time_is_obeyed(handler):
    with pytest.raises(KeyboardInterrupt), deadline(minutes=1):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("ignores", ["signal.signal(signal.SIGINT, signal.SIG_IGN)", "pass"])
def test_a_process_stuck_beyond_its_deadline_exits_with_30(ignores: str):
    program = f"""
import os
import signal
from pipeline.deadline import deadline
{ignores}
with deadline(minutes=0.1 / 60, grace=0.5):
    while True:
        try:
            while True:
                pass
        except KeyboardInterrupt:
            pass
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == InfrastructureError.exit_code
    assert "deadline" in done.stderr


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RAY_ADDRESS": "127.0.0.1:9", "RAY_AUTH_MODE": "token"}, "no authentication token was found"),
        ({"RAY_ADDRESS": "http://127.0.0.1:9"}, "you set RAY_ADDRESS to an HTTP address"),
    ],
)
def test_an_address_or_token_that_is_wrong_by_itself_is_a_persons_business(environment, words, tmp_path):
    program = "from pipeline.distributed.cluster import *\ntry: connect(Settings())\nexcept InputError as e: print(e)"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=kept | {"HOME": str(tmp_path)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert words in done.stdout, done.stderr
