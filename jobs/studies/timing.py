"""Comparing contenders on a machine that others use too: medians of interleaved runs, and the rows of a table."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, TypedDict

NUM_ROUNDS = 5
NUM_WARM_UP = 1


class Row(TypedDict):
    """One line of a benchmark's table: what was measured, what it must and would proudly be, whether it holds."""

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

    A disturbance of seconds then falls on all contenders alike. What a contender returns is dropped before the next
    begins. CPU time counts this process and its threads, not child processes.
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


def median_ratio(slow: Timing, fast: Timing, clock: Literal["wall", "cpu"] = "wall") -> float:
    """How many times faster: the median over rounds of the ratio within the round."""
    return statistics.median(
        slow_time / fast_time for slow_time, fast_time in zip(getattr(slow, clock), getattr(fast, clock), strict=True)
    )


def row(
    figure: str, value: float, must: float, proud: float, better: Literal["higher", "lower"], unit: str = ""
) -> Row:
    """A table row; `holds` says whether the value meets `must`. A value that is not a number never holds."""
    is_good = value >= must if better == "higher" else value <= must
    sign = "≥" if better == "higher" else "≤"
    return Row(
        figure=figure, value=value, must=_limit(sign, must, unit), proud=_limit(sign, proud, unit), holds=is_good
    )


def _limit(sign: str, value: float, unit: str) -> str:
    return f"{sign} {value:g} {unit}".rstrip()
