"""The model card of a night: in one page, what was trained on what, how it was measured, and what it is good at.

It follows the parts of Mitchell et al. 2019 (details, data, metrics, factors) that a recommender's numbers can fill.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml

from pipeline.artifacts import Manifest
from pipeline.evaluation.results import Estimate, Metrics, Segment
from pipeline.io.artifacts import read_manifest, require_manifest
from pipeline.io.checkpoint import read_metrics
from pipeline.io.memory import MemoryRecord, require_memory
from pipeline.io.night import Night
from pipeline.model.results import TrainingMetrics
from pipeline.quality.report import differences_table, figures_table, turnout
from pipeline.settings import Settings

SHOWN_SETTINGS = {"model", "train", "split", "counts", "memory", "rules", "search"}
DATA = ("users", "items", "events", "train_events", "validation_events", "test_events")
NAMES = {"model": "model", "mol": "MoL alone", "popularity": "popularity", "counts": "counts"}
DIVISIONS = {
    "history": "By the length of the user's history",
    "popularity": "By the popularity of the item to find",
    "age": "By the age of the item to find",
}


@dataclass(frozen=True)
class Facts:
    """What a night's artifacts say of its models."""

    title: str
    histories: Manifest | None
    selected: Manifest
    measured: Manifest
    served: Manifest
    # Of the models that are measured and that serve; all but what they say of a refit is the selected one's.
    measured_training: TrainingMetrics
    training: TrainingMetrics
    memory: MemoryRecord | None  # None: counts can have no part in the score
    settings: Settings


def read_facts(night: Night, settings: Settings) -> Facts:
    """Read the facts. Raises InputError when a model or the choice of the memory does not exist yet."""
    storage = night.storage
    return Facts(
        title=f"{settings.name}, ds={night.ds}",
        histories=read_manifest(storage, night.histories.prefix),
        selected=require_manifest(storage, night.selected, "train"),
        measured=require_manifest(storage, night.measured, "train"),
        served=require_manifest(storage, night.checkpoint, "train"),
        measured_training=read_metrics(storage, night.measured),
        training=read_metrics(storage, night.checkpoint),
        memory=require_memory(night) if settings.memory.enabled else None,
        settings=settings,
    )


def model_card(facts: Facts, metrics: Metrics) -> str:
    """Write the card in Markdown."""
    return (
        "\n\n".join(
            [
                f"# Model card: {facts.title}",
                _table(["", ""], _details(facts)),
                "## Data and split",
                _data(facts),
                "## Held-out metrics",
                f"Of the measured model, which has learned nothing from the test events. {metrics.queries} queries: "
                f"{metrics.protocol}. {turnout(metrics)[0].upper()}{turnout(metrics)[1:]}.",
                f"```\n{figures_table(metrics)}\n```",
                "Against the counts, for the same users (paired test; better and worse are numbers of users):",
                f"```\n{differences_table('counts', 'model', metrics.over_counts)}\n```",
                *_segments(metrics),
                "## What the lists are like",
                _lists(metrics),
                "## The gate",
                _gate(metrics.gates),
                "## Settings",
                f"```yaml\n{_settings(facts.settings)}```",
            ]
        )
        + "\n"
    )


def _details(facts: Facts) -> list[Sequence[str]]:
    training, selected = facts.training, facts.selected
    rows: list[Sequence[str]] = [
        ("selected model", f"`{selected.id}`, made {selected.created_at}"),
        (
            "measured model",
            f"`{facts.measured.id}`, "
            + _refitted(facts.measured, selected, facts.measured_training, "the events before the test"),
        ),
        ("served model", f"`{facts.served.id}`, {_refitted(facts.served, selected, training, 'all events')}"),
        ("parameters", f"{selected.counts['num_parameters']:,}, for {selected.counts['num_items']:,} items"),
        ("best of the training", f"epoch {training.best_epoch:g} of {training.history[-1].epoch:g}"),
        (
            "validation",
            f"HR@{training.cutoff} {training.validation_hit_rate:.4f}, NDCG@{training.cutoff} "
            f"{training.validation_ndcg:.4f} ({training.num_validation_users:,} users; without the counts)",
        ),
        ("training ended by", f"`train.{training.ended_by}`" if training.ended_by else "the end of the night"),
        (
            "time",
            f"{training.seconds / 60:.1f} minutes, {training.positions_per_second:,.0f} positions per second "
            f"({training.backend})",
        ),
        ("counts in the score", _memory(facts.memory)),
    ]
    for manifest, name in ((selected, "selected"), (facts.measured, "measured"), (facts.served, "served")):
        sources = {key: value for key, value in manifest.lineage.items() if key not in ("histories", "selected")}
        rows += [(f"{name}: {key.replace('_', ' ')}", f"`{value}`") for key, value in sources.items()]
    return rows


