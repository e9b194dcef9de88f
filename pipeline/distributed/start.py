"""Joining or starting Ray, and what it means for a scheduler when Ray refuses."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import ray
from ray.exceptions import AuthenticationError

from pipeline.errors import InfrastructureError, InputError, NightrailsError
from pipeline.interrupts import signal_handlers_kept

LOCAL = "local"  # always starts a new instance, even on a machine where `ray start` has started a cluster
LOOPBACK = "127.0.0.1"
TOO_LONG = "AF_UNIX path length"  # in Ray's words for a folder whose sockets have too long names
TOKEN = Path(".ray/auth_token")  # below the home directory
MAX_WORDS = 60  # of Ray's message


def join_or_start(address: str) -> None:
    """Join the cluster at `address`, or start one for this process when it is LOCAL.

    Raises InputError when Ray refuses the environment, InfrastructureError when it does not come up or answer.
    """
    try:
        with signal_handlers_kept(), _process_group_kept():
            ray.init(
                address=address,
                logging_level=logging.ERROR,
                # Most of the workers' output is Ray's (Ray Train prints a line a second). Errors arrive as exceptions,
                # and lines for people come through pipeline/distributed/messages.py.
                log_to_driver=False,
                **(_only_for_this_machine() if address == LOCAL else {}),
            )
    except Exception as error:
        raise refusal(address, error) from error
    if address == LOCAL:
        _close_token_to_others(Path.home() / TOKEN)


def refusal(address: str, error: Exception) -> NightrailsError:
    """Our error for what `ray.init` raised. A retry cannot help against a value that Ray refuses."""
    words = " ".join(str(error).split()[:MAX_WORDS]) or type(error).__name__
    if TOO_LONG in words:
        return InputError(
            f"the folder for temporary files has too long a name for Ray's sockets; set RAY_TMPDIR=/tmp, or to another "
            f"short path ({words})"
        )
    if isinstance(error, AuthenticationError | ValueError | TypeError | ImportError):
        where = "a local Ray" if address == LOCAL else f"RAY_ADDRESS {address!r}"
        return InputError(f"{where}: {words}")
    if address == LOCAL:
        return InfrastructureError(f"a local Ray does not start: {words}; run again")
    return InfrastructureError(
        f"no Ray cluster at {address!r} ({words}). Is it up? If it asks for a token, this process needs "
        "RAY_AUTH_MODE=token in its environment, and the token in ~/.ray/auth_token"
    )


def _only_for_this_machine() -> dict[str, object]:
    """Arguments of `ray.init`; a Ray whose node has this address listens to this machine only."""
    return {"include_dashboard": False, "_node_ip_address": LOOPBACK}


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
