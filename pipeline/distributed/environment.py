"""A check of the environment variables that Ray reads, before Ray is imported."""

import os
import re
import signal
import subprocess
import sys
from functools import cache
from pathlib import Path

from pipeline.errors import InputError

SETTING = re.compile("RAY_[a-z]")  # a setting of Ray's native code has its name in small letters


def check_environment() -> None:
    """Raise InputError for values that Ray does not refuse in words.

    Ray's native code ends the process at a setting that it cannot read, so a process of its own tries them. With a
    relative RAY_TMPDIR Ray's processes look in different folders, and Ray waits for them in vain.
    """
    folder = os.environ.get("RAY_TMPDIR")
    if folder is not None and not Path(folder).is_absolute():
        raise InputError(f"RAY_TMPDIR is {folder!r}; give a folder with its whole path, as in RAY_TMPDIR=/tmp")
    settings = tuple((name, value) for name, value in sorted(os.environ.items()) if SETTING.match(name))
    if not settings or _can_read(settings):
        return
    for name, value in settings:
        if not _can_read(((name, value),)):
            raise InputError(f"Ray cannot read the environment variable {name}={value!r}; correct or unset it")


@cache
def _can_read(settings: tuple[tuple[str, str], ...]) -> bool:
    """Whether a Python that has only these of Ray's settings can import Ray."""
    others = {name: value for name, value in os.environ.items() if not SETTING.match(name)}
    environment = others | dict(settings)
    done = subprocess.run([sys.executable, "-c", "import ray"], env=environment, capture_output=True, check=False)
    return done.returncode not in (-signal.SIGSEGV, -signal.SIGABRT)
