"""How good tonight's model and search are, on held-out events: a sample of users goes through the same search.

Resumes by unit: what a killed evaluation has written is not computed again, and memory is bounded by a unit.
"""

import time

import numpy as np

from pipeline.artifacts import Night
from pipeline.distributed.cluster import connect, deadline
from pipeline.distributed.search import search_units
from pipeline.distributed.tasks import run_tasks
from pipeline.errors import InputError
from pipeline.evaluation.metrics import MeanSum, add_sums, catalogue_coverage, gini, measured_cutoffs, summarise
from pipeline.evaluation.results import Comparison, Metrics, Overlap
from pipeline.io.corpus import open_corpus
from pipeline.io.evaluation import (
    Sample,
    missing_units,
    read_overlaps,
    read_sample,
    read_scores,
    write_metrics,
    write_sample,
)
from pipeline.io.storage.base import Storage
from pipeline.settings import Settings
from pipeline.stages.evaluate import AuditedUsers, AuditSink, EvaluationSink, HeldOutUsers
from pipeline.stages.sample import draw_unit, make_sample


def evaluate(storage: Storage, night: Night, settings: Settings) -> Metrics:
    """Search for a sample of users with held-out events and compare; returns what `metrics.json` holds.

    Raises InputError when the corpus was not embedded, or when nobody has an event that can be predicted.
    """
    started = time.monotonic()
    num_items = int(open_corpus(storage, night.corpus).counts["num_items"])
    connect(settings)
    with deadline(settings.cluster.deadline_minutes):
        sample = draw_sample(storage, night, settings)
        todo = missing_units(storage, night.evaluation, sample.units, audit=False)
        scratch = f"{night.evaluation.prefix}/_wave"
        search_units(storage.uri, night, settings, todo, HeldOutUsers, EvaluationSink, scratch)
        _audit(storage, night, settings, sample)
    metrics = collect(storage, night, settings, sample, num_items, round(time.monotonic() - started, 1))
    return write_metrics(storage, night, settings, metrics)


def draw_sample(storage: Storage, night: Night, settings: Settings) -> Sample:
    """The users to ask, and those of them to audit, by the smallest sampling keys of all; drawn once and kept."""
    known = read_sample(storage, night.evaluation)
    if known is not None:
        return known
    seed, most = settings.evaluate.seed, settings.evaluate.max_queries
    units = [(storage.uri, night.histories, unit, seed, most) for unit in range(settings.output.num_buckets)]
    drawn = sorted(run_tasks("draw a sample", draw_unit, units), key=lambda part: part.unit)
    num_evaluable, without = sum(part.num_evaluable for part in drawn), sum(part.num_without_history for part in drawn)
    if not num_evaluable:
        raise InputError(
            f"nobody has a test event on an item they had not seen before ({without} users have no earlier event "
            "at all); hold out more with split.test_days, or give a longer log"
        )
    sample = make_sample({part.unit: part.keys for part in drawn}, settings, num_evaluable, without)
    write_sample(storage, night.evaluation, sample)
    return sample


def _audit(storage: Storage, night: Night, settings: Settings, sample: Sample) -> None:
    """Compare the lists of an approximate search with exact search; an exact one was verified as it went."""
    if settings.search.is_exact:
        return
    todo = missing_units(storage, night.evaluation, sample.audit_units, audit=True)
    search = settings.search.model_copy(update={"method": "exact"})
    exact = settings.model_copy(update={"search": search})
    search_units(storage.uri, night, exact, todo, AuditedUsers, AuditSink, f"{night.evaluation.prefix}/_audit")


def collect(
    storage: Storage, night: Night, settings: Settings, sample: Sample, num_items: int, seconds: float
) -> Metrics:
    """Add the units up, in order, to the metrics; `seconds` is what the search took."""
    search = settings.search
    queries, model, popularity = 0, dict[str, MeanSum](), dict[str, MeanSum]()
    exposure = {"model": np.zeros(num_items, dtype=np.int64), "popularity": np.zeros(num_items, dtype=np.int64)}
    for scores in read_scores(storage, night.evaluation, sample.units):
        queries += scores.queries
        model, popularity = add_sums([model, scores.model]), add_sums([popularity, scores.popularity])
        exposure["model"][scores.exposure.item_rows] += scores.exposure.model
        exposure["popularity"][scores.exposure.item_rows] += scores.exposure.popularity
    overlap = sum(
        (part.overlap for part in read_overlaps(storage, night.evaluation, sample.audit_units)), start=MeanSum()
    )
    low, high = overlap.normal_interval()
    return Metrics(
        queries=queries,
        without_history=sample.num_without_history,
        protocol=describe_protocol(settings, sample, num_items),
        method=search.method,
        k=search.k,
        cutoffs=measured_cutoffs(settings.evaluate.cutoffs, search.k),
        model=summarise(model),
        popularity=summarise(popularity),
        overlap=Overlap(
            k=search.k,
            queries=overlap.count,
            mean=overlap.mean,
            low=low,
            high=high,
            against="brute force in float64" if search.is_exact else "exact search",
        ),
        coverage=Comparison(**{name: catalogue_coverage(counts) for name, counts in exposure.items()}),
        gini=Comparison(**{name: gini(counts) for name, counts in exposure.items()}),
        seconds=seconds,
    )


def describe_protocol(settings: Settings, sample: Sample, num_items: int) -> str:
    """What was asked and what counts as found, in a sentence."""
    days = settings.split.test_days
    last_days = "the last day" if days == 1 else f"the last {days} days"
    held_out = "their last event" if settings.split.method == "leave_one_out" else f"their events of {last_days}"
    most, everybody = settings.evaluate.max_queries, sample.num_evaluable
    asked = f"all {everybody} users" if everybody <= most else f"{most} of {everybody} users"
    return (
        f"{asked} with something to find, from their histories before {held_out}; to be found are the items "
        f"of those events that are not in the history; all {num_items} items are ranked, items of the history excluded"
    )
