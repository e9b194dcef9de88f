"""Nights that differ in a few settings of the model or its training, side by side: what the studies of this folder are
made of.

Each variant is trained, searched and evaluated as a night is, on one thread, by the selected model with counts left
out. ROOT keeps what is done, so a study that was killed goes on. FOLDER receives a table and a picture.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from jobs import count_pairs, embed_items, evaluate, prepare, simulate_log, train, tune
from jobs.studies.machine import processor
from pipeline.config import Config, apply_overrides, load_config, validate
from pipeline.evaluation.results import Metrics
from pipeline.io.checkpoint import read_metrics as read_training
from pipeline.io.evaluation import read_metrics
from pipeline.io.night import Night, open_night
from pipeline.io.tuning import TuningRecord, read_tuning
from pipeline.settings import SIMULATED, Settings

log = logging.getLogger("nightrails")

Keys = Mapping[str, Any]

# A log of the size of the demo's, each user's last event held out, and a search that is chosen whatever the size.
SIZES: Keys = {
    "simulate.num_users": 3_000,
    "simulate.num_items": 2_000,
    "simulate.num_events": 120_000,
    "split.method": "leave_one_out",
    "model.dim": 48,
    "model.mol.component_dim": 24,
    "train.max_minutes": 30,
    "search.k": 50,
    "evaluate.cutoffs": "[10, 50]",
}
ALWAYS: Keys = {
    "cluster.mode": "local",
    "train.refit": 0,
    "memory.enabled": False,
    "search.method": "tuned",
    "search.tuning.min_pairs": 0,
    "search.tuning.max_seconds": 60,
    "gates.min_overlap": 0.0,
}


@dataclass(frozen=True)
class Study:
    """The variants by name, and what the picture shows of them."""

    name: str
    variants: Mapping[str, Keys]
    picture: Mapping[str, str]  # fields of `Result` that are drawn, with the words for them


class Result(Config):
    """One variant."""

    variant: str
    hit_rate: float  # at the smallest cutoff, of the test event, and the 95 % interval
    low: float
    high: float
    ndcg: float
    counts_hit_rate: float  # of item-to-item counts, for the same users
    gates_in_use: float  # exponential of the entropy of the gate's mean weights
    num_pairs: int
    epochs: float
    seconds: float  # of the processor, in training
    exact_milliseconds: float  # per query, on one thread
    milliseconds: float  # of the chosen search
    method: str
    recall: float  # of the chosen search


COLUMNS: Mapping[str, tuple[str, str]] = {
    "hit_rate": ("HR@10", "{:.4f}"),
    "ndcg": ("NDCG@10", "{:.4f}"),
    "gates_in_use": ("pairs in use", "{:.1f}"),
    "num_pairs": ("of", "{}"),
    "epochs": ("epochs", "{:.0f}"),
    "seconds": ("training, s", "{:.0f}"),
    "exact_milliseconds": ("exact, ms", "{:.2f}"),
    "milliseconds": ("chosen, ms", "{:.2f}"),
    "method": ("method", "{}"),
    "recall": ("recall", "{:.4f}"),
}


def run_study(study: Study, root: Path, folder: Path, config: Path | None, overrides: Sequence[str]) -> None:
    """Run the variants that are not done yet, then print, write and draw."""
    torch.set_num_threads(1)
    results = [run_variant(study, name, root, config, overrides) for name in study.variants]
    folder.mkdir(parents=True, exist_ok=True)
    text = table(results)
    print(text, flush=True)
    words = [*(["--config", str(config)] if config else []), *(f"--set {each}" for each in overrides)]
    command = " ".join([f"python jobs/study.py {study.name}", *words])
    on = log_in_words(settings_of(root, {}, config, overrides))
    title = f"`{command}`, {on}; one thread of {processor()}"
    (folder / f"{study.name}.md").write_text(f"{title}\n\n![The variants]({study.name}.svg)\n\n{text}\n")
    draw(study, results, folder / f"{study.name}.svg")


def log_in_words(settings: Settings) -> str:
    """The log that the study was run on."""
    if settings.log.source != SIMULATED:
        return f"the log `{settings.log.source}` of {settings.name}"
    simulated = settings.simulate
    return (
        f"a simulated log of {simulated.num_users:,} users, {simulated.num_items:,} items and "
        f"{simulated.num_events:,} events"
    )


def settings_of(root: Path, keys: Keys, config: Path | None, overrides: Sequence[str]) -> Settings:
    """The settings of a variant: those of the study or of a file, then its own, then the overrides."""
    base = {} if config is None else load_config(Settings, config, []).model_dump(mode="json", exclude_unset=True)
    sizes = SIZES if config is None else {}
    pairs = [f"{key}={value}" for key, value in chain(sizes.items(), ALWAYS.items(), keys.items(), [("root", root)])]
    return validate(Settings, apply_overrides(base, [*pairs, *overrides]), origin="--set")


def run_variant(study: Study, name: str, root: Path, config: Path | None, overrides: Sequence[str]) -> Result:
    """Run one variant and measure it, unless that is done."""
    file = root / "results" / study.name / f"{name}.json"
    if file.exists():
        return Result.model_validate_json(file.read_text())
    log.info("── %s: %s", study.name, name)
    settings = settings_of(root, study.variants[name], config, overrides)
    if settings.log.source == SIMULATED:
        simulate_log.run(settings, None)
    night = open_night(settings)
    for job in (prepare, count_pairs):
        job.run(settings, night)
    started = time.process_time()
    train.run(settings, night)
    seconds = time.process_time() - started
    for job in (embed_items, tune, evaluate):
        job.run(settings, night)
    result = describe(name, night, seconds)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(result.model_dump_json())
    return result


def describe(name: str, night: Night, seconds: float) -> Result:
    """Read the figures of an evaluated night."""
    metrics, tuning = read_metrics(night.storage, night.evaluation), read_tuning(night)
    assert isinstance(metrics, Metrics)
    assert isinstance(tuning, TuningRecord)
    cutoff = min(metrics.cutoffs)
    hit_rate, shares = metrics.model[f"hr@{cutoff}"], np.array([share for share in metrics.gates if share > 0])
    chosen = tuning.measured["chosen"]
    return Result(
        variant=name,
        hit_rate=hit_rate.mean,
        low=hit_rate.low,
        high=hit_rate.high,
        ndcg=metrics.model[f"ndcg@{cutoff}"].mean,
        counts_hit_rate=metrics.counts[f"hr@{cutoff}"].mean,
        gates_in_use=float(np.exp(-(shares * np.log(shares)).sum())),
        num_pairs=len(metrics.gates),
        epochs=read_training(night.storage, night.checkpoint).best_epoch,
        seconds=seconds,
        exact_milliseconds=tuning.measured["exact_milliseconds_per_query"],
        milliseconds=chosen["milliseconds_per_query"],
        method=tuning.method,
        recall=chosen["recall"],
    )


def table(results: Sequence[Result]) -> str:
    """Write one line per variant, and what item-to-item counts reach."""
    lines = [f"| | {' | '.join(head for head, _ in COLUMNS.values())} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for result in results:
        cells = [form.format(getattr(result, name)) for name, (_, form) in COLUMNS.items()]
        lines.append(f"| {result.variant} | {' | '.join(cells)} |")
    counts, first = results[0].counts_hit_rate, results[0]
    lines.append(
        f"\nItem-to-item counts reach {counts:.4f}. The 95 % interval of a hit rate is about ± "
        f"{(first.high - first.low) / 2:.4f}; between two variants, which have the same users, it is narrower."
    )
    return "\n".join(lines)


def draw(study: Study, results: Sequence[Result], path: Path) -> None:
    """Draw the figures of the study by variant as an SVG or PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 2.5 * len(study.picture)), layout="constrained")
    all_axes = figure.subplots(len(study.picture), sharex=True, squeeze=False)[:, 0]
    places = range(len(results))
    for axes, (field, label) in zip(all_axes, study.picture.items(), strict=True):
        axes.plot(places, [getattr(result, field) for result in results], "o-")
        if field == "hit_rate":
            axes.fill_between(places, [each.low for each in results], [each.high for each in results], alpha=0.2)
        axes.set_ylabel(label)
        axes.grid(visible=True, alpha=0.3)
    all_axes[-1].set_xticks(list(places), [result.variant for result in results], rotation=30, ha="right")
    figure.savefig(path)
