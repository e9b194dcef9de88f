"""Evaluating tonight's model and search on held-out events: a sample of users goes through the same search.

A killed evaluation resumes with the units that are missing, and memory holds one unit at a time.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np

from pipeline.artifacts import FileEntry
from pipeline.errors import InputError
from pipeline.evaluation.metrics import (
    MeanSum,
    RankingSums,
    add_sums,
    catalogue_coverage,
    gini,
    measured_cutoffs,
    summarise,
)
from pipeline.evaluation.paired import differences
from pipeline.evaluation.results import RANKINGS, Comparison, Metrics, Overlap, Segment
from pipeline.evaluation.segments import DIVISIONS
from pipeline.evaluation.targets import Turnout
from pipeline.io.checkpoint import model_bytes
from pipeline.io.corpus import open_corpus
from pipeline.io.evaluation import (
    REMEDY,
    GateSums,
    Sample,
    checked_claims,
    overlap_claims,
    read_users,
    sample_claims,
    score_claims,
    write_metrics,
)
from pipeline.io.night import Night
from pipeline.quality.card import model_card, read_facts
from pipeline.settings import PrepareSettings, SearchSettings, Settings
from pipeline.stages.devices import memory_to_hold
from pipeline.stages.heldout import (
    BruteForceSink,
    CheckedListsSink,
    CheckedUsers,
    EvaluationSink,
    HeldOutUsers,
    RecallCheckSink,
)
from pipeline.stages.lists import search_units
from pipeline.stages.memory import memory_of_neighbours, uses_memory
from pipeline.stages.runner import Runner
from pipeline.stages.sample import draw_unit, make_sample
from pipeline.stages.search import Search


def evaluate(runner: Runner, night: Night, settings: Settings) -> Metrics:
    """Search for a sample of users with test events and compare; return the metrics of the Evaluation artifact.

    The metrics are those of the model that is made as the one that serves, but of the events before the test, and with
    counts of these events where they have a part in the score. How near the search comes to a perfect one is measured
    on the model that serves. Of several attempts the metrics of the first stand. Raises
    InputError when there is no corpus, no count of pairs or no user with a test event to predict, and the errors of
    `Runner.run_chain`.
    """
    started = time.monotonic()
    measurement = night.measurement
    num_items = open_corpus(night.storage, measurement.corpus).counts["num_items"]
    sink_memory = memory_of_neighbours(measurement) + memory_to_hold(model_bytes(measurement))
    sample = draw_sample(runner, night, settings)
    users = HeldOutUsers(sample, settings.evaluate.seed)
    # MoL alone is searched for too, to tell what the counts bring.
    search = Search(measurement, settings, users, night.evaluation.key("_wave"), uses_memory(night, settings))
    search_units(runner, search, score_claims(night).missing(sample.units), EvaluationSink, sink_memory)
    _check_recall(runner, night, settings, sample)
    seconds = round(time.monotonic() - started, 1)
    metrics = collect(night, settings, sample, num_items, seconds)
    card = model_card(read_facts(night, settings), metrics)
    return write_metrics(night, settings, metrics, card, _user_files(night, sample))


def _user_files(night: Night, sample: Sample) -> list[FileEntry]:
    claims = score_claims(night)
    return [claims.require(unit, REMEDY).users for unit in sample.units]


def draw_sample(runner: Runner, night: Night, settings: Settings) -> Sample:
    """The sample of users, drawn by the smallest sampling keys of all users; the first draw stands.

    Raises InputError when no user has a test event to predict.
    """
    existing = sample_claims(night).read(0)
    if existing is not None:
        return existing
    seed, max_keys = settings.evaluate.seed, settings.evaluate.max_queries
    arguments = [(night, unit, seed, max_keys) for unit in range(settings.output.num_buckets)]
    draws = sorted(runner.run_tasks("draw a sample", draw_unit, arguments), key=lambda draw: draw.unit)
    num_evaluable = sum(draw.num_evaluable for draw in draws)
    turnout = sum((draw.turnout for draw in draws), start=Turnout())
    if not num_evaluable:
        raise InputError(
            f"nobody has a test event on an item that may be shown to them ({turnout.with_test_events} users have test "
            f"events: {turnout.only_repeats} had seen all these items before, {turnout.without_history} have no "
            "earlier event); hold out more days with split.test_days, or give a longer log"
        )
    sample = make_sample({draw.unit: draw.keys for draw in draws}, settings, num_evaluable, turnout)
    return sample_claims(night).claim(0, sample)


def _check_recall(runner: Runner, night: Night, settings: Settings, sample: Sample) -> None:
    """Search for the checked users with the model that serves, and compare: an approximate search with exact search, an
    exact one with brute force. The rules for whole lists have no part in it: the search finds what they choose from."""
    missing = overlap_claims(night).missing(sample.checked_units)
    users = CheckedUsers(sample, settings.evaluate.seed)
    search = Search(night, settings, users, night.evaluation.key("_checked"))
    if settings.search.is_exact:
        search_units(runner, search, missing, BruteForceSink, keeps_list_rules=False)
        return
    search_units(runner, search, checked_claims(night).missing(missing), CheckedListsSink, keeps_list_rules=False)
    exact = Search(night, settings.with_search({"method": "exact"}), users, night.evaluation.key("_recall-check"))
    search_units(runner, exact, missing, RecallCheckSink, keeps_list_rules=False)


def collect(night: Night, settings: Settings, sample: Sample, num_items: int, seconds: float) -> Metrics:
    """Add up the units, in their order, to the metrics; `seconds` is the duration of the evaluation."""
    search = settings.search
    queries = num_proven = 0
    sums: dict[str, dict[str, MeanSum]] = {name: {} for name in RANKINGS}
    exposure = {name: np.zeros(num_items, dtype=np.int64) for name in RANKINGS}
    novelties, distances = (dict.fromkeys(RANKINGS, MeanSum()) for _ in range(2))
    mol: dict[str, MeanSum] = {}
    segments: dict[tuple[str, str], dict[str, dict[str, MeanSum]]] = {}
    gates: list[GateSums] = []
    claims = score_claims(night)
    for unit in sample.units:
        scores = claims.require(unit, REMEDY)
        queries, num_proven = queries + scores.queries, num_proven + scores.num_proven
        mol = add_sums([mol, scores.mol])
        novelties, distances = (add_sums(pair) for pair in ((novelties, scores.novelty), (distances, scores.distance)))
        gates.append(scores.gates)
        for segment in scores.segments:
            rankings = segments.setdefault((segment.by, segment.name), {})
            for name, values in segment.rankings.items():
                rankings[name] = add_sums([rankings.get(name, {}), values])
        for name in RANKINGS:
            sums[name] = add_sums([sums[name], getattr(scores, name)])
            exposure[name][scores.exposure.item_rows] += getattr(scores.exposure, name)
    users = read_users(night.storage, night.evaluation, _user_files(night, sample))
    cutoffs = measured_cutoffs(settings.evaluate.cutoffs, search.k)
    return Metrics(
        queries=queries,
        **asdict(sample.turnout),
        protocol=describe_protocol(settings, sample, num_items),
        method=search.method,
        k=search.k,
        cutoffs=cutoffs,
        model=summarise(sums["model"]),
        popularity=summarise(sums["popularity"]),
        counts=summarise(sums["counts"]),
        mol=summarise(mol),
        over_counts=differences((users, "counts"), (users, "model"), search.k, cutoffs),
        overlap=_collect_overlap(night, search, sample),
        proven=num_proven / queries,
        coverage=Comparison(**{name: catalogue_coverage(counts) for name, counts in exposure.items()}),
        gini=Comparison(**{name: gini(counts) for name, counts in exposure.items()}),
        novelty=Comparison(**{name: value.mean for name, value in novelties.items()}),
        distance=Comparison(**{name: value.mean for name, value in distances.items()}),
        gates=_mean_gates(gates),
        segments=_collect_segments(segments),
        seconds=seconds,
    )


def _mean_gates(parts: Sequence[GateSums]) -> tuple[float, ...]:
    num_items = sum(part.num_items for part in parts)
    weights = np.sum([part.weights for part in parts], axis=0) / max(1, num_items)
    return tuple(float(weight) for weight in weights)


def _collect_segments(sums: Mapping[tuple[str, str], Mapping[str, RankingSums]]) -> tuple[Segment, ...]:
    """The segments that have users, in the order of their divisions."""
    return tuple(
        Segment(
            by=by,
            name=name,
            queries=next(iter(rankings["model"].values())).count,
            rankings={ranking: summarise(values) for ranking, values in rankings.items()},
        )
        for by, names in DIVISIONS.items()
        for name in names
        for rankings in [sums.get((by, name))]
        if rankings
    )


def _collect_overlap(night: Night, search: SearchSettings, sample: Sample) -> Overlap:
    checks = (overlap_claims(night).require(unit, REMEDY) for unit in sample.checked_units)
    overlap = sum((check.overlap for check in checks), start=MeanSum())
    low, high = overlap.normal_interval()
    against = "brute force in float64" if search.is_exact else "exact search"
    return Overlap(k=search.k, queries=overlap.count, mean=overlap.mean, low=low, high=high, against=against)


def describe_protocol(settings: Settings, sample: Sample, num_items: int) -> str:
    """The protocol in a sentence: which users, which visible history, which items are to be found."""
    days = settings.split.test_days
    last_days = "the last day" if days == 1 else f"the last {days} days"
    held_out = "their last event" if settings.split.method == "leave_one_out" else f"their events of {last_days}"
    max_queries, num_users = settings.evaluate.max_queries, sample.num_evaluable
    users = f"all {num_users} users" if num_users <= max_queries else f"{max_queries} of {num_users} users"
    return (
        f"{users} with something to find, from their histories before {held_out}; {what_is_found(settings.prepare)}; "
        f"all {num_items} items are ranked, except those that are not shown to the user"
    )


def what_is_found(prepare: PrepareSettings) -> str:
    """Say which items of held-out events are to be found: those that may be shown."""
    types, days = prepare.seen_event_types, prepare.seen_lookback_days
    if types == ():
        return "to be found are the items of those events, seen before or not"
    kinds = "" if types is None else f" in events of {', '.join(types)}"
    time = "" if days is None else f" in the last {days} days"
    return f"to be found are the items of those events that the user has not seen before{kinds}{time}"
