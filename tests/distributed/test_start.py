"""Ray's refusals: each is one sentence, and 20 when a retry cannot help."""

import os
import stat
import subprocess
import sys

import pytest
from ray.exceptions import AuthenticationError

from pipeline.distributed.environment import check_environment
from pipeline.distributed.start import _close_token_to_others, refusal
from pipeline.errors import InfrastructureError, InputError

NO_CLUSTER = r"no Ray cluster at '10\.0\.0\.1:6379' \(.*Is it up\?"


@pytest.mark.parametrize(
    ("address", "error", "expected", "words"),
    [
        (
            "local",
            Exception("timed out during startup"),
            InfrastructureError,
            "did not start .timed out during startup",
        ),
        ("local", RuntimeError("\n".join(["died"] * 99)), InfrastructureError, "did not start .(died ){60}…"),
        ("local", OSError("No space left on device"), InfrastructureError, "did not start .No space left"),
        ("local", AssertionError(), InfrastructureError, "did not start .AssertionError"),
        (
            "local",
            PermissionError("[Errno 13] '/ray'"),
            InputError,
            r"refuses its environment \(RAY_TMPDIR\): .Errno 13",
        ),
        (
            "local",
            OSError("AF_UNIX path length cannot exceed 107 bytes: /a"),
            InputError,
            "set RAY_TMPDIR=/tmp.*107 bytes",
        ),
        ("local", ValueError("at least 75 MB"), InputError, "refuses its environment .*: at least 75 MB"),
        ("10.0.0.1:6379", ConnectionError("nobody"), InfrastructureError, NO_CLUSTER),
        ("10.0.0.1:6379", RuntimeError("version mismatch"), InfrastructureError, NO_CLUSTER),
        (
            "10.0.0.1:6379",
            AuthenticationError("bad"),
            InputError,
            "refuses this process's token: set RAY_AUTH_MODE=token",
        ),
    ],
)
def test_each_refusal_of_ray_is_one_sentence_and_the_exit_code_that_a_scheduler_needs(address, error, expected, words):
    with pytest.raises(expected, match=words) as caught:
        raise refusal(address, error, ["RAY_TMPDIR"])
    assert "\n" not in str(caught.value)


def test_a_wrong_token_is_found_in_the_words_behind_rays_error():
    try:
        raise RuntimeError("Last connection error: Traceback …\nray.exceptions.AuthenticationError: RPC error")
    except RuntimeError as error:
        failure = ConnectionError("Failed to connect to Ray cluster")
        failure.__cause__ = error
    assert type(refusal("10.0.0.1:6379", failure, [])) is InputError


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RAY_ADDRESS": "127.0.0.1:9", "RAY_AUTH_MODE": "token"}, "refuses this process's token: set RAY_AUTH_MODE"),
        ({"RAY_ADDRESS": "http://127.0.0.1:9"}, "you set RAY_ADDRESS to an HTTP address"),
        ({"RAY_TMPDIR": "/tmp/" + "long" * 30}, "too long a name for Ray's sockets; set RAY_TMPDIR=/tmp"),
    ],
)
def test_an_environment_that_is_wrong_by_itself_is_a_persons_business(environment, words, tmp_path):
    program = (
        "import os\nfrom pipeline.distributed.start import *\n"
        "try: join_or_start(os.environ.get('RAY_ADDRESS', LOCAL))\nexcept InputError as error: print(error)"
    )
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=kept | {"HOME": str(tmp_path)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert words in done.stdout, done.stderr


def test_a_setting_at_which_rays_native_code_would_crash_is_named(monkeypatch):
    monkeypatch.setenv("RAY_event_stats", "1")
    check_environment()
    monkeypatch.setenv("RAY_health_check_period_ms", "soon")
    with pytest.raises(InputError, match="cannot read the environment variable RAY_health_check_period_ms='soon'"):
        check_environment()


def test_a_relative_folder_for_temporary_files_is_refused(monkeypatch):
    monkeypatch.setenv("RAY_TMPDIR", "here")
    with pytest.raises(InputError, match="RAY_TMPDIR is 'here'; give a folder with its whole path"):
        check_environment()


def test_only_its_owner_reads_the_token(tmp_path):
    token = tmp_path / "auth_token"
    _close_token_to_others(token)  # there is none
    token.touch(0o644)
    _close_token_to_others(token)
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
