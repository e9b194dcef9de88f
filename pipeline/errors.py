"""What can go wrong, in the words of the exit codes that a scheduler branches on."""

from collections.abc import Iterator


class NightrailsError(Exception):
    """Base of our errors; `exit_code` is what the job's process returns."""

    exit_code = 1


class InputError(NightrailsError, ValueError):
    """What a person gave us (configuration, log, catalogue, credentials) is wrong; a retry cannot help."""

    exit_code = 20


class MismatchError(InputError):
    """Two artifacts do not belong together."""


class GateError(NightrailsError):
    """A quality gate said no; what was published before stays."""

    exit_code = 10


class InvalidRunError(GateError):
    """Rows of a run break a promise; the run is not published."""


class InfrastructureError(NightrailsError, RuntimeError):
    """The cluster, the network or the store failed; a retry resumes."""

    exit_code = 30


class ConflictError(NightrailsError, RuntimeError):
    """Another run holds the lease or has published meanwhile; wait, then run again."""

    exit_code = 40


def causes(error: BaseException) -> Iterator[BaseException]:
    """The error and everything behind it, nearest first: causes, contexts that were not hidden, and what Ray keeps in
    `cause` (a task) and `worker_failures` (training)."""
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

    Ray's RayTaskError(InputError) is an InputError too, but its text is a traceback: only a class of this file counts.
    """
    ours = (
        cause for cause in causes(error) if isinstance(cause, NightrailsError) and type(cause).__module__ == __name__
    )
    return next(ours, None)


def library_of(error: BaseException) -> str:
    """The package that the error's class comes from."""
    return type(error).__module__.partition(".")[0]


def missing_package(name: str, python: str, host: str) -> InputError:
    """What to say when a Python lacks a package that we need."""
    return InputError(
        f"{python} on {host} has no package {name!r}: install nightrails into the Python of every node "
        "(`pip install --constraint constraints.txt .` in its folder), or use the image of infra/Dockerfile"
    )
