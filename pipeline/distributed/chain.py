"""A chain of stages over units of work, on Ray Data: one row per unit, actors that come back from the dead alone.

A stage knows nothing of Ray (`pipeline/stages/runner.py`). Here is what Ray adds: pools of actors, retries with an end,
and accounting.
"""

import asyncio
import logging
import os
import random
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import ray
import torch
from ray.data import ActorPoolStrategy, Dataset
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.distributed.cluster import ActorNeed
from pipeline.distributed.errors import ray_errors_translated
from pipeline.errors import InfrastructureError, NightrailsError
from pipeline.stages.progress import Progress
from pipeline.stages.runner import Payload, Stage, StageFunction

# Ray restarts an actor that dies without end, and 2.60 has no supported way to say otherwise (max_restarts passes
# through arguments that leave with 2.64). A unit that kills its actor so often is what kills it.
MAX_ATTEMPTS = 4
LESS_MEMORY = "raise output.num_buckets or corpus.num_shards"
# Units under way for each actor of a chain: one that it works on and one that waits for it.
UNITS_PER_ACTOR = 2
# Storage and network: attempts in one process, after waits of about 1, 2 and 4 seconds.
MAX_TRIES = 4
FIRST_WAIT_SECONDS = 1.0

ROW = pa.schema([pa.field("unit", pa.int32()), pa.field("payload", pa.large_binary())])
Result = TypeVar("Result")

log = logging.getLogger("nightrails")


@dataclass(frozen=True)
class Pool:
    """The actors that run one stage, and what each of them is given."""

    stage: Stage
    num_actors: int
    num_cpus: float
    num_gpus: float = 0.0

    @property
    def need(self) -> ActorNeed:
        return ActorNeed(self.stage.name, self.num_actors, self.num_cpus, self.num_gpus)


def run_chain(label: str, units: Sequence[int], pools: Sequence[Pool], threads: int) -> None:
    """Send every unit through all stages, each in its pool of actors.

    Raises our own error when a stage did, InfrastructureError when Ray gave up or a unit was lost or doubled.
    """
    window = UNITS_PER_ACTOR * sum(pool.num_actors for pool in pools)
    ledger_name = f"ledger-{uuid.uuid4().hex}"
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    ledger = ray.remote(Ledger).options(num_cpus=0, name=ledger_name, scheduling_strategy=here)
    ledger_actor: Any = ledger.remote(list(units), window)
    # from_arrow would start a task per block, to describe it.
    dataset: Dataset = ray.data.from_items(
        [{"unit": unit, "payload": b""} for unit in units], override_num_blocks=len(units)
    )
    for position, pool in enumerate(pools):
        dataset = _add_stage(dataset, pool, position, position == len(pools) - 1, ledger_name, threads)
    seen: Counter[int] = Counter()
    progress = Progress(label, len(units))
    try:
        with ray_errors_translated():
            for row in dataset.iter_rows():
                seen[row["unit"]] += 1
                progress.report(1)
    finally:
        ray.kill(ledger_actor)
    check_accounted(label, units, seen)
    progress.finish()


def check_accounted(label: str, units: Sequence[int], seen: Mapping[int, int]) -> None:
    """Every unit that went in came out, once."""
    lost = sorted(set(units) - set(seen))
    doubled = sorted(unit for unit, times in seen.items() if times > 1)
    strange = sorted(set(seen) - set(units))
    if lost or doubled or strange:
        raise InfrastructureError(
            f"{label}: units lost {lost}, doubled {doubled}, unknown {strange}; run again to resume"
        )


def with_backoff(call: Callable[[], Result], wait_seconds: float = FIRST_WAIT_SECONDS) -> Result:
    """The call's result; storage and network errors are tried again, a few times."""
    for attempt in range(MAX_TRIES - 1):
        try:
            return call()
        except (OSError, InfrastructureError) as error:
            wait = wait_seconds * 2**attempt * random.uniform(0.5, 1.5)
            log.warning("%s: %s; again in %.1f s", type(error).__name__, error, wait)
            time.sleep(wait)
    return call()


