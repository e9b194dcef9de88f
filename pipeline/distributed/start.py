"""Joining or starting Ray, and what it means for a scheduler when Ray refuses."""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import ray
from ray.exceptions import AuthenticationError

from pipeline.causes import causes
from pipeline.errors import InfrastructureError, InputError, NightrailsError
from pipeline.interrupts import signal_handlers_kept

LOCAL = "local"  # always starts a new instance, even on a machine where `ray start` has started a cluster
TOO_LONG = "AF_UNIX path length"  # in Ray's words for a folder whose sockets have too long names
TOKEN = Path(".ray/auth_token")  # below the home directory
SET_BY_RAY = "RAY_CLIENT_MODE"  # when it is imported
MAX_WORDS = 60  # of Ray's message
# A retry cannot help: an address, value or token that is malformed or missing, a folder that cannot be made.
REFUSALS = (
    AuthenticationError,
    ValueError,
    TypeError,
    ImportError,
    FileNotFoundError,
    NotADirectoryError,
    PermissionError,
)


def join_or_start(address: str) -> None:
    """Join the cluster at `address`, or start one for this process when it is LOCAL.

    Raises InputError when Ray refuses the environment, InfrastructureError when it does not come up or answer.
    """
    variables = [name for name in sorted(os.environ) if name.startswith("RAY_") and name != SET_BY_RAY]
    try:
        with signal_handlers_kept(), _process_group_kept():
            ray.init(
                address=address,
                logging_level=logging.ERROR,
                # Most of the workers' output is Ray's (Ray Train prints a line a second). Errors arrive as exceptions,
                # and lines for people come through pipeline/distributed/messages.py.
                log_to_driver=False,
                include_dashboard=False if address == LOCAL else None,
            )
    except Exception as error:
        raise refusal(address, error, variables) from error
    if address == LOCAL:
        _close_token_to_others(Path.home() / TOKEN)


def refusal(address: str, error: Exception, variables: Sequence[str]) -> NightrailsError:
    """Our error for what `ray.init` raised with these of Ray's environment variables set."""
    words = str(error).split() or [type(error).__name__]
    message = " ".join(words[:MAX_WORDS]) + (" …" if len(words) > MAX_WORDS else "")
    if TOO_LONG in message:
        return InputError(
            "the folder for temporary files has too long a name for Ray's sockets; set RAY_TMPDIR=/tmp, or to another "
            f"short path ({message})"
        )
    if any("AuthenticationError" in f"{type(cause).__name__} {cause}" for cause in causes(error)) and address != LOCAL:
        return InputError(
            f"the Ray cluster at {address!r} refuses this process's token: set RAY_AUTH_MODE=token, and put the "
            "cluster's token into ~/.ray/auth_token (or RAY_AUTH_TOKEN)"
        )
    if isinstance(error, REFUSALS):
        names = f" ({', '.join(variables)})" if variables else ""
        return InputError(f"Ray refuses its environment{names}: {message}")
    if address == LOCAL:
        return InfrastructureError(f"a local Ray did not start ({message}); run the same command again")
    return InfrastructureError(
        f"no Ray cluster at {address!r} ({message}). Is it up? If it asks for a token, this process needs "
        "RAY_AUTH_MODE=token in its environment, and the token in ~/.ray/auth_token"
    )


@contextmanager
def _process_group_kept() -> Iterator[None]:
    """Stay in the group of the terminal's job: `ray.init` leaves it, and then Ctrl-C does not reach this process."""
    group = os.getpgrp()
    try:
        yield
    finally:
        if os.getpgrp() != group:
            with suppress(OSError):  # all others of the group have ended
                os.setpgid(0, group)


def _close_token_to_others(token: Path) -> None:
    """Let only its owner read the token that Ray has written: it opens every local Ray of this person."""
    with suppress(OSError):  # there is none, or it is another person's
        if token.stat().st_mode & 0o077:
            token.chmod(0o600)
