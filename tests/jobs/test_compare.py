"""Two nights of one log with another model each, evaluated and compared by the job."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from jobs import compare, count_pairs, embed_items, evaluate, prepare, simulate_log, train, tune
from pipeline.io.evaluation import card_key, read_metrics
from pipeline.io.night import open_night
from pipeline.schema import EVALUATED
from tests.jobs.nightly import REPOSITORY
from tests.jobs.test_encoders import settings_of

pytestmark = pytest.mark.usefixtures("one_thread")
KEYS = {
    "memory.enabled": False,
    "train.refit": 0,
    "split.method": "leave_one_out",
    "simulate.num_items": 400,
    "simulate.num_events": 3_000,
    "simulate.num_users": 100,
    "train.batch_positions": 128,
    "train.warmup_steps": 10,
}


@pytest.fixture(scope="module")
def evaluations(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> dict[str, str]:
    """The URI of the evaluation of a model that has learned, and of one that has not."""
    root = tmp_path_factory.mktemp("two models")
    found = {}
    simulate_log.run(settings_of(root, KEYS), None)
    for name, rate in (("learned", 2e-3), ("random", 1e-30)):
        settings = settings_of(root, KEYS | {"train.learning_rate": rate, "train.max_epochs": 8})
        night = open_night(settings)
        for job in (prepare, count_pairs, train, embed_items, tune):
            job.run(settings, night)
        found[name] = evaluate.run(settings, night)
    return found


def run(arguments: Sequence[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPOSITORY / "jobs" / "compare.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)


def test_the_job_says_which_model_is_better_and_how_sure_that_is(evaluations):
    random, learned = evaluations["random"], evaluations["learned"]
    done = run([random["uri"], learned["uri"]])
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    outcome = json.loads(line)
    assert outcome["users"] == random["queries"] == learned["queries"] > 40
    assert outcome["left_out"] == [0, 0]
    found = outcome["differences"]["hr@10"]
    assert (round(found["first"], 4), round(found["second"], 4)) == (random["hr@10"], learned["hr@10"])
    assert found["mean"] > 0
    assert f"{found['low']:+.4f} to {found['high']:+.4f}" in done.stderr
    assert "users had to find the same items in both evaluations; 0 of the first and 0 of" in done.stderr


def test_rankings_of_one_evaluation_can_be_compared(evaluations):
    uri = evaluations["learned"]["uri"]
    done = run([uri, uri, "--rankings", "popularity", "counts"])
    found = json.loads(done.stdout)["differences"]["hr@10"]
    assert round(found["first"], 4) == evaluations["learned"]["popularity"]["hr@10"]
    assert round(found["second"], 4) == evaluations["learned"]["counts"]["hr@10"]


def test_what_cannot_be_compared_is_told_with_the_way_out(evaluations, tmp_path):
    uri = evaluations["learned"]["uri"]
    assert compare.RANKINGS == EVALUATED
    for arguments, message in (
        ([uri, "somewhere"], "'somewhere' is not an evaluation; give <root>/evaluations/<id>"),
        ([uri, f"{tmp_path}/evaluations/none"], "evaluations/none: not there, or not finished; run jobs/evaluate.py"),
        ([uri, uri, "--rankings", "mol", "mol"], "counts have no part in its scores, so `mol` is the same as `model`"),
        ([uri, uri, "--rankings", "mol", "other"], "invalid choice: 'other'"),
    ):
        done = run(arguments)
        assert done.returncode == 20
        assert message in json.loads(done.stdout)["error"]


def test_the_model_card_stands_beside_the_metrics(evaluations):
    learned = evaluations["learned"]
    card = Path(learned["card"]).read_text()
    root = Path(learned["uri"]).parents[1]
    assert card.startswith("# Model card: ")
    settings = settings_of(root, KEYS | {"train.learning_rate": 2e-3, "train.max_epochs": 8})
    night = open_night(settings)
    assert learned["card"] == f"{night.storage.uri}/{card_key(night)}"
    metrics = read_metrics(night.storage, night.evaluation)
    for text in (
        night.selected.id,
        metrics.protocol,
        f"Of {len(metrics.gates)} pairs of components",
        "none: `memory.enabled` is false",
        f"| {metrics.segments[0].name} | {metrics.segments[0].queries:,} |",
        "learning_rate: 0.002",
    ):
        assert text in card
    assert sum(metrics.gates) == pytest.approx(1.0, abs=1e-5)
