"""The Evaluation artifact and the choice of a search: kept once, read with their hashes, the first attempt stands."""

from pathlib import Path

import pyarrow as pa
import pytest

from pipeline.artifacts import FileEntry
from pipeline.errors import InputError
from pipeline.evaluation.metrics import MeanSum
from pipeline.evaluation.targets import Turnout
from pipeline.io.artifacts import require_manifest
from pipeline.io.evaluation import (
    Exposure,
    GateSums,
    Sample,
    SegmentSums,
    UnitOverlap,
    UnitScores,
    card_key,
    overlap_claims,
    read_metrics,
    read_users,
    sample_claims,
    score_claims,
    write_metrics,
    write_users,
)
from pipeline.io.night import Night
from pipeline.io.tuning import as_chosen, read_tuning, write_tuning
from pipeline.retrieval.tuning import Trial, Tuning
from pipeline.schema import evaluated_users
from pipeline.settings import Settings
from tests.quality.test_gates import metrics
from tests.stages.worlds import SMALL, night_of

SAMPLE = Sample(
    query_threshold=2**64 - 1,
    checked_threshold=2**63,
    units=[0, 2],
    checked_units=[2],
    num_evaluable=9,
    turnout=Turnout(12, only_repeats=2, without_history=1, only_unlearned=3),
)
USERS = pa.table(
    {"user_id": ["a"], "num_visible": [3], "item_ids": [["x"]], "mol_ranks": [None]}
    | {f"{name}_ranks": [[2]] for name in ("model", "popularity", "counts")}
).select(evaluated_users(pa.string(), pa.string()).names)
SCORES = UnitScores(
    queries=2,
    num_proven=1,
    model={"hr@3": MeanSum(2, 1.0, 1.0)},
    popularity={"hr@3": MeanSum(2)},
    counts={"hr@3": MeanSum(2, 2.0, 2.0)},
    mol={"hr@3": MeanSum(2, 1.0, 1.0)},
    exposure=Exposure(item_rows=[4, 7], model=[2, 0], popularity=[1, 2], counts=[0, 2]),
    novelty={"model": MeanSum(2, 9.0, 41.0)},
    distance={"model": MeanSum(2, 0.5, 0.125)},
    gates=GateSums(weights=[1.5, 0.5], num_items=2),
    segments=[SegmentSums(by="age", name="1 to 6 days", rankings={"model": {"hr@3": MeanSum(1, 1.0, 1.0)}})],
    users=FileEntry(key="users-00000.parquet", bytes=1, rows=2, sha256="of nothing"),
)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings.model_validate({**SMALL, "root": str(tmp_path), "search": {"k": 10, "method": "tuned"}})


@pytest.fixture
def night(settings: Settings) -> Night:
    return night_of(settings)


def test_an_evaluation_that_is_not_finished_has_no_metrics(night):
    assert read_metrics(night.storage, night.evaluation) is None


def test_of_two_evaluations_the_first_stands_and_is_returned(night, settings):
    first, second = metrics(0.3, 0.1, 0.97), metrics(0.2, 0.1, 0.9)
    assert write_metrics(night, settings, first, "# one", []) == first
    assert write_metrics(night, settings, second, "# two", []) == first == read_metrics(night.storage, night.evaluation)
    assert night.storage.read(card_key(night)) == b"# one"
    manifest = require_manifest(night.storage, night.evaluation, "evaluate")
    assert manifest.lineage == {
        "corpus": night.corpus.id,
        "selected": night.selected.id,
        "measured": night.measured.id,
        "checkpoint": night.checkpoint.id,
        "neighbours": night.measured_neighbours.id,
        "memory": night.memory.id,
        "histories": night.histories.id,
    }
    assert manifest.counts == {"queries": first.queries}
    assert manifest.settings.keys() == {"search", "memory", "evaluate"}


@pytest.mark.parametrize(("damage", "says"), [(None, "gone since"), (b"{}", "damaged, its SHA-256")])
def test_figures_that_a_gate_reads_are_never_damaged_ones(night, settings, damage, says):
    write_metrics(night, settings, metrics(0.3, 0.1, 0.97), "# card", [])
    (key,) = [info.key for info in night.storage.list(night.evaluation.key("metrics-"))]
    night.storage.delete(key)
    if damage is not None:
        night.storage.create(key, damage)
    with pytest.raises(InputError, match=rf"{says}.*; remove the evaluation and run jobs/evaluate\.py again"):
        read_metrics(night.storage, night.evaluation)


def test_users_are_read_from_their_files_or_the_reader_says_why_not(night, settings):
    with pytest.raises(InputError, match=r"not there; run jobs/evaluate\.py first"):
        read_users(night.storage, night.evaluation)
    files = [write_users(night, unit, USERS) for unit in (0, 3)]
    assert read_users(night.storage, night.evaluation, files[:1]).to_pylist() == USERS.to_pylist()
    write_metrics(night, settings, metrics(0.3, 0.1, 0.97), "# card", files)
    assert read_users(night.storage, night.evaluation).to_pylist() == 2 * USERS.to_pylist()
    night.storage.delete(night.evaluation.key(files[1].key))
    with pytest.raises(InputError, match=r"users-00003.*gone since it was written; remove the evaluation and run"):
        read_users(night.storage, night.evaluation)


def test_an_evaluation_without_users_is_told_as_one_of_an_older_version(night, settings):
    write_metrics(night, settings, metrics(0.3, 0.1, 0.97), "# card", [])
    with pytest.raises(InputError, match="an older version of nightrails made it and kept no users; remove"):
        read_users(night.storage, night.evaluation)


def test_what_lies_in_an_evaluation_while_it_is_made_does_not_mix(night):
    """The names of one kind of claim are no names of another, though all lie in one folder."""
    assert night.storage.create(night.evaluation.key(SCORES.users.key), b"1")
    kept = {sample_claims: SAMPLE, score_claims: SCORES, overlap_claims: UnitOverlap(overlap=MeanSum(2, 1.5, 1.25))}
    for claims, record in kept.items():
        for part in (0, 2):
            assert claims(night).claim(part, record) == record
    for claims, record in kept.items():
        assert claims(night).done() == {0: record, 2: record}


def chosen(num_preselected: int) -> Tuning:
    trial = Trial(
        method="topk_per_embd",
        num_preselected=num_preselected,
        num_per_embd=77,
        table_dtype="int8",
        recall=1.0,
        recall_low=0.995,
        milliseconds_per_query=0.5,
    )
    return Tuning(trial, 0.99, 10, 64, 120, 2.0, (trial,))


def test_a_choice_is_made_once_and_all_of_it_is_used(night, settings):
    assert read_tuning(night) is None
    with pytest.raises(InputError, match=r"nothing was chosen yet; run jobs/tune\.py first"):
        as_chosen(night, settings)
    write_tuning(night, chosen(60))
    first = read_tuning(night)
    assert write_tuning(night, chosen(70)) == first == read_tuning(night)
    assert (first.corpus, first.reason) == (night.corpus.id, chosen(60).reason)
    search = as_chosen(night, settings).search
    assert (search.method, search.num_preselected) == ("topk_per_embd", 60)
    assert (search.num_per_embd, search.table_dtype, search.k) == (77, "int8", 10)


def test_a_method_that_is_named_needs_no_choice(night, settings):
    write_tuning(night, chosen(60))
    named = settings.with_search({"method": "exact"})
    assert as_chosen(night, named) is named
