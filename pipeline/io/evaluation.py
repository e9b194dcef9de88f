"""The Evaluation artifact, and the claims that it is made from: the sample of users, and results by unit."""

from pipeline.artifacts import Artifact, Manifest
from pipeline.config import Config
from pipeline.evaluation.metrics import MeanSum
from pipeline.evaluation.results import Metrics
from pipeline.evaluation.targets import Turnout
from pipeline.io.artifacts import Claims, no_objects, parse, read_file, read_manifest, seal, write_file
from pipeline.io.night import Night
from pipeline.io.storage.base import Storage
from pipeline.settings import Settings

REMEDY = "run jobs/evaluate.py again"


class Sample(Config):
    """The users to evaluate: all whose sampling key is at most a threshold, so that each unit can select its own."""

    query_threshold: int
    checked_threshold: int
    units: list[int]  # with at least one user of the sample
    checked_units: list[int]  # in which lists are compared with exact search
    num_evaluable: int  # users with an event before the test and a target: the sample is drawn from them
    turnout: Turnout


class Exposure(Config):
    """The number of a unit's lists that hold each of some items, in the lists of the model and of both floors."""

    item_rows: list[int]
    model: list[int]
    popularity: list[int]
    counts: list[int]


class UnitScores(Config):
    """The share of one unit in the metrics."""

    queries: int
    num_proven: int  # lists that are certainly those of exact search
    model: dict[str, MeanSum]
    popularity: dict[str, MeanSum]
    counts: dict[str, MeanSum]
    mol: dict[str, MeanSum]  # MoL alone; empty where the counts have no part in the score
    exposure: Exposure


class CheckedLists(Config):
    """A unit's approximate lists that are to be compared with exact search."""

    item_rows: list[list[int]]


class UnitOverlap(Config):
    """Overlap@k of a unit's checked lists with exact search."""

    overlap: MeanSum


def sample_claims(night: Night) -> Claims[Sample]:
    """The claim of the night's sample: part 0 is the only one."""
    return Claims(night.storage, night.evaluation.prefix, "sample", Sample, no_objects)


def score_claims(night: Night) -> Claims[UnitScores]:
    """The claims of the scores: part n is unit n."""
    return Claims(night.storage, night.evaluation.prefix, "unit", UnitScores, no_objects)


def checked_claims(night: Night) -> Claims[CheckedLists]:
    """The claims of the approximate lists to compare: part n is unit n."""
    return Claims(night.storage, night.evaluation.prefix, "checked", CheckedLists, no_objects)


def overlap_claims(night: Night) -> Claims[UnitOverlap]:
    """The claims of the recall checks: part n is unit n."""
    return Claims(night.storage, night.evaluation.prefix, "recall-check", UnitOverlap, no_objects)


def write_metrics(night: Night, settings: Settings, metrics: Metrics) -> Metrics:
    """Write the metrics, then the manifest. Returns the metrics of the first attempt, which stand."""
    data = metrics.model_dump_json(indent=1).encode()
    manifest = seal(
        night.storage,
        night.evaluation,
        kind="evaluation",
        lineage={
            "corpus": night.corpus.id,
            "selected": night.selected.id,
            "checkpoint": night.checkpoint.id,
            "neighbours": night.selected_neighbours.id,
            "memory": night.memory.id,
            "histories": night.histories.id,
        },
        settings=settings.model_dump(mode="json", include={"search", "memory", "evaluate"}),
        files=(write_file(night.storage, night.evaluation.prefix, "metrics.json", data, 1),),
        counts={"queries": metrics.queries},
    )
    return _read(night.storage, night.evaluation, manifest)


def read_metrics(storage: Storage, evaluation: Artifact) -> Metrics | None:
    """Read the metrics; None when the evaluation is not finished. Raises InputError when they are damaged."""
    manifest = read_manifest(storage, evaluation.prefix)
    return None if manifest is None else _read(storage, evaluation, manifest)


def _read(storage: Storage, evaluation: Artifact, manifest: Manifest) -> Metrics:
    (file,) = manifest.files
    data = read_file(storage, evaluation.prefix, file, REMEDY)
    return parse(Metrics, data, f"{storage.uri}/{evaluation.key(file.key)}", REMEDY)
