"""What a night gains by going on from the night before, or by taking its models over.

The last nights of a simulated month are run three ways: `scratch` trains each from scratch, `previous` goes on from the
night before (train.start_from previous), `weekly` takes the models over for seven days (train.every_days 7). The first
night is trained from scratch in each. The catalogue of a night has the items that exist on its day, so the last nights
have items that an older model does not know. Hit rates are those of the test day, by the selected model, which has not
learned from it: of the published score, and of MoL alone. Seconds are those of the processor, for the selected model
and its refit.

ROOT keeps what is done: a study that was killed goes on with the night that it was in, whose seconds then begin anew.
FOLDER receives the table and the picture.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from jobs import nightly_candidates, prepare, train
from jobs.studies.machine import processor
from pipeline.config import Config, apply_overrides, validate
from pipeline.data.simulation.log import simulate_items
from pipeline.io.checkpoint import read_metrics as read_training
from pipeline.io.evaluation import read_metrics
from pipeline.io.night import Night, open_night
from pipeline.io.simulated import write_simulated_log
from pipeline.io.storage import open_storage
from pipeline.settings import Settings

log = logging.getLogger("nightrails")

WAYS: Mapping[str, Mapping[str, Any]] = {
    "scratch": {},
    "previous": {"train.start_from": "previous"},
    "weekly": {"train.every_days": 7},
}
SIZES = {
    "simulate.num_users": 1_200,
    "simulate.num_items": 300,
    "simulate.num_events": 30_000,
    "simulate.num_tastes": 12,
    "model.dim": 32,
    "model.max_length": 30,
    "model.mol.component_dim": 16,
    "model.mol.query_hidden_dim": 64,
    "model.mol.gate_hidden_dim": 32,
    "train.num_negatives": 64,
    "train.batch_positions": 1_024,
    "search.k": 20,
    "evaluate.cutoffs": "[10]",
    "output.num_buckets": 2,
    "corpus.num_shards": 1,
    "cluster.mode": "local",
}


# Of a night, by field: the head of its column, and how it is written.
FIGURES = {
    "hit_rate": ("HR@10", "{:.4f}"),
    "mol_hit_rate": ("MoL alone", "{:.4f}"),
    "seconds": ("s", "{:.1f}"),
    "epochs": ("epochs", "{:.0f}"),
}


class NightResult(Config):
    """One night in one way."""

    way: str
    ds: str
    seconds: float  # of the processor, in training
    epochs: float  # until the selected weights; 0 where they are those of an earlier night
    queries: int
    hit_rate: float  # at 10, of the published score
    mol_hit_rate: float  # of MoL alone
    num_unknown_items: int


def main(root: Path, folder: Path, nights: int, overrides: Sequence[str]) -> None:
    """Run the nights that are not done yet, then print and draw."""
    torch.set_num_threads(1)
    base = settings_of(root, {}, overrides)
    write_simulated_log(open_storage(base.root), base.simulate)
    days = [base.simulate.last_day - timedelta(days=back) for back in reversed(range(nights))]
    results = [run_night(root, way, day, overrides) for way in WAYS for day in days]
    folder.mkdir(parents=True, exist_ok=True)
    text = table(results)
    print(text, flush=True)
    simulated = base.simulate
    title = (
        f"`{' '.join(['python jobs/study.py cadence', *(f'--set {each}' for each in overrides)])}`, {nights} nights: "
        f"{simulated.num_users:,} users, {simulated.num_items:,} items, {simulated.num_events:,} events in "
        f"{simulated.num_days} days; one thread of {processor()}"
    )
    (folder / "cadence.md").write_text(f"{title}\n\n![The nights](cadence.svg)\n\n{text}\n")
    draw(results, folder / "cadence.svg")


def settings_of(root: Path, keys: Mapping[str, Any], overrides: Sequence[str]) -> Settings:
    """The settings of the study's nights, with the keys of a way, and the overrides on top."""
    pairs = [f"{key}={value}" for key, value in chain(SIZES.items(), keys.items(), [("root", root)])]
    return validate(Settings, apply_overrides({}, [*pairs, *overrides]), origin="--set")


