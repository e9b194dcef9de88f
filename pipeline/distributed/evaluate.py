"""How good tonight's model and search are, on held-out events: a sample of users goes through the same search.

Resumes by unit: what a killed evaluation has written is not computed again, and memory is bounded by a unit.
"""

import logging
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.artifacts import Night
from pipeline.distributed.chain import Stage, run_chain
from pipeline.distributed.cluster import Cluster, connect, deadline
from pipeline.distributed.heldout import AuditedUsers, AuditSink, BruteForcer, EvaluationSink, HeldOutUsers, KeySampler
from pipeline.distributed.search import search_units
from pipeline.errors import InputError
from pipeline.io.corpus import open_corpus
from pipeline.io.evaluations import (
    Sample,
    missing_units,
    read_overlaps,
    read_sample,
    read_scores,
    write_metrics,
    write_sample,
)
from pipeline.io.storage import Storage
from pipeline.retrieval.metrics import (
    MeanSum,
    add_sums,
    catalogue_coverage,
    gini,
    measured_cutoffs,
    summarise,
)
from pipeline.settings import Settings

# Queries by which an exact search is compared with brute force in float64, which scores every pair of the corpus.
NUM_VERIFIED = 5

log = logging.getLogger("nightrails")


def evaluate(storage: Storage, night: Night, settings: Settings) -> dict[str, Any]:
    """Search for a sample of users with held-out events and compare; returns what `metrics.json` holds.

    Raises InputError when the corpus was not embedded, or when nobody has an event that can be predicted.
    """
    started = time.monotonic()
    num_items = int(open_corpus(storage, night.corpus).counts["num_items"])
    cluster = connect(settings)
    with deadline(settings.cluster.deadline_minutes):
        sample = draw_sample(storage, night, settings, cluster)
        todo = missing_units(storage, night.evaluation, sample.units, audit=False)
        scratch = f"{night.evaluation.prefix}/_wave"
        search_units(storage.uri, night, settings, todo, HeldOutUsers, EvaluationSink, scratch)
        _audit(storage, night, settings, sample)
    metrics = collect(storage, night, settings, sample, num_items)
    return write_metrics(storage, night, settings, metrics | {"seconds": round(time.monotonic() - started, 1)})


def draw_sample(storage: Storage, night: Night, settings: Settings, cluster: Cluster) -> Sample:
    """The users to ask, and those of them to audit, by the smallest sampling keys of all; drawn once and kept."""
    known = read_sample(storage, night.evaluation)
    if known is not None:
        return known
    num_readers = min(settings.output.num_buckets, max(1, int(cluster.num_cpus) - 1))
    stage = Stage(KeySampler, _common(storage, night, settings), num_readers, _cpus(settings))
    payloads = run_chain("draw a sample", range(settings.output.num_buckets), [stage], threads=1)
    numbers = {unit: np.frombuffer(payload, dtype=np.uint64) for unit, payload in payloads.items()}
    num_evaluable, without = (int(sum(int(drawn[place]) for drawn in numbers.values())) for place in (0, 1))
    if not num_evaluable:
        raise InputError(
            f"nobody has a test event on an item they had not seen before ({without} users have no earlier event "
            "at all); hold out more with split.test_days, or give a longer log"
        )
    sample = make_sample({unit: drawn[2:] for unit, drawn in numbers.items()}, settings, num_evaluable, without)
    write_sample(storage, night.evaluation, sample)
    return sample


def make_sample(
    keys: Mapping[int, NDArray[np.uint64]], settings: Settings, num_evaluable: int, num_without_history: int
) -> Sample:
    """The sample from each unit's keys, ascending. An approximate search is audited on the smallest of all keys;
    an exact one on a handful of one unit, so that brute force reads the corpus once."""
    merged = np.sort(np.concatenate(list(keys.values())))
    query_threshold = int(merged[: settings.evaluate.max_queries][-1])
    units = [unit for unit in sorted(keys) if keys[unit].size and keys[unit][0] <= query_threshold]
    if settings.search.method == "exact":
        audit_units = [next(unit for unit in units if keys[unit][0] == merged[0])]
        mine = keys[audit_units[0]]
        audit_threshold = int(mine[mine <= query_threshold][:NUM_VERIFIED][-1])
    else:
        audit_threshold = min(query_threshold, int(merged[: settings.evaluate.num_audited][-1]))
        audit_units = [unit for unit in units if keys[unit][0] <= audit_threshold]
    return Sample(
        query_threshold=query_threshold,
        audit_threshold=audit_threshold,
        units=units,
        audit_units=audit_units,
        num_evaluable=num_evaluable,
        num_without_history=num_without_history,
    )


def _audit(storage: Storage, night: Night, settings: Settings, sample: Sample) -> None:
    """Compare lists with exact search; an exact search itself with brute force."""
    todo = missing_units(storage, night.evaluation, sample.audit_units, audit=True)
    if settings.search.method != "exact":
        search = settings.search.model_copy(update={"method": "exact"})
        exact = settings.model_copy(update={"search": search})
        search_units(storage.uri, night, exact, todo, AuditedUsers, AuditSink, f"{night.evaluation.prefix}/_audit")
    elif todo:
        entries = [entry for entry in open_corpus(storage, night.corpus).files if entry.rows]
        stage = Stage(BruteForcer, {**_common(storage, night, settings), "entries": entries}, 1, _cpus(settings))
        run_chain("compare with brute force", todo, [stage], settings.cluster.threads_per_actor)


def collect(storage: Storage, night: Night, settings: Settings, sample: Sample, num_items: int) -> dict[str, Any]:
    """Add the units up, in order, to the metrics (all but `seconds`)."""
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
    return {
        "queries": queries,
        "without_history": sample.num_without_history,
        "protocol": describe_protocol(settings, sample, num_items),
        "method": search.method,
        "k": search.k,
        "cutoffs": list(measured_cutoffs(settings.evaluate.cutoffs, search.k)),
        "model": summarise(model),
        "popularity": summarise(popularity),
        "overlap": {
            "k": search.k,
            "queries": overlap.count,
            "mean": overlap.mean,
            "low": low,
            "high": high,
            "against": "brute force in float64" if search.method == "exact" else "exact search",
        },
        "coverage": {name: catalogue_coverage(counts) for name, counts in exposure.items()},
        "gini": {name: gini(counts) for name, counts in exposure.items()},
    }


def describe_protocol(settings: Settings, sample: Sample, num_items: int) -> str:
    """What was asked and what counts as found, in a sentence."""
    split = settings.split
    held_out = (
        "their last event" if split.method == "leave_one_out" else f"their events of the last {split.test_days} day(s)"
    )
    asked = f"up to {settings.evaluate.max_queries} of {sample.num_evaluable} users"
    return (
        f"{asked} (seed {settings.evaluate.seed}), from their histories before {held_out}; to be found are the items "
        f"of those events that are not in the history; all {num_items} items are ranked, items of the history excluded"
    )


def _common(storage: Storage, night: Night, settings: Settings) -> dict[str, Any]:
    return {"storage_uri": storage.uri, "night": night, "settings": settings}


def _cpus(settings: Settings) -> float:
    return settings.cluster.cpus_per_actor
