"""A night, in this process, whose model is worse than counting which item follows which."""

import logging
import re
from pathlib import Path

import pytest

from jobs import nightly_candidates
from pipeline.config import apply_overrides, validate
from pipeline.errors import GateError
from pipeline.io.evaluation import read_metrics
from pipeline.io.night import open_night
from pipeline.settings import Settings
from tests.jobs.nightly import TINY

# A model of two numbers per item that has seen little of the log, and whose score has no part of counts.
WEAK = {
    "cluster.mode": "local",
    "simulate.num_events": 3_000,
    "corpus.num_shards": 1,
    "memory.enabled": False,
    "model.dim": 2,
    "model.num_heads": 1,
    "model.mol.component_dim": 2,
    "train.max_epochs": 1,
    "evaluate.cutoffs": "[10]",
    "gates.min_overlap": 0.0,
}


def settings_for(root: Path, *overrides: str) -> Settings:
    keys = TINY | WEAK | {"root": root}
    return validate(Settings, apply_overrides({}, [f"{key}={value}" for key, value in keys.items()] + [*overrides]), "")


def test_it_is_published_with_a_warning_unless_the_gate_is_set(tmp_path: Path, caplog) -> None:
    with caplog.at_level(logging.INFO, logger="nightrails"):
        with pytest.raises(GateError, match=r"lift_over_counts is 0\.\d+, at least 1\.0000 is required"):
            nightly_candidates.run(settings_for(tmp_path, "gates.min_lift_over_counts=1"), None)
        settings = settings_for(tmp_path)
        outcome = nightly_candidates.run(settings, None)
    assert outcome["status"] == "published"
    (warning,) = outcome["warnings"]
    rates = outcome["hit_rates"]
    assert rates["model"] < rates["counts"]
    assert f"hr@10 is {rates['model']:.4f}, that of item-to-item counts {rates['counts']:.4f}" in warning
    night = open_night(settings)
    metrics = read_metrics(night.storage, night.evaluation)
    assert metrics is not None
    assert round(metrics.counts["hr@10"].mean, 4) == rates["counts"]
    assert [record.message for record in caplog.records if record.levelno == logging.WARNING] == [warning] * 2
    assert re.search(r"^ +model +95 % +popularity +counts +model / counts$", caplog.text, re.MULTILINE)
    assert nightly_candidates.run(settings, None)["warnings"] == [warning]