def run_night(root: Path, way: str, day: date, overrides: Sequence[str]) -> NightResult:
    """Run one night and measure it, unless that is done."""
    file = root / "results" / f"{way}-{day}.json"
    if file.exists():
        return NightResult.model_validate_json(file.read_text())
    log.info("── %s, %s", way, day)
    catalogue = write_catalogue(root, day, settings_of(root, {}, overrides))
    settings = settings_of(root, {**WAYS[way], "name": way, "items.uri": catalogue}, overrides)
    night = open_night(settings, day)
    prepare.run(settings, night)
    seconds = train_timed(root, settings, night)
    nightly_candidates.run(settings, day)
    result = describe(way, night, seconds)
    file.parent.mkdir(exist_ok=True)
    file.write_text(result.model_dump_json())
    return result


def write_catalogue(root: Path, day: date, settings: Settings) -> Path:
    """Write the items that exist by the end of the day."""
    file = root / "catalogues" / f"{day}.parquet"
    if not file.exists():
        items = simulate_items(settings.simulate)
        end_of_day = datetime(day.year, day.month, day.day, tzinfo=UTC) + timedelta(days=1)
        file.parent.mkdir(exist_ok=True)
        pq.write_table(items.filter(pc.less(items["available_from"], end_of_day)), file)
    return file


def train_timed(root: Path, settings: Settings, night: Night) -> float:
    """Train the night's models; returns the processor's seconds, also of a model that another way has trained."""
    file = root / "results" / f"seconds-{night.checkpoint.id}.txt"
    if not file.exists():
        started = time.process_time()
        train.run(settings, night)
        file.parent.mkdir(exist_ok=True)
        file.write_text(str(time.process_time() - started))
    return float(file.read_text())


def describe(way: str, night: Night, seconds: float) -> NightResult:
    """Read the figures of a published night."""
    metrics = read_metrics(night.storage, night.evaluation)
    assert metrics is not None
    training = read_training(night.storage, night.checkpoint)
    return NightResult(
        way=way,
        ds=night.ds.isoformat(),
        seconds=seconds,
        epochs=0.0 if night.taken_over else training.best_epoch,
        queries=metrics.queries,
        hit_rate=metrics.model["hr@10"].mean,
        mol_hit_rate=(metrics.mol or metrics.model)["hr@10"].mean,
        num_unknown_items=training.num_unknown_items,
    )


def table(results: Sequence[NightResult]) -> str:
    """Write one line per night, then the means of the nights after the first, and their share of `scratch`."""
    heads = [f"{way}: {head}" for way in WAYS for head, _ in FIGURES.values()]
    lines = [f"| night | queries | new items | {' | '.join(heads)} |", "|---" * (len(heads) + 3) + "|"]
    for ds in dict.fromkeys(result.ds for result in results):
        ways = [result for result in results if result.ds == ds]
        new = max(result.num_unknown_items for result in ways)
        cells = [form.format(getattr(each, name)) for each in ways for name, (_, form) in FIGURES.items()]
        lines.append(f"| {ds} | {ways[0].queries} | {new} | {' | '.join(cells)} |")
    means = {(way, name): _mean(results, way, name) for way in WAYS for name in FIGURES}
    cells = [FIGURES[name][1].format(mean) for (_, name), mean in means.items()]
    shares = [f"{mean / means['scratch', name]:.3f}" for (_, name), mean in means.items()]
    lines.append(f"| mean after the first | | | {' | '.join(cells)} |")
    lines.append(f"| share of scratch | | | {' | '.join(shares)} |")
    return "\n".join(lines)


def _mean(results: Sequence[NightResult], way: str, name: str) -> float:
    """The mean of a figure over the nights of a way after the first, which is the same in all ways."""
    return fmean([getattr(result, name) for result in results if result.way == way][1:])


def draw(results: Sequence[NightResult], path: Path) -> None:
    """Draw the hit rates and the seconds of training by night as an SVG or PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    figures = {"HR@10, published": "hit_rate", "HR@10, MoL alone": "mol_hit_rate", "training, s": "seconds"}
    axes = figure.subplots(len(figures), sharex=True)
    for way in WAYS:
        nights = [result for result in results if result.way == way]
        for each, (label, name) in zip(axes, figures.items(), strict=True):
            days = [date.fromisoformat(night.ds) for night in nights]
            each.plot(days, [getattr(night, name) for night in nights], "o-", label=way)
            each.set_ylabel(label)
            each.grid(visible=True, alpha=0.3)
    axes[0].legend()
    axes[-1].tick_params("x", rotation=30)
    figure.savefig(path)
