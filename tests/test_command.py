"""What a scheduler sees of a job: an exit code, and one JSON object as the only line on standard output."""

import ast
import json
import pickle
import re
import socket
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest

from pipeline import errors
from pipeline.causes import causes, own_error
from pipeline.command import EXIT_CODES
from pipeline.config import parse_day
from pipeline.errors import ConflictError, GateError, InfrastructureError, InputError, NightrailsError

ROOT = Path(__file__).parents[1]
JOBS = sorted(path for path in (ROOT / "jobs").glob("*.py") if path.name not in ("__init__.py", "study.py"))

# A job that does what its only --set says: `name` chooses the outcome.
JOB = """
import logging, os, signal, subprocess, sys
from pipeline.command import command
from pipeline.errors import *

def wrapped(error):
    try:
        raise error
    except Exception as inner:
        raise RuntimeError("a library's words") from inner

def chatty():
    print("print")
    sys.stdout.write("sys.stdout\\n")
    os.write(1, b"C level\\n")
    subprocess.run(["echo", "child"])
    logging.getLogger("nightrails").info("log line")

def run(settings, ds):
    actions = {
        "good": lambda: {"status": "published", "ds": ds, "k": settings.search.k},
        "chatty": lambda: chatty() or {"status": "published"},
        "input": lambda: (_ for _ in ()).throw(InputError("column 'x' is missing")),
        "wrapped": lambda: wrapped(MismatchError("these do not belong together")),
        "gate": lambda: wrapped(InvalidRunError("row 7 is not finite")),
        "infrastructure": lambda: wrapped(InfrastructureError("the store is away")),
        "conflict": lambda: wrapped(ConflictError("another run was published")),
        "os": lambda: open("/nowhere/at/all"),
        "memory": lambda: (_ for _ in ()).throw(MemoryError("too much")),
        "interrupt": lambda: (_ for _ in ()).throw(KeyboardInterrupt()),
        "stop": lambda: os.kill(os.getpid(), signal.SIGTERM),
        "bug": lambda: 1 / 0,
        "missing": lambda: __import__("nowhere"),
        "part": lambda: __import__("json.nowhere"),
        "own": lambda: __import__("pipeline.nowhere"),
    }
    return actions[settings.name]()

command("A job for the tests.", run)
"""


OURS = "this is a fault of nightrails, please report it"
EVALUATION = "data/evaluations/0123456789abcdef"
MISSING = (
    f"{sys.executable} on {socket.gethostname()} has no package '{{name}}': install nightrails into the Python of "
    "every node (`pip install --constraint constraints.txt .` in its folder), or use the image of infra/Dockerfile"
)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("jobs") / "job.py"
    path.write_text(JOB)
    return path


def start(
    job: Path, *flags: str, cwd: Path = ROOT, python: tuple[str, ...] = (sys.executable,)
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*python, job, *flags],
        cwd=cwd,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )


def last_line(done: subprocess.CompletedProcess[str]) -> dict:
    assert done.stdout.count("\n") == 1, done.stdout
    return json.loads(done.stdout)


def test_a_good_run_ends_with_0_and_its_outcome(job):
    done = start(job, "--set", "name=good", "--set", "search.k=7", "--ds", "2026-11-20")
    outcome = last_line(done)
    assert done.returncode == 0
    assert outcome.pop("seconds") >= 0
    assert outcome == {"status": "published", "ds": "2026-11-20", "k": 7}


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("input", 20, "column 'x' is missing"),
        ("wrapped", 20, "these do not belong together"),
        ("gate", 10, "row 7 is not finite"),
        ("infrastructure", 30, "the store is away"),
        ("conflict", 40, "another run was published"),
        ("os", 30, "FileNotFoundError: [Errno 2] No such file or directory: '/nowhere/at/all'"),
        ("memory", 30, "MemoryError: too much"),
        ("interrupt", 30, "interrupted; run the same command again to resume"),
        ("stop", 30, "stopped by SIGTERM; run the same command again to resume"),
        ("missing", 20, MISSING.format(name="nowhere")),
        ("part", 1, f"{OURS}: ModuleNotFoundError: No module named 'json.nowhere'"),
        ("own", 1, f"{OURS}: ModuleNotFoundError: No module named 'pipeline.nowhere'"),
        ("bug", 1, f"{OURS}: ZeroDivisionError: division by zero"),
    ],
)
def test_each_kind_of_failure_has_its_exit_code_and_one_sentence(job, name, code, message):
    done = start(job, "--set", f"name={name}")
    outcome = last_line(done)
    assert (done.returncode, outcome["status"], outcome["exit_code"]) == (code, "failed", code)
    assert outcome["error"] == message
    assert done.stderr.splitlines()[-1] == f"error: {message}"
    assert ("Traceback" in done.stderr) == (code == 1), "a traceback is for our own faults only"


