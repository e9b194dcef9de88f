"""The translation of Ray's errors into ours, by which a scheduler decides; no other file reads Ray's errors."""

import builtins
import re
from collections.abc import Iterator
from contextlib import contextmanager

from ray.data.exceptions import ExecutionTimeoutError
from ray.exceptions import RayTaskError

from pipeline import errors
from pipeline.causes import causes, library_of, missing_package, own_error
from pipeline.errors import InfrastructureError, InputError, NightrailsError

# Ray Data may append advice about its retries to the message of an error.
ADVICE_OF_RAY = "\nFailed to apply UDF transform"
RAISED = re.compile(rf"^(?:[\w.]+\.)?(\w+): (.*?)(?=\n\n|{ADVICE_OF_RAY}|\Z)", re.MULTILINE | re.DOTALL)
# Without a dot in the name: a missing part of an installed package is a fault of our code, not of the installation.
MISSING_MODULE = re.compile(
    r"^(?:ModuleNotFoundError|[\w.]*RaySystemError: System error): No module named '([^'.]+)'", re.MULTILINE
)
ON_NODE = re.compile(r"\bip=([^,)\s]+)")
PYTHON_OF_A_FRAME = re.compile(r'File "([^"]+)/lib/python[\d.]+/')
OUR_OWN = ("pipeline", "jobs")


@contextmanager
def ray_errors_translated() -> Iterator[None]:
    """Raise `translated(error)` instead of an error of the block."""
    try:
        yield
    except Exception as error:
        translation = translated(error)
        if translation is error:
            raise
        raise translation from error


def translated(error: Exception) -> Exception:
    """Our own error if it caused Ray's, else the stage's own exception, else InfrastructureError.

    An error that Ray did not raise is returned as it is. The cause of Ray's error is an attribute in a plain task
    (`cause`) and in training (`worker_failures`). Ray Data and dying actors keep only the text of the remote traceback,
    from which the exception is read back.
    """
    ours = own_error(error)
    if ours is not None:
        message, advice, _ = str(ours).partition(ADVICE_OF_RAY)
        return type(ours)(message) if advice else ours
    chain = list(causes(error))
    texts = [str(cause) for cause in chain if library_of(cause) == "ray"]
    read_back = [raised for text in texts if (raised := _from_traceback(text)) is not None]
    for raised in sorted(read_back, key=lambda raised: not isinstance(raised, NightrailsError)):
        return raised
    for cause in chain:
        if isinstance(cause, ExecutionTimeoutError):
            return InfrastructureError(
                "no unit finished a stage for cluster.no_progress_minutes, nor for cluster.wait_minutes; is a node "
                "missing? If a unit takes longer, raise output.num_buckets or cluster.no_progress_minutes. "
                + str(cause).splitlines()[0]
            )
        if isinstance(cause, RayTaskError) and isinstance(cause.cause, Exception):
            return cause.cause
    if library_of(error) == "ray":
        return InfrastructureError(f"Ray gave up: {' '.join(str(error).split())[:500]}; run again to resume")
    return error


def _from_traceback(text: str) -> Exception | None:
    """Our own outermost exception in a printed traceback; else a missing package; else the innermost exception.

    None when the innermost exception is not one of Python's built-in exceptions.
    """
    raised = RAISED.findall(text)
    for name, message in reversed(raised):
        kind = getattr(errors, name, None)
        if isinstance(kind, type) and issubclass(kind, NightrailsError):
            return kind(message.strip())
    if missing := _missing_on_a_node(text):
        return missing
    for name, message in raised[:1]:
        kind = getattr(builtins, name, None)
        if isinstance(kind, type) and issubclass(kind, Exception):
            return (OSError if issubclass(kind, OSError) else RuntimeError)(f"{name}: {message.strip()}")
    return None


def _missing_on_a_node(text: str) -> InputError | None:
    """The error for a package that the Python of a worker lacks, ours included; None for another traceback."""
    module = MISSING_MODULE.search(text)
    if module is None:
        return None
    python, node = PYTHON_OF_A_FRAME.search(text), ON_NODE.search(text)
    return missing_package(
        "nightrails" if module[1] in OUR_OWN else module[1],
        f"the Python in {python[1]}" if python else "the Python of Ray's workers",
        f"node {node[1]}" if node else "a node",
    )
