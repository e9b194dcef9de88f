"""A whole night in this process with each encoder, and what it reads of the histories on the way."""

import numpy as np
import pyarrow.compute as pc
import pytest
import torch

from jobs import nightly_candidates, prepare, simulate_log
from pipeline.config import apply_overrides, validate
from pipeline.io.histories import read_bucket
from pipeline.io.night import Night, open_night
from pipeline.io.publication.reader import read_latest
from pipeline.model.encoders import ENCODERS, columns_read
from pipeline.model.ranks import Ranks
from pipeline.settings import Settings
from pipeline.stages.train import training_memory
from pipeline.stages.training_data import read_training_data
from tests.jobs.nightly import TINY

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = TINY | {
    "simulate.num_users": 60,
    "simulate.num_events": 2_000,
    "train.max_epochs": 1,
    "output.num_buckets": 2,
    "cluster.mode": "local",
}
KINDS = [{"model.encoder": encoder} for encoder in ENCODERS]
READS_TIMES = {"model.encoder": "hstu", "model.reads_times": True, "model.positions": "relative"}
SAMPLED_HEAD = {"model.encoder": "sasrec", "train.head_negatives": 40}
KINDS += [READS_TIMES, SAMPLED_HEAD]
LOW_RANK = {
    "search.method": "topk_low_rank",
    "search.num_preselected": 30,
    "corpus.low_rank.ranks": "[4]",
    "gates.min_overlap": 0.0,
}
each_kind = pytest.mark.parametrize("keys", KINDS, ids=lambda keys: "-".join(str(value) for value in keys.values()))


def settings_of(root: object, keys: dict[str, object]) -> Settings:
    values = SMALL | keys | {"root": str(root)}
    return validate(Settings, apply_overrides({}, [f"{key}={value}" for key, value in values.items()]), origin="test")


@each_kind
def test_a_night_publishes_a_list_for_everybody(tmp_path, keys):
    settings = settings_of(tmp_path, keys)
    assert nightly_candidates.run(settings, None)["status"] == "published"
    table, users = (read_latest(str(tmp_path), "candidates", table=name) for name in ("candidates", "users"))
    assert table.num_rows == pc.sum(users["num_returned"]).as_py() > 500
    assert pc.all(pc.is_finite(table["score"])).as_py()
    assert nightly_candidates.run(settings, None)["status"] == "already published"


def test_a_table_of_low_rank_is_fitted_to_queries_that_read_times(tmp_path):
    assert nightly_candidates.run(settings_of(tmp_path, READS_TIMES | LOW_RANK), None)["status"] == "published"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("night")
    settings = settings_of(root, {})
    simulate_log.run(settings, None)
    prepare.run(settings, open_night(settings))
    return root


def opened(root: object, keys: dict[str, object]) -> tuple[Settings, Night]:
    settings = settings_of(root, keys)
    return settings, open_night(settings)


@each_kind
def test_training_carries_what_the_encoder_reads_and_nothing_else(root, keys):
    settings, night = opened(root, keys)
    data = read_training_data(night, settings, Ranks(), torch.device("cpu"))
    reads = columns_read(settings.model)
    for lists in (data.windows.events, data.validation.histories):
        assert lists.columns.keys() == reads
        assert all(len(column) == len(lists.values) for column in lists.columns.values())
    assert not data.windows.own.columns
    assert not data.validation.held_out.columns


def test_the_memory_that_training_asks_for_counts_the_columns(root):
    plain, timed, weighed = (
        training_memory(*reversed(opened(root, keys))) for keys in ({}, READS_TIMES, {"model.encoder": "bag"})
    )
    assert timed - plain == 2 * (weighed - plain) > 10_000


def test_the_times_of_training_are_those_of_the_events(root):
    settings, night = opened(root, READS_TIMES)
    events = read_training_data(night, settings, Ranks(), torch.device("cpu")).windows.events
    found = set(zip(events.values.tolist(), events.columns["times"].tolist(), strict=True))
    buckets = [read_bucket(night.storage, night.histories, unit) for unit in range(2)]
    stored = {pair for each in buckets for pair in zip(each.item_rows.tolist(), each.event_ts.tolist(), strict=True)}
    assert found <= stored
    assert len(found) > 500
    is_same_window = np.diff(events.owners) == 0
    assert (np.diff(events.columns["times"])[is_same_window] >= 0).all()
