"""A line of Ray's that reads like a failure and is none, kept away from those who read a job's log.

Ray Data hands its actors their work as object references. Ray's C++ core then logs, as an error and once per process,
that such an actor cannot be restarted if those objects get lost. They cannot: Ray Data holds the references for as
long as the actors live, and the objects lie on the driver's own node. Ray 2.60 offers no other way to hand them over
(`max_restarts=0` would silence it, and end the night with the first lost actor), and no logger to switch off.
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
    """Have Ray print its notice now, where nobody reads it: it does not print it a second time."""
    with _standard_error_without(NOTICE):
        actor: Any = ray.remote(_Nobody).options(num_cpus=0, max_restarts=1).remote(ray.put(None))
    ray.kill(actor)


@contextmanager
def _standard_error_without(words: bytes) -> Iterator[None]:
    """Hold back all that is written to the file descriptor, by whatever language, then pass on the other lines."""
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as held_back:
        os.dup2(held_back.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
            os.close(kept)
            held_back.seek(0)
            for line in held_back:
                if words not in line:
                    os.write(2, line)
