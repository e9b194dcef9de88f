"""The command line that every job shares: flags in, one JSON line and an exit code out.

Imports only the standard library, so that a Python without our dependencies is answered in one sentence.
"""

import argparse
import json
import logging
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pipeline.causes import library_of, missing_package, own_error
from pipeline.errors import InfrastructureError, InputError, NightrailsError
from pipeline.interrupts import Interrupts, leave

if TYPE_CHECKING:
    from pipeline.io.night import Night
    from pipeline.settings import Settings
    from pipeline.stages.runner import Runner

DEFAULT_CONFIG = Path("conf/nightly.yaml")
OUR_OWN = ("pipeline", "jobs")

EXIT_CODES = """\
exit codes:
  0   published, or already published for these inputs
  1   a fault of nightrails; please report it
  10  a quality gate said no; yesterday's table stays
  20  bad input or configuration; a retry cannot help
  30  the infrastructure failed; a retry resumes
  40  another run has published meanwhile; wait, then run again
"""

Outcome = dict[str, Any]

# Values of `status` in the last line of a job; `published` and `already published` are those of publish.
MADE, EXISTS, SKIPPED = "made", "exists", "skipped"
PUBLISHED, ALREADY_PUBLISHED, FAILED = "published", "already published", "failed"
log = logging.getLogger("nightrails")


def command(
    description: str,
    run: Callable[..., Outcome],
    add_arguments: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> None:
    """Parse the flags, run the job and exit. Only the last line goes to standard output: one JSON object.

    `run` gets the validated settings, `--ds` (None: the newest day in the log) and by name the job's own arguments, and
    `cluster.deadline_minutes` to finish. It imports torch and Ray itself, so that `--help` and a misspelt key are
    answered at once. A signal ends the job with 30.
    """
    parser = _parser(description)
    add_arguments(parser)
    given = vars(parser.parse_args())
    config, day, overrides = (given.pop(name) for name in ("config", "ds", "set"))

    def configured(interrupts: Interrupts) -> Outcome:
        from pipeline.config import load_config, parse_day
        from pipeline.settings import Settings

        settings = load_config(Settings, _config_path(config), overrides)
        ds = None if day is None else parse_day(day, "--ds")
        interrupts.set_deadline(settings.cluster.deadline_minutes)
        return run(settings, ds, **given)

    _run(configured)


def plain_command(
    description: str, add_arguments: Callable[[argparse.ArgumentParser], None], run: Callable[..., Outcome]
) -> None:
    """Make a job that has arguments of its own instead of a configuration: parse them, run it with them, and exit.

    All else is as with `command`.
    """
    parser = _bare_parser(description)
    add_arguments(parser)
    given = vars(parser.parse_args())
    _run(lambda interrupts: run(**given))


def _run(work: Callable[[Interrupts], Outcome]) -> NoReturn:
    """Run a job and exit, with its last line on standard output."""
    with _stdout_for_the_last_line_only() as last_line:
        logging.basicConfig(
            stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S"
        )
        started = time.monotonic()

        def tell(outcome: Outcome) -> None:
            outcome["seconds"] = round(time.monotonic() - started, 1)
            last_line(json.dumps(outcome, ensure_ascii=False, default=str))

        interrupts = Interrupts(last_words=lambda error: tell(_failure(error)[0]))
        try:
            with interrupts.ending_the_block():
                outcome, code = work(interrupts), 0
        except BaseException as error:  # even KeyboardInterrupt leaves a last line
            outcome, code = _failure(error)
        tell(outcome)
        interrupts.outcome_is_told(code)
    leave(code)


def on_night(run: Callable[["Settings", "Night"], Outcome]) -> Callable[["Settings", date | None], Outcome]:
    """Make a job that works on one night fit `command`: list the inputs and name every artifact once, then run it."""

    def opened(settings: "Settings", ds: date | None) -> Outcome:
        from pipeline.io.night import open_night

        return run(settings, open_night(settings, ds))

    return opened


def open_runner(settings: "Settings") -> "Runner":
    """Open what executes the stages: this process (`cluster.mode: local`) or a Ray cluster, joined or started.

    May be called again. Raises InputError when the root cannot be seen from every node or Ray refuses the environment,
    InfrastructureError when no cluster answers.
    """
    if settings.cluster.mode == "local":
        from pipeline.stages.local import LocalRunner

        return LocalRunner(settings)
    from pipeline.distributed.environment import check_environment

    check_environment()
    from pipeline.distributed.runner import RayRunner

    return RayRunner(settings)


def _missing_here(error: BaseException) -> InputError | None:
    """Build the error for a package that this Python lacks; None for another error or a missing module of our own."""
    name = (error.name or "") if isinstance(error, ModuleNotFoundError) else ""
    if not name or "." in name or name in OUR_OWN:  # with a dot: a module of an installed package
        return None
    return missing_package(name, sys.executable, socket.gethostname())


def _failure(error: BaseException) -> tuple[Outcome, int]:
    """Print the error for a person; returns the outcome for the last line, and the exit code."""
    cause: BaseException = own_error(error) or _missing_here(error) or error
    if not isinstance(cause, NightrailsError) and _a_retry_may_help(cause):
        cause = InfrastructureError(f"{type(cause).__name__}: {cause}")
    if isinstance(cause, NightrailsError):
        code, message = cause.exit_code, str(cause)
    elif isinstance(cause, KeyboardInterrupt):
        code, message = 30, "interrupted; run the same command again to resume"
    else:
        traceback.print_exception(error)
        code, message = 1, f"this is a fault of nightrails, please report it: {type(cause).__name__}: {cause}"
    print(f"error: {message}", file=sys.stderr)  # noqa: T201
    return {"status": FAILED, "exit_code": code, "error": message}, code


def _a_retry_may_help(error: BaseException) -> bool:
    return isinstance(error, OSError | MemoryError) or library_of(error) in {"ray", "botocore", "boto3", "urllib3"}


class _Parser(argparse.ArgumentParser):
    """Parser that treats a wrong flag like any bad input: exit code 20 (argparse has 2) and one JSON line."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        outcome, code = _failure(InputError(message))
        sys.stdout.write(json.dumps(outcome, ensure_ascii=False) + "\n")
        sys.exit(code)


def _bare_parser(description: str) -> _Parser:
    return _Parser(
        description=description,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _parser(description: str) -> _Parser:
    parser = _bare_parser(description)
    parser.add_argument("--config", type=Path, default=None, help=f"YAML file (default: {DEFAULT_CONFIG})")
    parser.add_argument("--ds", metavar="YYYY-MM-DD", help="the day to serve (default: the newest day in the log)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="a.b=c", help="override one key; may be given many times"
    )
    return parser


def _config_path(given: Path | None) -> Path:
    """The file of --config; without it conf/nightly.yaml, in the working directory or else beside our code."""
    if given is not None:
        return given
    return DEFAULT_CONFIG if DEFAULT_CONFIG.is_file() else Path(__file__).parents[1] / DEFAULT_CONFIG


@contextmanager
def _stdout_for_the_last_line_only() -> Iterator[Callable[[str], None]]:
    """Send the output of this process and its children to standard error; yield a function for standard output."""
    sys.stdout.flush()
    standard_output = os.dup(1)
    os.dup2(2, 1)

    def write(line: str) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        with suppress(BrokenPipeError):  # nobody reads it; the exit code still counts
            os.write(standard_output, line.encode() + b"\n")

    try:
        yield write
    finally:
        os.close(standard_output)
