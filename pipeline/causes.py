"""Find the cause behind an exception: one of our own errors, or a package that is not installed."""

from collections.abc import Iterator

from pipeline import errors
from pipeline.errors import InputError, NightrailsError


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield the error and all errors behind it, nearest first: causes, contexts that are not suppressed, and the errors
    that Ray keeps in the attributes `cause` (of a task) and `worker_failures` (of training, by worker)."""
    seen: list[BaseException] = []
    queue: list[BaseException | None] = [error]
    while queue:
        current = queue.pop(0)
        if current is None or any(current is known for known in seen):
            continue
        seen.append(current)
        yield current
        context = None if current.__suppress_context__ else current.__context__
        workers = getattr(current, "worker_failures", None)
        queue += [getattr(current, "cause", None), current.__cause__, context]
        queue += workers.values() if isinstance(workers, dict) else ()


def own_error(error: BaseException) -> NightrailsError | None:
    """The nearest of our own errors behind `error`, or None.

    Only classes of errors.py count: Ray's RayTaskError(InputError) is an InputError too, but its text is a traceback.
    """
    own_errors = (
        cause
        for cause in causes(error)
        if isinstance(cause, NightrailsError) and type(cause).__module__ == errors.__name__
    )
    return next(own_errors, None)


def library_of(error: BaseException) -> str:
    """The package that the error's class comes from."""
    return type(error).__module__.partition(".")[0]


def missing_package(name: str, python: str, host: str) -> InputError:
    """Build the error for a Python (`python` is its path) that lacks a package that we need."""
    return InputError(
        f"{python} on {host} has no package {name!r}: install nightrails into the Python of every node "
        "(`pip install --constraint constraints.txt .` in its folder), or use the image of infra/Dockerfile"
    )