def test_all_that_anything_prints_goes_to_standard_error(job):
    done = start(job, "--set", "name=chatty")
    assert last_line(done)["status"] == "published"
    for word in ("print", "sys.stdout", "C level", "child", "log line"):
        assert word in done.stderr


def test_every_job_has_a_deadline_and_ends_with_30_when_it_is_over(tmp_path):
    program = tmp_path / "job.py"
    program.write_text(
        "import threading\n"
        "from pipeline import interrupts\n"
        "from pipeline.command import command\n"
        "real = interrupts.Interrupts.set_deadline\n"
        "interrupts.Interrupts.set_deadline = lambda self, minutes: real(self, minutes * 0.0003)\n"
        "command('A job that never ends.', lambda settings, ds: threading.Event().wait())\n"
    )
    done = start(program, "--set", "cluster.deadline_minutes=7")
    assert (done.returncode, last_line(done)["exit_code"]) == (30, 30)
    assert "not finished within the deadline" in last_line(done)["error"]


def test_a_job_that_has_ended_leaves_with_its_code_whatever_its_libraries_still_do(tmp_path):
    """Its exit handlers run, but nothing is torn down: that would abort the process here, as a library's thread may."""
    program = tmp_path / "job.py"
    program.write_text(
        "import atexit, os, sys\n"
        "from pipeline import command\n"
        "class Held:\n"
        "    def __del__(self):\n"
        "        os.abort()\n"
        "held = Held()\n"
        "held.itself = held\n"
        "atexit.register(lambda: print('handled', file=sys.stderr))\n"
        "command.command('A job.', lambda settings, ds: {'status': 'made'})\n"
    )
    done = start(program)
    assert (done.returncode, last_line(done)["status"]) == (0, "made"), done.stderr
    assert done.stderr.endswith("handled\n")


def test_a_job_that_ignores_being_stopped_is_killed_and_still_has_a_last_line(tmp_path):
    program = tmp_path / "job.py"
    program.write_text(
        "import hashlib, os, signal, threading\n"
        "from pipeline import command, interrupts\n"
        "command.Interrupts = lambda last_words: interrupts.Interrupts(last_words, patience=0.2)\n"
        "threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()\n"
        "command.command('A job.', lambda settings, ds: hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9))\n"
    )
    done = start(program)
    assert (done.returncode, last_line(done)["exit_code"]) == (30, 30)
    assert last_line(done)["error"].startswith("stopped by SIGTERM")


def test_a_wrong_configuration_ends_with_20_and_all_its_faults(job):
    done = start(job, "--set", "serch.k=5", "--set", "model.dim=65")
    assert done.returncode == 20
    assert last_line(done)["error"].startswith("conf/nightly.yaml: 2 faults in the configuration")


# The arguments that a job cannot do without.
REQUIRED = {
    "compare.py": (EVALUATION, EVALUATION),
    "init_source.py": ("--from", "log.csv", "--name", "shop"),
    "explain.py": ("--user", "u"),
}
# Whichever of its packages a job asks for first is the one that it names.
PACKAGES = ("numpy", "polars", "pyarrow", "pydantic", "ray", "torch", "yaml")


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_a_python_without_our_packages_is_named_and_a_persons_business(path):
    done = start(path, *REQUIRED.get(path.name, ()), python=(sys.executable, "-S"))  # -S: the standard library only
    assert done.returncode == 20, done.stderr
    assert last_line(done)["error"] in [MISSING.format(name=package) for package in PACKAGES]
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("flags", [["--cofnig", "x"], ["--conf", "x"], ["--set"], ["stray"]])
def test_a_wrong_flag_ends_with_20_like_any_bad_input(job, flags):
    done = start(job, *flags)
    assert (done.returncode, last_line(done)["exit_code"]) == (20, 20)
    assert "usage: " in done.stderr


