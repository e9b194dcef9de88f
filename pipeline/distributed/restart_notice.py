"""Hiding a notice of Ray that reads like a failure but is none.

Ray Data passes object references to the constructors of its actors. Ray's C++ core then logs an error, once per
process: the actor could not be restarted if these objects were lost. They cannot be lost: Ray Data holds the references
as long as the actors live, and the objects are on the driver's node. Ray 2.60 has no logger to switch off, and
`max_restarts=0` would avoid the notice but end the night with the first dead actor.
"""

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

NOTICE = b"has constructor arguments in the object store and max_restarts > 0"


class _Nobody:
    def __init__(self, argument: object) -> None: ...


def swallow_restart_notice() -> None:
    """Make Ray print its notice now, into a temporary file: it prints the notice once per process."""
    with _standard_error_without(NOTICE):
        actor: Any = ray.remote(_Nobody).options(num_cpus=0, max_restarts=1).remote(ray.put(None))
    ray.kill(actor)


@contextmanager
def _standard_error_without(words: bytes) -> Iterator[None]:
    """Hold back standard error (the file descriptor, so that C++ is held too); then print the lines without `words`."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as held_back:
        os.dup2(held_back.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(stderr, 2)
            os.close(stderr)
            held_back.seek(0)
            for line in held_back:
                if words not in line:
                    os.write(2, line)
