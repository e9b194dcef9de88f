"""Compare contenders on a machine that others use too: medians of interleaved runs, and the rows of a table."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

NUM_ROUNDS = 5
NUM_WARM_UP = 1


@dataclass(frozen=True)
class Row:
    """One line of a benchmark's table: a figure, its limit, a limit to be proud of, and whether the first holds."""

    figure: str
    value: float
    must: str
    proud: str
    holds: bool


@dataclass(frozen=True)
class Timing:
    """Seconds of each round of one contender: on the wall clock, and of the process on all its cores."""

    wall: tuple[float, ...]
    cpu: tuple[float, ...]

    @property
    def median_wall(self) -> float:
        return statistics.median(self.wall)

    @property
    def median_cpu(self) -> float:
        return statistics.median(self.cpu)


def time_interleaved(
    contenders: Mapping[str, Callable[[], object]], num_rounds: int = NUM_ROUNDS, num_warm_up: int = NUM_WARM_UP
) -> dict[str, Timing]:
    """Run A, B, C, A, B, C, … and time each call; the first `num_warm_up` rounds do not count.

    A disturbance of seconds then falls on all contenders alike. A contender's result is dropped before the next one
    begins. CPU time counts this process and its threads, not child processes. Raises ValueError without a round.
    """
    if num_rounds < 1:
        raise ValueError(f"num_rounds ({num_rounds}) must be at least 1")
    wall: dict[str, list[float]] = {name: [] for name in contenders}
    cpu: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(num_warm_up + num_rounds):
        for name, contender in contenders.items():
            wall_from, cpu_from = time.perf_counter(), time.process_time()
            contender()
            cpu_to, wall_to = time.process_time(), time.perf_counter()
            if number >= num_warm_up:
                wall[name].append(wall_to - wall_from)
                cpu[name].append(cpu_to - cpu_from)
    return {name: Timing(tuple(wall[name]), tuple(cpu[name])) for name in contenders}


def median_seconds(call: Callable[[], object], num_rounds: int = NUM_ROUNDS) -> float:
    """Median wall time of a call, after a call that does not count."""
    return time_interleaved({"call": call}, num_rounds)["call"].median_wall


def median_ratio(slow: Timing, fast: Timing, clock: Literal["wall", "cpu"] = "wall") -> float:
    """How many times faster `fast` is: the median over rounds of the ratio within the round."""
    pairs = zip(slow.wall, fast.wall, strict=True) if clock == "wall" else zip(slow.cpu, fast.cpu, strict=True)
    return statistics.median(slow_seconds / fast_seconds for slow_seconds, fast_seconds in pairs)


def row(
    figure: str, value: float, must: float, proud: float, better: Literal["higher", "lower"], unit: str = ""
) -> Row:
    """Make a row; it holds when the value keeps the limit `must`, which NaN never does."""
    is_good = value >= must if better == "higher" else value <= must
    sign = "≥" if better == "higher" else "≤"
    return Row(figure, value, _limit(sign, must, unit), _limit(sign, proud, unit), is_good)


def _limit(sign: str, value: float, unit: str) -> str:
    return f"{sign} {value:g} {unit}".rstrip()
