"""The command line that every job shares: flags in, one JSON line and an exit code out.

Imports only the standard library, so that a Python without our dependencies is answered in one sentence.
"""

import argparse
import builtins
import json
import logging
import os
import re
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pipeline import errors
from pipeline.errors import InfrastructureError, InputError, NightrailsError

if TYPE_CHECKING:
    from pipeline.settings import Settings

DEFAULT_CONFIG = Path("conf/nightly.yaml")
DAY = re.compile(r"\d{4}-\d{2}-\d{2}")

EXIT_CODES = """\
exit codes:
  0   published, or already published for these inputs
  1   a fault of nightrails; please report it
  10  a quality gate said no; yesterday's table stays
  20  bad input or configuration; a retry cannot help
  30  the infrastructure failed; a retry resumes
  40  another run holds the lease or has published meanwhile; wait, then run again
"""

Outcome = dict[str, Any]
log = logging.getLogger("nightrails")


def command(description: str, run: Callable[["Settings", date | None], Outcome]) -> None:
    """Parse the flags, run the job and exit. Only the last line goes to standard output: one JSON object.

    `run` gets the validated settings and `--ds` (None: the newest day in the log) and imports what is heavy itself,
    so that `--help` and a misspelt key are answered at once.
    """
    arguments = _parser(description).parse_args()
    with _stdout_for_the_last_line_only() as last_line:
        logging.basicConfig(
            stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname).1s %(message)s", datefmt="%H:%M:%S"
        )
        started = time.monotonic()
        try:
            from pipeline.config import load_config
            from pipeline.settings import Settings

            settings = load_config(Settings, _config_path(arguments.config), arguments.set)
            outcome, code = run(settings, parse_day(arguments.ds)), 0
        except BaseException as error:  # even KeyboardInterrupt leaves a last line
            outcome, code = _failure(error)
        outcome["seconds"] = round(time.monotonic() - started, 1)
        last_line(json.dumps(outcome, ensure_ascii=False, default=str))
    sys.exit(code)


def parse_day(text: str | None) -> date | None:
    """A real calendar day, written YYYY-MM-DD."""
    if text is None:
        return None
    try:
        if DAY.fullmatch(text):
            return date.fromisoformat(text)
    except ValueError:
        pass
    raise InputError(f"--ds {text!r}: give a day as YYYY-MM-DD, for example --ds 2026-11-20")


def cause_of(error: BaseException) -> BaseException:
    """Our own error behind whatever Ray or another library wrapped it in, else the root of the wrapping.

    A plain task keeps the exception in `cause`, training in `worker_failures`; Ray Data and dying actors keep only the
    text of the remote traceback, and an exception is read back from that.
    """
    seen: list[BaseException] = []
    queue: list[BaseException | None] = [error]
    while queue:
        current = queue.pop(0)
        if current is None or any(current is known for known in seen):
            continue
        if type(current).__module__ == errors.__name__:  # RayTaskError(InputError) is one too, but speaks traceback
            said, advice, _ = str(current).partition(ADVICE_OF_RAY)
            return type(current)(said) if advice else current
        seen.append(current)
        context = None if current.__suppress_context__ else current.__context__
        workers = getattr(current, "worker_failures", None)
        queue += [getattr(current, "cause", None), current.__cause__, context]
        queue += workers.values() if isinstance(workers, dict) else ()
    texts = [str(known) for known in seen if _library(known) == "ray"]
    read_back = [found for found in map(_from_traceback, texts) if found]
    ours = [found for found in read_back if isinstance(found, NightrailsError)]
    return next(iter(ours + read_back), error)


# Ray Data may append advice on its own retries to whatever was raised.
ADVICE_OF_RAY = "\nFailed to apply UDF transform"
RAISED = re.compile(rf"^(?:[\w.]+\.)?(\w+): (.*?)(?=\n\n|{ADVICE_OF_RAY}|\Z)", re.MULTILINE | re.DOTALL)


def _from_traceback(text: str) -> BaseException | None:
    """The outermost of our own exceptions in a printed traceback, else the innermost if Python has it built in."""
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


# A name with a dot is a part of a package that is there, which is our fault and not the installation's.
MISSING_MODULE = re.compile(
    r"^(?:ModuleNotFoundError|[\w.]*RaySystemError: System error): No module named '([^'.]+)'", re.MULTILINE
)
ON_NODE = re.compile(r"\bip=([^,)\s]+)")
PYTHON_OF_A_FRAME = re.compile(r'File "([^"]+)/lib/python[\d.]+/')
OUR_OWN = ("pipeline", "jobs")


def _missing_here(error: ModuleNotFoundError) -> InputError | None:
    """What to say when this Python lacks a package; None when the missing module is one of our own."""
    name = error.name or ""
    if not name or "." in name or name in OUR_OWN:
        return None
    return _missing(name, sys.executable, socket.gethostname())


def _missing_on_a_node(text: str) -> InputError | None:
    """What to say when, by a traceback of Ray, the Python of a worker lacks a package (our own may be that one)."""
    module = MISSING_MODULE.search(text)
    if module is None:
        return None
    name = "nightrails" if module[1] in OUR_OWN else module[1]
    python, node = PYTHON_OF_A_FRAME.search(text), ON_NODE.search(text)
    return _missing(
        name,
        f"the Python in {python[1]}" if python else "the Python of Ray's workers",
        f"node {node[1]}" if node else "a node",
    )


def _missing(name: str, python: str, host: str) -> InputError:
    return InputError(
        f"{python} on {host} has no package {name!r}: install nightrails into the Python of every node "
        "(`pip install --constraint constraints.txt .` in its folder), or use the image of infra/Dockerfile"
    )


def _failure(error: BaseException) -> tuple[Outcome, int]:
    cause = cause_of(error)
    if isinstance(cause, ModuleNotFoundError):
        cause = _missing_here(cause) or cause
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
    return {"status": "failed", "exit_code": code, "error": message}, code


def _a_retry_may_help(error: BaseException) -> bool:
    return isinstance(error, OSError | MemoryError) or _library(error) in {"ray", "botocore", "boto3", "urllib3"}


def _library(error: BaseException) -> str:
    return type(error).__module__.partition(".")[0]


class _Parser(argparse.ArgumentParser):
    """A wrong flag is bad input like any other: exit code 20 and one JSON line, not argparse's 2."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        outcome, code = _failure(InputError(message))
        sys.stdout.write(json.dumps(outcome, ensure_ascii=False) + "\n")
        sys.exit(code)


def _parser(description: str) -> _Parser:
    parser = _Parser(
        description=description,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, default=None, help=f"YAML file (default: {DEFAULT_CONFIG})")
    parser.add_argument("--ds", metavar="YYYY-MM-DD", help="the day to serve (default: the newest day in the log)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="a.b=c", help="override one key; may be given many times"
    )
    return parser


def _config_path(given: Path | None) -> Path:
    """Without --config: conf/nightly.yaml beside the jobs, wherever the caller stands."""
    if given is not None:
        return given
    return DEFAULT_CONFIG if DEFAULT_CONFIG.is_file() else Path(__file__).parents[1] / DEFAULT_CONFIG


@contextmanager
def _stdout_for_the_last_line_only() -> Iterator[Callable[[str], None]]:
    """Send everything that this process and its children print to standard error, but for what is yielded."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)

    def write(line: str) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        with suppress(BrokenPipeError):  # nobody reads it; the exit code still counts
            os.write(kept, line.encode() + b"\n")

    try:
        yield write
    finally:
        os.close(kept)
