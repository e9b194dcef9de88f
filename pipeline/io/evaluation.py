"""The Evaluation artifact, and the claims that it is made from: the sample of users, and results by unit."""

from collections.abc import Sequence

import pyarrow as pa

from pipeline.artifacts import Artifact, FileEntry, Manifest
from pipeline.config import Config
from pipeline.errors import InputError
from pipeline.evaluation.metrics import MeanSum
from pipeline.evaluation.results import Metrics
from pipeline.evaluation.targets import Turnout
from pipeline.io.artifacts import (
    Claims,
    no_objects,
    parse,
    read_file,
    read_manifest,
    require_manifest,
    seal,
    sizes_of,
    write_file,
)
from pipeline.io.night import Night
from pipeline.io.parquet import read_parquet_bytes, write_parquet_bytes
from pipeline.io.storage.base import Storage
from pipeline.schema import SCHEMA_VERSION
from pipeline.settings import Settings

REMEDY = "run jobs/evaluate.py again"  # while the evaluation is not finished
REMOVE = "remove the evaluation and run jobs/evaluate.py again"


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


class SegmentSums(Config):
    """The share of one unit in the metrics of a segment."""

    by: str
    name: str
    rankings: dict[str, dict[str, MeanSum]]


class GateSums(Config):
    """Weights that the gate gives to the pairs of components, for some users of a unit and the items of their lists."""

    weights: list[float]  # of each pair, summed
    num_items: int


class UnitScores(Config):
    """The share of one unit in the metrics, and the file of its users."""

    queries: int
    num_proven: int  # lists that are certainly those of exact search
    model: dict[str, MeanSum]
    popularity: dict[str, MeanSum]
    counts: dict[str, MeanSum]
    mol: dict[str, MeanSum]  # MoL alone; empty where the counts have no part in the score
    exposure: Exposure
    novelty: dict[str, MeanSum]  # by ranking
    distance: dict[str, MeanSum]
    gates: GateSums
    segments: list[SegmentSums]
    users: FileEntry


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
    prefix = night.evaluation.prefix
    return Claims(night.storage, prefix, "unit", UnitScores, lambda scores: sizes_of(prefix, scores.users))


def checked_claims(night: Night) -> Claims[CheckedLists]:
    """The claims of the approximate lists to compare: part n is unit n."""
    return Claims(night.storage, night.evaluation.prefix, "checked", CheckedLists, no_objects)


def overlap_claims(night: Night) -> Claims[UnitOverlap]:
    """The claims of the recall checks: part n is unit n."""
    return Claims(night.storage, night.evaluation.prefix, "recall-check", UnitOverlap, no_objects)


def write_users(night: Night, unit: int, users: pa.Table) -> FileEntry:
    """Write the users of a unit (`schema.evaluated_users`)."""
    footer = {"evaluation_id": night.evaluation.id, "schema_version": str(SCHEMA_VERSION)}
    data = write_parquet_bytes(users, footer)
    return write_file(night.storage, night.evaluation.prefix, f"users-{unit:05d}.parquet", data, users.num_rows)


def read_users(storage: Storage, evaluation: Artifact, files: Sequence[FileEntry] | None = None) -> pa.Table:
    """Read users of an evaluation (`schema.evaluated_users`): of these files, or all of a finished evaluation.

    Raises InputError when it is not finished, is damaged, or was made before there were such files.
    """
    if files is None:
        manifest = require_manifest(storage, evaluation, "evaluate")
        files = [file for file in manifest.files if file.key.startswith("users-")]
    if not files:
        raise InputError(
            f"{storage.uri}/{evaluation.prefix}: an older version of nightrails made it and kept no users; {REMOVE}"
        )
    parts = []
    for file in files:
        data = read_file(storage, evaluation.prefix, file, REMOVE)
        parts.append(read_parquet_bytes(data, f"{storage.uri}/{evaluation.key(file.key)}").replace_schema_metadata())
    return pa.concat_tables(parts)


def write_metrics(night: Night, settings: Settings, metrics: Metrics, card: str, users: Sequence[FileEntry]) -> Metrics:
    """Write the metrics and the model card beside the files of the users, then the manifest. Returns the metrics of the
    first attempt, which stand."""

    def write(name: str, text: str) -> FileEntry:
        return write_file(night.storage, night.evaluation.prefix, name, text.encode(), 1)

    manifest = seal(
        night.storage,
        night.evaluation,
        kind="evaluation",
        lineage={
            "corpus": night.corpus.id,
            "selected": night.selected.id,
            "measured": night.measured.id,
            "checkpoint": night.checkpoint.id,
            "neighbours": night.measured_neighbours.id,
            "memory": night.memory.id,
            "histories": night.histories.id,
        },
        settings=settings.model_dump(mode="json", include={"search", "memory", "evaluate"}),
        files=(write("metrics.json", metrics.model_dump_json(indent=1)), write("card.md", card), *users),
        counts={"queries": metrics.queries},
    )
    return _read(night.storage, night.evaluation, manifest)


def read_metrics(storage: Storage, evaluation: Artifact) -> Metrics | None:
    """Read the metrics; None when the evaluation is not finished. Raises InputError when they are damaged."""
    manifest = read_manifest(storage, evaluation.prefix)
    return None if manifest is None else _read(storage, evaluation, manifest)


def card_key(night: Night) -> str:
    """The key of the model card of a finished evaluation."""
    manifest = require_manifest(night.storage, night.evaluation, "evaluate")
    return night.evaluation.key(_entry(manifest, "card").key)


def _entry(manifest: Manifest, name: str) -> FileEntry:
    return next(file for file in manifest.files if file.key.startswith(f"{name}-"))


def _read(storage: Storage, evaluation: Artifact, manifest: Manifest) -> Metrics:
    file = _entry(manifest, "metrics")
    data = read_file(storage, evaluation.prefix, file, REMOVE)
    return parse(Metrics, data, f"{storage.uri}/{evaluation.key(file.key)}", REMOVE)