def test_a_config_that_is_not_there_ends_with_20(job):
    done = start(job, "--config", "conf/nightli.yaml")
    assert done.returncode == 20
    assert "did you mean conf/nightly.yaml?" in last_line(done)["error"]


def test_the_default_configuration_is_found_from_anywhere(job, tmp_path):
    assert start(job, "--set", "name=good", cwd=tmp_path).returncode == 0


def test_the_exit_code_stands_when_nobody_reads_the_last_line(job):
    command = f"{sys.executable} {job} --set name=gate 2>/dev/null | true; echo ${{PIPESTATUS[0]}}"
    env = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "10"


@pytest.mark.parametrize("text", ["2026-11-20x", "20261120", "2026-13-01", "2026-02-30", "yesterday", "", "2026-1-1"])
def test_a_day_that_is_none_is_refused(text):
    with pytest.raises(InputError, match="give a day as YYYY-MM-DD"):
        parse_day(text, "--ds")


def test_a_day_is_taken():
    assert parse_day("2026-11-20", "--ds") == date(2026, 11, 20)


# Causes


def test_our_own_error_is_found_behind_causes_and_contexts():
    ours = InputError("the real reason")
    with pytest.raises(RuntimeError) as caught:  # noqa: PT012  (the nesting is what is tested)
        try:
            try:
                raise ours
            except InputError:
                raise KeyError("while handling it")  # noqa: B904  (a context, not a cause)
        except KeyError as error:
            raise RuntimeError("outermost") from error
    assert own_error(caught.value) is ours


def test_a_context_that_was_hidden_on_purpose_is_no_cause():
    with pytest.raises(KeyError) as caught:  # noqa: PT012
        try:
            raise InputError("handled")
        except InputError:
            raise KeyError("the real fault") from None
    assert own_error(caught.value) is None


def test_a_circle_of_causes_ends():
    first, second = RuntimeError("a"), RuntimeError("b")
    first.__cause__, second.__cause__ = second, first
    assert list(causes(first)) == [first, second]


def test_every_error_of_ours_survives_the_way_between_processes():
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    assert len(kinds) >= 7
    for kind in kinds:
        back = pickle.loads(pickle.dumps(kind("one sentence")))  # noqa: S301
        assert (type(back), str(back), back.exit_code) == (kind, "one sentence", kind.exit_code)


def test_exit_codes_are_those_that_schedulers_know():
    codes = [kind.exit_code for kind in (NightrailsError, GateError, InputError, InfrastructureError, ConflictError)]
    assert codes == [1, 10, 20, 30, 40]


def test_every_table_of_exit_codes_says_the_same():
    help_text = {int(code): words for code, words in re.findall(r"^  (\d+) +(.+)$", EXIT_CODES, re.MULTILINE)}
    assert set(help_text) == {0} | {
        kind.exit_code for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, NightrailsError)
    }
    meanings = {code: words.partition(";")[0] for code, words in help_text.items()}

    readme = re.findall(r"^\| (\d+) \| ([^|;]+?)(?:;[^|]*)? \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert {int(code): words for code, words in readme} == meanings

    dag = ast.parse((ROOT / "infra" / "airflow" / "nightrails_dag.py").read_text())
    tables = {
        node.targets[0].id: ast.literal_eval(node.value)
        for node in dag.body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)
    }
    in_dag = {0: meanings[0]} | tables["PAGE"] | tables["RETRY"]
    assert {code: words.partition(";")[0] for code, words in in_dag.items()} == meanings

    infra = re.search(r"What a scheduler does.*?again\.", (ROOT / "infra" / "README.md").read_text(), re.DOTALL)
    assert infra
    assert {int(code) for code in re.findall(r"\*\*(\d+)\*\*", infra[0])} == set(meanings)


def test_training_keeps_the_errors_of_its_workers():
    failure = RuntimeError("training failed")
    failure.worker_failures = {0: RuntimeError("killed"), 1: InputError("the real reason")}  # as Ray Train has it
    assert str(own_error(failure)) == "the real reason"