class Window:
    """Which units may be under way: those up to `size` places after the first unfinished one.

    Ray Data bounds what lies between two stages by a share of its object store only, so that a quick first stage
    would encode all queries of the night ahead of the search. The first unfinished unit may always go on.
    """

    def __init__(self, units: Sequence[int], size: int) -> None:
        self._place = {unit: place for place, unit in enumerate(units)}
        self._size, self._first = size, 0
        self._finished: set[int] = set()

    def admits(self, unit: int) -> bool:
        return self._place[unit] < self._first + self._size

    def finish(self, unit: int) -> None:
        self._finished.add(self._place[unit])
        while self._first in self._finished:
            self._finished.remove(self._first)
            self._first += 1


class Ledger:
    """Lives beside the driver: lets units in, and counts how often each stage has begun each of them."""

    def __init__(self, units: Sequence[int], window: int) -> None:
        self._window, self._changed = Window(units, window), asyncio.Condition()
        self._begun: Counter[tuple[int, int]] = Counter()

    async def begin(self, position: int, unit: int) -> int:
        """Wait for the unit's turn; returns how often its stage has begun it, deaths of actors included."""
        self._begun[position, unit] += 1
        async with self._changed:
            await self._changed.wait_for(lambda: position > 0 or self._window.admits(unit))
        return self._begun[position, unit]

    async def finish(self, unit: int) -> None:
        async with self._changed:
            self._window.finish(unit)
            self._changed.notify_all()


class StageActor:
    """Runs one stage for Ray Data: rows in, rows out, one unit at a time."""

    def __init__(self, stage: Stage, position: int, is_last: bool, ledger: str, threads: int) -> None:
        torch.set_num_threads(threads)  # Ray sets OMP_NUM_THREADS from num_cpus
        self._stage, self._position, self._is_last = stage, position, is_last
        self._ledger: Any = ray.get_actor(ledger)
        try:
            self._function: StageFunction = with_backoff(lambda: stage.function(**stage.arguments))
        except NightrailsError as error:
            # Raised here, it would cost the process, and Ray would try again with a fresh one.
            self._function = _failing(error)

    def __call__(self, batch: pa.Table) -> pa.Table:
        (unit,) = batch["unit"].to_pylist()
        payload = batch["payload"].chunk(0)[0].as_buffer()
        begun = int(ray.get(self._ledger.begin.remote(self._position, unit)))
        if begun > MAX_ATTEMPTS:
            raise InfrastructureError(
                f"unit {unit} has ended the process of {self._stage.name} {MAX_ATTEMPTS} times (out of memory?); "
                + LESS_MEMORY
            )
        try:
            result = with_backoff(lambda: self._function(unit, payload))
        except torch.OutOfMemoryError as error:
            raise InfrastructureError(f"{self._stage.name}, unit {unit}: {error}; {LESS_MEMORY}") from None
        except torch.AcceleratorError as error:
            log.error("%s, unit %d: %s; leaving the process for a fresh one", self._stage.name, unit, error)
            os._exit(1)  # after a device-side fault every later call in this process fails too
        if self._is_last:
            ray.get(self._ledger.finish.remote(unit))
        return row(unit, result)


def _failing(error: NightrailsError) -> StageFunction:
    def fail(unit: int, payload: Payload) -> Payload:
        raise error

    return fail


def row(unit: int, payload: Payload) -> pa.Table:
    """A unit as the dataset carries it; the payload is not copied."""
    data = pa.py_buffer(payload)
    offsets = pa.py_buffer(np.array([0, data.size], dtype=np.int64))
    column = pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, [None, offsets, data])
    return pa.Table.from_arrays([pa.array([unit], pa.int32()), column], schema=ROW)


def _add_stage(dataset: Dataset, pool: Pool, position: int, is_last: bool, ledger: str, threads: int) -> Dataset:
    stage = pool.stage
    # A subclass of its own name per stage, so that logs, `ray status` and process titles tell the stages apart.
    named = type(stage.name, (StageActor,), {"__module__": __name__})
    return dataset.map_batches(
        named,
        fn_constructor_kwargs={
            "stage": stage,
            "position": position,
            "is_last": is_last,
            "ledger": ledger,
            "threads": threads,
        },
        batch_size=1,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=pool.num_actors),
        num_cpus=pool.num_cpus,
        num_gpus=pool.num_gpus or None,
        udf_modifying_row_count=False,
    )
