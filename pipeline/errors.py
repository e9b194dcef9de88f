"""Our errors: one class for each exit code that a scheduler acts on."""


class NightrailsError(Exception):
    """Base of our errors; `exit_code` is what the job's process returns."""

    exit_code = 1


class InputError(NightrailsError, ValueError):
    """An input (configuration, log, catalogue, credentials) is wrong; a retry cannot help."""

    exit_code = 20


class MismatchError(InputError):
    """Two artifacts do not belong together."""


class GateError(NightrailsError):
    """A quality gate said no; the table that was published before stays."""

    exit_code = 10


class InvalidRunError(GateError):
    """Rows of a run break a promise; the run is not published."""


class InfrastructureError(NightrailsError, RuntimeError):
    """The cluster, the network or the store failed; a retry resumes."""

    exit_code = 30


class ConflictError(NightrailsError, RuntimeError):
    """Another run has published meanwhile; wait, then run again."""

    exit_code = 40
