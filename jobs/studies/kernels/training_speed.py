"""Speed of a training step on one thread: the native pair network beside PyTorch's, and what else takes time.

For 32 and 64 pairs of components a step of some 2,500 positions is timed with every backend, in turn: positions per
second, the part of the pair network in it, and the share of the processor's multiply-adds that the network's products
reach (a product counts three times: forward, and backward to both sides). Beside them stands the native step without
the dot-product head, against the same loss as one writes it first, with nothing shared or fused (straightforward.py).
The histories have 2 to 200 events, 40 in the mean. Then a step is timed for tables of several numbers of items, and the
average of the weights, which reads the whole table and is taken every few steps.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from jobs.studies.kernels.straightforward import StraightforwardStep
from jobs.studies.machine import processor
from jobs.studies.search.stage1 import bfloat16_peak
from jobs.studies.timing import Timing, median_ratio, time_interleaved
from pipeline.data.batches import SequenceBatch, cut_windows, epoch_batches
from pipeline.data.lists import Lists
from pipeline.model import step
from pipeline.model.backends import training_backend
from pipeline.model.gradients import average_gradients
from pipeline.model.model import RetrievalModel
from pipeline.model.negatives import Negatives
from pipeline.model.ranks import Ranks
from pipeline.model.step import accumulate_gradients
from pipeline.model.training import STEPS_PER_AVERAGE, average_weights, new_state
from pipeline.settings import ModelSettings, MolSettings, TrainSettings

SHAPES = ((8, 4, 64), (8, 8, 32))  # query components, item components, width
NUM_ITEMS = 46_000
NUM_USERS, MEAN_EVENTS, MAX_EVENTS = 64, 40, 200  # of the step's histories
FEW_USERS = 8  # of a straightforward step: with more it takes gigabytes, and most of its time goes into getting them
BACKENDS = {
    "native": TrainSettings(backend="native"),
    "native, no head": TrainSettings(backend="native", head_weight=0.0),
    "torch": TrainSettings(backend="torch"),
    "torch bfloat16": TrainSettings(backend="torch", precision="bfloat16"),
}


@dataclass
class StepClock:
    """Makes training steps of one model and adds up the CPU seconds of their parts."""

    settings: TrainSettings
    shape: tuple[int, int, int]
    num_items: int
    pairs: list[float] = field(default_factory=list)  # the pair network
    optimiser: list[float] = field(default_factory=list)  # the mean of the gradients, and AdamW

    def __post_init__(self) -> None:
        q, x, d = self.shape
        mol = MolSettings(num_query_components=q, num_item_components=x, component_dim=d)
        torch.manual_seed(0)
        self._state = new_state(
            RetrievalModel(ModelSettings(mol=mol, max_length=MAX_EVENTS), self.num_items), self.settings
        )
        self._batch = _random_batch(self.num_items, NUM_USERS)
        self._sampler = Negatives.of(torch.ones(self.num_items), self.settings)
        self.backend = training_backend(self._state.model.mol, self.settings)

    @property
    def num_positions(self) -> int:
        return int((self._batch.targets_BL >= 0).sum())

    def __call__(self) -> None:
        model = self._state.model.train()
        self._state.optimiser.zero_grad()
        with _seconds_of("train_pairs", self.pairs), _seconds_of("_in_tiles", self.pairs):
            sums = accumulate_gradients(model, self._batch, self._sampler, self.settings)
        begun = time.process_time()
        average_gradients(model, sums.loss, sums.weight, sums.num_targets, Ranks())
        self._state.optimiser.step(self.settings.learning_rate)
        self._state.step += 1
        self.optimiser.append(time.process_time() - begun)

    def straightforward(self) -> StraightforwardStep:
        """The same loss as one writes it first, for a few users, with a model of its own."""
        model = RetrievalModel(self._state.model.settings, self.num_items)
        return StraightforwardStep(model, _random_batch(self.num_items, FEW_USERS), self.settings)

    def average(self) -> None:
        """Take the weights into their average."""
        average_weights(self._state, self.settings.average_decay)


def _random_batch(num_items: int, num_users: int) -> SequenceBatch:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.geometric(1 / MEAN_EVENTS, num_users), 2, MAX_EVENTS)
    histories = Lists.of([rng.integers(0, num_items, length) for length in lengths])
    windows = cut_windows(histories, np.arange(num_users), MAX_EVENTS)
    return next(iter(epoch_batches(windows, 1, 0, 1, 0)))


@contextmanager
def _seconds_of(name: str, seconds: list[float]) -> Iterator[None]:
    """Time the calls of a function of the step."""
    timed: Callable[..., Any] = getattr(step, name)

    def call(*arguments: Any) -> Any:
        begun = time.process_time()
        result = timed(*arguments)
        seconds.append(time.process_time() - begun)
        return result

    with patch.object(step, name, call):
        yield


def study_backends(shape: tuple[int, int, int], num_rounds: int, peak: float) -> None:
    """Print a line per backend: the whole step and the pair network in it, and how many times faster native is; then
    the straightforward step."""
    clocks = {name: StepClock(settings, shape, NUM_ITEMS) for name, settings in BACKENDS.items()}
    first = clocks["native, no head"]
    plain = first.straightforward()
    steps = time_interleaved(clocks | {"straightforward": plain}, num_rounds)
    networks = {name: Timing((), tuple(clock.pairs[-num_rounds:])) for name, clock in clocks.items()}
    q, x, d = shape
    flop = 6 * q * x * (d + 2 * MolSettings().gate_hidden_dim) * TrainSettings().num_negatives  # of a position
    print(f"{q} x {x} x {d}, positions per second in the pair network and in the whole step:")
    for name, clock in clocks.items():
        of_network, of_step = (clock.num_positions / each[name].median_cpu for each in (networks, steps))
        print(
            f"  {name:15} {of_network:8,.0f} (native: {median_ratio(networks[name], networks['native'], 'cpu'):.1f} x) "
            f"{of_step:8,.0f} (native: {median_ratio(steps[name], steps['native'], 'cpu'):.1f} x); "
            f"{flop * of_network / 1e9:.0f} GFLOP/s, {flop * of_network / peak:.0%} of the bfloat16 peak"
        )

    of_native = first.num_positions / steps["native, no head"].median_cpu
    of_plain = plain.num_positions / steps["straightforward"].median_cpu
    print(f"  straightforward: {of_plain:,.0f} in the whole step (native, no head: {of_native / of_plain:.1f} x)")


def study_tables(num_items: list[int], num_rounds: int) -> None:
    """Print where the time of a native step goes, for several sizes of the item table."""
    for number in num_items:
        clock = StepClock(BACKENDS["native"], SHAPES[0], number)
        timings = time_interleaved({"step": clock, "average": clock.average}, num_rounds)
        whole, average = (timings[name].median_cpu for name in ("step", "average"))
        pairs, optimiser = _median(clock.pairs, num_rounds), _median(clock.optimiser, num_rounds)
        parts = {"pair network": pairs, "gradients' mean and AdamW": optimiser, "the rest": whole - pairs - optimiser}
        told = ", ".join(f"{name} {1e3 * seconds:.0f} ms ({seconds / whole:.0%})" for name, seconds in parts.items())
        print(
            f"{number:,} items: a step takes {1e3 * whole:.0f} ms: {told}; "
            f"every {STEPS_PER_AVERAGE} steps the average of the weights takes {1e3 * average:.0f} ms more"
        )


def _median(seconds: list[float], num_rounds: int) -> float:
    return float(np.median(seconds[-num_rounds:]))


def main(num_items: list[int], rounds: int) -> None:
    torch.set_num_threads(1)
    clock = StepClock(BACKENDS["native"], SHAPES[0], NUM_ITEMS)
    instruction_set = clock.backend.name.removeprefix("native ")
    peak = bfloat16_peak(instruction_set)
    print(f"{processor()}, {clock.backend.name}, peak of a core {peak / 1e9:.0f} GFLOP/s, medians of {rounds} rounds")
    for shape in SHAPES:
        study_backends(shape, rounds, peak)
    study_tables(num_items, rounds)