def _refitted(model: Manifest, selected: Manifest, training: TrainingMetrics, events: str) -> str:
    if model.id == selected.id:
        return "the same"
    if training.is_refit_served:
        return f"which has learned from {events} for {training.refit_epochs:.1f} epochs more"
    return "with the same weights"


def _memory(memory: MemoryRecord | None) -> str:
    if memory is None:
        return "none: `memory.enabled` is false"
    if not memory.weight:
        return f"none: no weight was better for {memory.num_users:,} validation users"
    return (
        f"weight {memory.weight:g}, scale {memory.scale:g}: NDCG@10 of {memory.num_users:,} validation users "
        f"{memory.ndcg_without:.4f} → {memory.ndcg:.4f}"
    )


def _data(facts: Facts) -> str:
    split = facts.settings.split
    if split.method == "leave_one_out":
        words = "Each user's last event is the test, the one before it the validation, the others are for training."
    else:
        words = (
            f"Split by time: the test has {_days(split.test_days)}, the validation {_days(split.validation_days)} "
            "before that, the training all that came earlier."
        )
    if facts.histories is None:
        return words
    counts = facts.histories.counts
    numbers = [(name.replace("_", " "), f"{counts[name]:,}") for name in DATA if name in counts]
    head = f"Histories `{facts.histories.id}`, with what was left out of the log in `validation-….json` there. {words}"
    return f"{head}\n\n{_table(['', 'number'], numbers)}"


def _days(number: int) -> str:
    return "one day" if number == 1 else f"{number} days"


def _segments(metrics: Metrics) -> list[str]:
    parts = []
    for by, heading in DIVISIONS.items():
        segments = [segment for segment in metrics.segments if segment.by == by]
        if len(segments) > 1:
            parts += [f"### {heading}", _segment_table(segments, metrics)]
    return parts


def _segment_table(segments: Sequence[Segment], metrics: Metrics) -> str:
    cutoff = min(metrics.cutoffs)
    hit_rate, ndcg = f"hr@{cutoff}", f"ndcg@{cutoff}"
    rankings = [name for name in NAMES if name in segments[0].rankings]
    head = ["", "users", f"model {hit_rate}, 95 %", f"model {ndcg}"]
    head += [f"{NAMES[name]} {hit_rate}" for name in rankings if name != "model"]
    rows = []
    for segment in segments:
        model = segment.rankings["model"]
        others = [segment.rankings[name][hit_rate].mean for name in rankings if name != "model"]
        cells = [_interval(model[hit_rate]), f"{model[ndcg].mean:.4f}", *(f"{other:.4f}" for other in others)]
        rows.append([segment.name, f"{segment.queries:,}", *cells])
    return _table(head, rows)


def _interval(estimate: Estimate) -> str:
    return f"{estimate.mean:.4f} ({estimate.low:.4f} to {estimate.high:.4f})"


def _lists(metrics: Metrics) -> str:
    cutoff, k = min(metrics.cutoffs), metrics.k
    figures = (
        (f"coverage: share of all items in some list of {k}", metrics.coverage),
        (f"Gini coefficient of how often the lists of {k} show each item", metrics.gini),
        (f"novelty: bits of the first {cutoff} items", metrics.novelty),
        (f"distance between two of the first {cutoff} items, 0 to 1", metrics.distance),
    )
    rows = [
        (name, *(f"{value:.4f}" for value in (figure.model, figure.popularity, figure.counts)))
        for name, figure in figures
    ]
    return _table(["", "model", "popularity", "counts"], rows)


def _gate(gates: Sequence[float]) -> str:
    shares = np.array(gates)
    used = shares[shares > 0]
    in_use = float(np.exp(-(used * np.log(used)).sum())) if used.size else 0.0
    least, most = int(shares.argmin()), int(shares.argmax())
    return (
        f"Of {len(shares)} pairs of components, the gate spreads its weight over the items of the lists as if "
        f"{in_use:.1f} were in use alike (the exponential of the entropy of the mean weights). Pair {most} has most, "
        f"{shares[most]:.1%}; pair {least} has least, {shares[least]:.1%}."
    )


def _settings(settings: Settings) -> str:
    shown: dict[str, Any] = settings.model_dump(mode="json", include=SHOWN_SETTINGS)
    return yaml.safe_dump(shown, sort_keys=False)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
