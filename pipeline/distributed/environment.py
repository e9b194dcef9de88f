"""A check of the environment variables that Ray reads, before Ray is imported."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
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
    names = [name for name in sorted(os.environ) if SETTING.match(name)]
    if not names or _can_read(names):
        return
    for name in names:
        if not _can_read([name]):
            raise InputError(
                f"Ray cannot read the environment variable {name}={os.environ[name]!r}; correct or unset it"
            )


def _can_read(names: Sequence[str]) -> bool:
    """Whether a Python that has only these of Ray's settings can import Ray."""
    environment = {name: value for name, value in os.environ.items() if name in names or not SETTING.match(name)}
    done = subprocess.run([sys.executable, "-c", "import ray"], env=environment, capture_output=True, check=False)
    return done.returncode not in (-signal.SIGSEGV, -signal.SIGABRT)
