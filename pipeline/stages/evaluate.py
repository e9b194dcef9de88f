"""How good tonight's model and search are, on held-out events: a sample of users goes through the same search.

Resumes by unit: what a killed evaluation has written is not computed again, and memory is bounded by a unit.
"""

import time

import numpy as np

from pipeline.errors import InputError
from pipeline.evaluation.metrics import MeanSum, add_sums, catalogue_coverage, gini, measured_cutoffs, summarise
from pipeline.evaluation.results import Comparison, Metrics, Overlap
from pipeline.io.corpus import open_corpus
from pipeline.io.evaluation import REMEDY, Sample, overlap_claims, sample_claims, score_claims, write_metrics
from pipeline.io.night import Night
from pipeline.settings import Settings
from pipeline.stages.heldout import CheckedUsers, EvaluationSink, HeldOutUsers, RecallCheckSink
from pipeline.stages.runner import Runner
from pipeline.stages.sample import draw_unit, make_sample
from pipeline.stages.search import search_units


def evaluate(runner: Runner, night: Night, settings: Settings) -> Metrics:
    """Search for a sample of users with held-out events, compare, and leave the metrics as the Evaluation artifact.

    Returns the metrics that stand, the first of several attempts.

    Raises InputError when the corpus was not embedded, or when nobody has an event that can be predicted.
    """
    started = time.monotonic()
    num_items = open_corpus(night.storage, night.corpus).counts["num_items"]
    sample = draw_sample(runner, night, settings)
    missing = score_claims(night).missing(sample.units)
    if settings.search.is_exact:  # verified as its lists are made
        missing = sorted({*missing, *overlap_claims(night).missing(sample.checked_units)})
    users = HeldOutUsers(sample, settings.evaluate.seed)
    search_units(runner, night, settings, missing, users, EvaluationSink, night.evaluation.key("_wave"))
    if not settings.search.is_exact:  # the lists of an exact search were verified as they were made
        _check_recall(runner, night, settings, sample)
    seconds = round(time.monotonic() - started, 1)
    return write_metrics(night, settings, collect(night, settings, sample, num_items, seconds))


def draw_sample(runner: Runner, night: Night, settings: Settings) -> Sample:
    """The users to ask, and those of them to check, by the smallest sampling keys of all; drawn once and kept."""
    known = sample_claims(night).read(0)
    if known is not None:
        return known
    seed, most = settings.evaluate.seed, settings.evaluate.max_queries
    units = [(night, unit, seed, most) for unit in range(settings.output.num_buckets)]
    draws = sorted(runner.run_tasks("draw a sample", draw_unit, units), key=lambda draw: draw.unit)
    num_evaluable, without = sum(draw.num_evaluable for draw in draws), sum(draw.num_without_history for draw in draws)
    if not num_evaluable:
        raise InputError(
            f"nobody has a test event on an item they had not seen before ({without} users have no earlier event "
            "at all); hold out more with split.test_days, or give a longer log"
        )
    sample = make_sample({draw.unit: draw.keys for draw in draws}, settings, num_evaluable, without)
    return sample_claims(night).claim(0, sample)


def _check_recall(runner: Runner, night: Night, settings: Settings, sample: Sample) -> None:
    """Compare the lists of an approximate search with exact search."""
    missing = overlap_claims(night).missing(sample.checked_units)
    exact = settings.with_search({"method": "exact"})
    users = CheckedUsers(sample, settings.evaluate.seed)
    search_units(runner, night, exact, missing, users, RecallCheckSink, night.evaluation.key("_recall-check"))


def collect(night: Night, settings: Settings, sample: Sample, num_items: int, seconds: float) -> Metrics:
    """Add the units up, in order, to the metrics; `seconds` is what the search took."""
    search = settings.search
    queries, num_proven, model, popularity = 0, 0, dict[str, MeanSum](), dict[str, MeanSum]()
    exposure = {"model": np.zeros(num_items, dtype=np.int64), "popularity": np.zeros(num_items, dtype=np.int64)}
    claims = score_claims(night)
    for unit in sample.units:
        scores = claims.require(unit, REMEDY)
        queries, num_proven = queries + scores.queries, num_proven + scores.num_proven
        model, popularity = add_sums([model, scores.model]), add_sums([popularity, scores.popularity])
        exposure["model"][scores.exposure.item_rows] += scores.exposure.model
        exposure["popularity"][scores.exposure.item_rows] += scores.exposure.popularity
    checks = (overlap_claims(night).require(unit, REMEDY) for unit in sample.checked_units)
    overlap = sum((check.overlap for check in checks), start=MeanSum())
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
        proven=num_proven / queries,
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
