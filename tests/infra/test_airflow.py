"""The Airflow DAG, run for real against stand-ins for Airflow and for the Ray cluster."""

import ast
import importlib.util
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from pipeline import errors
from pipeline.config import load_config
from pipeline.settings import Settings
from tests.infra.facts import ROOT, parse_command

PATH = ROOT / "infra" / "airflow" / "nightrails_dag.py"


class AirflowException(Exception):  # noqa: N818  (Airflow's own name)
    """Airflow retries."""


class AirflowFailException(AirflowException):
    """Airflow does not retry."""


@dataclass
class Loaded:
    """What the module told Airflow."""

    module: ModuleType
    dag: dict[str, Any]
    task: dict[str, Any]
    run: Callable[..., None]


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Loaded:
    told: dict[str, Any] = {}

    def dag(**arguments: Any) -> Callable:
        told["dag"] = arguments
        return lambda function: function

    def task(**arguments: Any) -> Callable:
        def decorate(function: Callable) -> Callable:
            told["task"], told["run"] = arguments, function
            return lambda: None

        return decorate

    exceptions = SimpleNamespace(AirflowException=AirflowException, AirflowFailException=AirflowFailException)
    for name, content in (
        ("airflow", {}),
        ("airflow.sdk", {"dag": dag, "task": task}),
        ("airflow.exceptions", vars(exceptions)),
    ):
        fake = ModuleType(name)
        vars(fake).update(content)
        monkeypatch.setitem(sys.modules, name, fake)
    spec = importlib.util.spec_from_file_location("nightrails_dag", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Loaded(module, told["dag"], told["task"], told["run"])


@dataclass
class Status:
    is_over: bool

    def is_terminal(self) -> bool:
        return self.is_over


@dataclass
class Cluster:
    """Stands in for Ray's JobSubmissionClient."""

    exit_code: int | None = 0
    polls_until_over: int = 2
    jobs: list[SimpleNamespace] = field(default_factory=list)
    submitted: list[dict[str, str]] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def list_jobs(self) -> list[SimpleNamespace]:
        return self.jobs

    def submit_job(self, *, entrypoint: str, submission_id: str) -> str:
        self.submitted.append({"entrypoint": entrypoint, "submission_id": submission_id})
        return submission_id

    def get_job_status(self, job: str) -> Status:
        self.asked.append(job)
        return Status(len(self.asked) > self.polls_until_over)

    def get_job_info(self, job: str) -> SimpleNamespace:
        return SimpleNamespace(driver_exit_code=self.exit_code)

    def get_job_logs(self, job: str) -> str:
        return "\n".join(f"line {number}" for number in range(20))


def run(loaded: Loaded, cluster: Cluster, monkeypatch: pytest.MonkeyPatch, try_number: int = 1) -> None:
    fake = ModuleType("ray.job_submission")
    fake.JobSubmissionClient = lambda address: cluster if address == "http://head:8265" else None
    monkeypatch.setitem(sys.modules, "ray.job_submission", fake)
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265")
    monkeypatch.setattr(loaded.module.time, "sleep", lambda seconds: None)
    loaded.run(run_id="scheduled__2026-11-20T02:30:00+00:00", ti=SimpleNamespace(try_number=try_number))


def failure(loaded: Loaded, exit_code: int | None, monkeypatch: pytest.MonkeyPatch) -> type[Exception]:
    with pytest.raises(AirflowException, match=f"exit code {exit_code}: ") as caught:
        run(loaded, Cluster(exit_code), monkeypatch)
    assert str(caught.value).endswith("line 19"), "the end of the log says why"
    return caught.type


@pytest.mark.parametrize("exit_code", [1, 10, 20])
def test_what_a_retry_cannot_help_fails_for_good(loaded, monkeypatch, exit_code):
    assert failure(loaded, exit_code, monkeypatch) is AirflowFailException


@pytest.mark.parametrize("exit_code", [30, 40, 137, None])
def test_what_a_retry_may_help_is_retried(loaded, monkeypatch, exit_code):
    assert failure(loaded, exit_code, monkeypatch) is AirflowException


def test_success_is_waited_for(loaded, monkeypatch):
    cluster = Cluster(exit_code=0, polls_until_over=3)
    run(loaded, cluster, monkeypatch)
    assert len(cluster.asked) == 4


def test_every_exit_code_of_ours_is_mapped(loaded):
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    assert {kind.exit_code for kind in kinds} == set(loaded.module.PAGE) | set(loaded.module.RETRY)


def test_each_try_has_its_own_submission_id(loaded, monkeypatch):
    cluster = Cluster()
    run(loaded, cluster, monkeypatch, try_number=3)
    (submitted,) = cluster.submitted
    assert submitted["submission_id"] == "nightrails-scheduled--2026-11-20T02-30-00-00-00-try3"
    assert set(cluster.asked) == {submitted["submission_id"]}


def test_a_try_attaches_to_a_job_that_still_runs(loaded, monkeypatch):
    mine = "nightrails-scheduled--2026-11-20T02-30-00-00-00"
    jobs = [
        SimpleNamespace(submission_id=None, status=Status(False)),
        SimpleNamespace(submission_id="nightrails-another-try1", status=Status(False)),
        SimpleNamespace(submission_id=f"{mine}-try1", status=Status(True)),
        SimpleNamespace(submission_id=f"{mine}-try2", status=Status(False)),
    ]
    cluster = Cluster(jobs=jobs)
    run(loaded, cluster, monkeypatch, try_number=3)
    assert cluster.submitted == []
    assert set(cluster.asked) == {f"{mine}-try2"}


def test_the_command_line_is_one_that_the_job_takes(loaded):
    script, arguments = parse_command(shlex.split(loaded.module.ENTRYPOINT))
    assert script == ROOT / "jobs" / "nightly_candidates.py"
    assert load_config(Settings, arguments.config, arguments.set).root.startswith("s3://")


def test_two_nights_never_run_at_once_and_retries_wait(loaded):
    assert loaded.dag["max_active_runs"] == 1
    assert loaded.dag["catchup"] is False
    assert loaded.task["retries"] >= 2
    assert loaded.task["retry_delay"].total_seconds() >= 60
    deadline = load_config(Settings, ROOT / "conf" / "nightly.yaml").cluster.deadline_minutes * 60
    assert loaded.task["execution_timeout"].total_seconds() > deadline


def test_reading_the_file_needs_neither_ray_nor_us():
    """Airflow parses DAG files again and again: nothing heavy at the top."""
    imported = {
        name.partition(".")[0]
        for node in ast.parse(PATH.read_text()).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    assert imported == {"airflow", "datetime", "os", "time"}


def test_what_the_dag_asks_of_ray_exists():
    from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

    for name in ("list_jobs", "submit_job", "get_job_status", "get_job_info", "get_job_logs"):
        assert callable(getattr(JobSubmissionClient, name))
    assert JobStatus.STOPPED.is_terminal()
    assert not JobStatus.PENDING.is_terminal()
    assert {"driver_exit_code", "submission_id", "status"} <= set(JobDetails.model_fields)
