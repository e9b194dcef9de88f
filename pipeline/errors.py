"""What can go wrong, in the words of the exit codes that a scheduler branches on."""


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
