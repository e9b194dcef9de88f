"""The Evaluation artifact while it is made: the sample of users, and one small file per unit.

Each file is written whole by one create-if-absent put, so that a unit is done when its file exists.
"""

from collections.abc import Iterator
from typing import TypeVar

from pydantic import Field, ValidationError

from pipeline.artifacts import Evaluation, Manifest, Night
from pipeline.config import Config
from pipeline.errors import InputError
from pipeline.evaluation.metrics import MeanSum
from pipeline.evaluation.results import Metrics
from pipeline.io.artifacts import file_entry, now, read_manifest, versions, write_manifest
from pipeline.io.storage.base import ObjectNotFoundError, Storage
from pipeline.settings import Settings

ModelT = TypeVar("ModelT", bound=Config)


class Sample(Config):
    """Which users are asked: those whose sampling key is at most a threshold, so that each unit knows its own."""

    query_threshold: int
    audit_threshold: int
    units: list[int]  # with at least one user to ask
    audit_units: list[int]  # in which lists are compared with exact search
    num_evaluable: int  # users with a visible event and a target, of whom these are a sample
    num_without_history: int  # users with a target whom nobody can rank for: no event before the test


class Exposure(Config):
    """In how many of a unit's lists each of these items is."""

    item_rows: list[int]
    model: list[int]
    popularity: list[int]


class UnitScores(Config):
    """What a unit adds to the metrics."""

    unit: int
    queries: int
    model: dict[str, MeanSum]
    popularity: dict[str, MeanSum]
    exposure: Exposure
    audited: list[list[int]] = Field(default_factory=list)  # item rows of the lists to compare, by user


class UnitOverlap(Config):
    """Overlap@k of a unit's audited lists with exact search."""

    unit: int
    overlap: MeanSum


def read_sample(storage: Storage, evaluation: Evaluation) -> Sample | None:
    """The sample, or None when it was not drawn yet."""
    data = _read(storage, f"{evaluation.prefix}/sample.json")
    return None if data is None else _parse(Sample, data, storage, f"{evaluation.prefix}/sample.json")


def write_sample(storage: Storage, evaluation: Evaluation, sample: Sample) -> None:
    """Keep the sample; who was first has drawn the same one."""
    storage.create(f"{evaluation.prefix}/sample.json", sample.model_dump_json().encode())


def scores_key(evaluation: Evaluation, unit: int) -> str:
    """Where a unit's scores lie."""
    return f"{evaluation.prefix}/unit-{unit:05d}.json"


def overlap_key(evaluation: Evaluation, unit: int) -> str:
    """Where a unit's audit lies."""
    return f"{evaluation.prefix}/audit-{unit:05d}.json"


def write_scores(storage: Storage, evaluation: Evaluation, scores: UnitScores) -> None:
    """Make a unit done; an earlier attempt's file stands."""
    storage.create(scores_key(evaluation, scores.unit), scores.model_dump_json().encode())


def write_overlap(storage: Storage, evaluation: Evaluation, overlap: UnitOverlap) -> None:
    """Make a unit's audit done; an earlier attempt's file stands."""
    storage.create(overlap_key(evaluation, overlap.unit), overlap.model_dump_json().encode())


def read_scores(storage: Storage, evaluation: Evaluation, units: list[int]) -> Iterator[UnitScores]:
    """One unit after the other, in this order."""
    for unit in units:
        key = scores_key(evaluation, unit)
        yield _parse(UnitScores, storage.read(key), storage, key)


def read_overlaps(storage: Storage, evaluation: Evaluation, units: list[int]) -> Iterator[UnitOverlap]:
    """One unit after the other, in this order."""
    for unit in units:
        key = overlap_key(evaluation, unit)
        yield _parse(UnitOverlap, storage.read(key), storage, key)


def missing_units(storage: Storage, evaluation: Evaluation, units: list[int], audit: bool) -> list[int]:
    """The units that are still to do."""
    there = {info.key for info in storage.list(f"{evaluation.prefix}/")}
    key = overlap_key if audit else scores_key
    return [unit for unit in units if key(evaluation, unit) not in there]


def write_metrics(storage: Storage, night: Night, settings: Settings, metrics: Metrics) -> Metrics:
    """Write `metrics.json`, then the manifest. Returns what stands: the first attempt's, when there was one."""
    key = f"{night.evaluation.prefix}/metrics.json"
    data = metrics.model_dump_json(indent=1).encode()
    if not storage.create(key, data):
        data = storage.read(key)
    manifest = Manifest(
        kind="evaluation",
        id=night.evaluation.id,
        lineage={
            "corpus": night.corpus.id,
            "checkpoint": night.checkpoint.id,
            "histories": night.histories.id,
        },
        settings={
            "search": settings.search.model_dump(mode="json"),
            "evaluate": settings.evaluate.model_dump(mode="json"),
        },
        files=(file_entry("metrics.json", data, 1),),
        counts={"queries": metrics.queries},
        created_at=now(),
        versions=versions(),
    )
    write_manifest(storage, night.evaluation.prefix, manifest)
    return _parse(Metrics, data, storage, key)


def read_metrics(storage: Storage, evaluation: Evaluation) -> Metrics | None:
    """The metrics, or None when the evaluation is not finished."""
    if read_manifest(storage, evaluation.prefix) is None:
        return None
    key = f"{evaluation.prefix}/metrics.json"
    return _parse(Metrics, storage.read(key), storage, key)


def _read(storage: Storage, key: str) -> bytes | None:
    try:
        return storage.read(key)
    except ObjectNotFoundError:
        return None


def _parse(model: type[ModelT], data: bytes, storage: Storage, key: str) -> ModelT:
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        raise InputError(
            f"{storage.uri}/{key}: not written by this version ({error.error_count()} faults); remove "
            f"{storage.uri}/{key.rpartition('/')[0]} to evaluate again"
        ) from None
