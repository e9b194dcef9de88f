"""A chain of stages on Ray Data: one row per unit of work, one pool of actors per stage.

Ray restarts an actor that dies, and computes again what was lost with a node. This file adds a limit to the attempts
at one unit and a check that no unit is lost. A stage never waits for another unit: with a lost node Ray begins earlier
units again, and they would queue behind the one that waits. Ray Data limits the payloads between two stages.
"""

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

from pipeline.distributed.cluster import on_this_node
from pipeline.distributed.errors import ray_errors_translated
from pipeline.distributed.ledger import Ledger
from pipeline.errors import InfrastructureError, NightrailsError
from pipeline.stages.devices import PROCESS_BYTES
from pipeline.stages.progress import Progress
from pipeline.stages.runner import Payload, Stage, StageFunction

# Ray 2.60 restarts a dying actor forever: its max_restarts goes through arguments that 2.64 removes. After so many
# attempts at one unit we blame the unit and fail, and after as many at loading we blame the stage.
MAX_ATTEMPTS = 4
LOADING = -1  # the work of an actor before its first unit
OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)
LESS_MEMORY = "raise output.num_buckets or corpus.num_shards"
LESS_TO_LOAD = "raise corpus.num_shards, or let fewer actors share a machine or GPU"
# Storage and network errors: attempts in one process, with waits of about 1, 2 and 4 seconds between them.
MAX_TRIES = 4
FIRST_WAIT_SECONDS = 1.0

ROW = pa.schema([pa.field("unit", pa.int32()), pa.field("payload", pa.large_binary())])
Result = TypeVar("Result")

log = logging.getLogger("nightrails")


@dataclass(frozen=True)
class Pool:
    """The actors that run one stage."""

    stage: Stage
    num_actors: int
    num_cpus: float  # per actor


def run_chain(label: str, units: Sequence[int], pools: Sequence[Pool], threads: int) -> None:
    """Send every unit through all stages; each actor computes with `threads` threads.

    Raises our own error as the stage raised it, InfrastructureError when Ray gave up or a unit was lost or came twice.
    """
    ledger_name = f"ledger-{uuid.uuid4().hex}"
    ledger = ray.remote(Ledger).options(num_cpus=0, name=ledger_name, scheduling_strategy=on_this_node())
    ledger_actor: Any = ledger.remote()
    # Not from_arrow, which would start a task for each block to describe it.
    dataset: Dataset = ray.data.from_items(
        [{"unit": unit, "payload": b""} for unit in units], override_num_blocks=len(units)
    )
    for position, pool in enumerate(pools):
        arguments = {"pool": pool, "position": position, "ledger": ledger_name, "threads": threads}
        dataset = _add_stage(dataset, pool, arguments)
    finished: Counter[int] = Counter()
    progress = Progress(label, len(units))
    try:
        with ray_errors_translated():
            for row in dataset.iter_rows():
                finished[row["unit"]] += 1
                progress.report(1)
    finally:
        ray.kill(ledger_actor)
    check_accounted(label, units, finished)
    progress.finish()


def check_accounted(label: str, units: Sequence[int], finished: Mapping[int, int]) -> None:
    """Raise InfrastructureError unless each unit finished once; `finished` counts how often a unit did."""
    lost = sorted(set(units) - set(finished))
    doubled = sorted(unit for unit, times in finished.items() if times > 1)
    unknown = sorted(set(finished) - set(units))
    if lost or doubled or unknown:
        raise InfrastructureError(
            f"{label}: units lost {lost}, doubled {doubled}, unknown {unknown}; run again to resume"
        )


def with_backoff(call: Callable[[], Result], wait_seconds: float = FIRST_WAIT_SECONDS) -> Result:
    """Return the call's result; after a storage or network error wait and try again, MAX_TRIES times in all.

    Raises the error of the last try. Other errors are raised at once.
    """
    for attempt in range(MAX_TRIES - 1):
        try:
            return call()
        except (OSError, InfrastructureError) as error:
            wait = wait_seconds * 2**attempt * random.uniform(0.5, 1.5)
            log.warning("%s: %s; trying again in %.1f s", type(error).__name__, error, wait)
            time.sleep(wait)
    return call()


class StageActor:
    """Runs one stage for Ray Data: turns a row (one unit) into the row for the next stage."""

    def __init__(self, pool: Pool, position: int, ledger: str, threads: int) -> None:
        torch.set_num_threads(threads)  # Ray sets OMP_NUM_THREADS from num_cpus
        self._name, self._position = pool.stage.name, position
        self._ledger: Any = ray.get_actor(ledger)
        # Raised for the first unit: raised here, it would end the process, and Ray would start another.
        self._error: NightrailsError | None = None
        try:
            self._function = self._load(pool)
        except NightrailsError as error:
            self._error = error

    def _load(self, pool: Pool) -> StageFunction:
        num_dead = self._begin(LOADING) - pool.num_actors  # at least: all actors may be loading at once
        if num_dead >= MAX_ATTEMPTS:
            raise InfrastructureError(
                f"{self._name} has ended its process {num_dead} times while it loaded (out of memory?); {LESS_TO_LOAD}"
            )
        try:
            function = with_backoff(lambda: pool.stage.function(**pool.stage.arguments))
        except OUT_OF_MEMORY as error:
            raise InfrastructureError(f"{self._name}, while it loads: {error!r}; {LESS_TO_LOAD}") from None
        self._end(LOADING)
        return function

    def _begin(self, work: int) -> int:
        return int(ray.get(self._ledger.begin.remote(self._position, work)))

    def _end(self, work: int) -> None:
        self._ledger.end.remote(self._position, work)

    def __call__(self, batch: pa.Table) -> pa.Table:
        (unit,) = batch["unit"].to_pylist()
        payload = batch["payload"].chunk(0)[0].as_buffer()
        if self._error is not None:
            raise self._error
        if self._begin(unit) > MAX_ATTEMPTS:
            raise InfrastructureError(
                f"unit {unit} has ended the process of {self._name} {MAX_ATTEMPTS} times (out of memory?); "
                + LESS_MEMORY
            )
        try:
            result = with_backoff(lambda: self._function(unit, payload))
        except OUT_OF_MEMORY as error:
            raise InfrastructureError(f"{self._name}, unit {unit}: {error!r}; {LESS_MEMORY}") from None
        except torch.AcceleratorError as error:
            log.error("%s, unit %d: %s; ending this process, Ray starts another", self._name, unit, error)
            os._exit(1)  # after a fault on the GPU every later call in this process fails too
        self._end(unit)
        return row(unit, result)


def row(unit: int, payload: Payload) -> pa.Table:
    """The dataset's row of a unit, without a copy of the payload."""
    data = pa.py_buffer(payload)
    offsets = pa.py_buffer(np.array([0, data.size], dtype=np.int64))
    column = pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, [None, offsets, data])
    return pa.Table.from_arrays([pa.array([unit], pa.int32()), column], schema=ROW)


def _add_stage(dataset: Dataset, pool: Pool, arguments: dict[str, Any]) -> Dataset:
    """Add a stage whose actors are `StageActor(**arguments)`."""
    # A subclass with the stage's name, which logs, `ray status` and process titles show.
    actor = type(pool.stage.name, (StageActor,), {"__module__": __name__})
    return dataset.map_batches(
        actor,
        fn_constructor_kwargs=arguments,
        batch_size=1,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=pool.num_actors),
        num_cpus=pool.num_cpus,
        num_gpus=pool.stage.gpus or None,
        memory=PROCESS_BYTES + pool.stage.memory,
        udf_modifying_row_count=False,
    )
