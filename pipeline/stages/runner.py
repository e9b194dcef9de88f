"""What the night asks of whoever executes it. `local.LocalRunner` does it in this process and is the definition; Ray
does the same on a cluster (`pipeline/distributed/runner.py`)."""

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Protocol, TypeAlias, TypeVar

import pyarrow as pa

from pipeline.io.night import Night
from pipeline.settings import Settings

Payload: TypeAlias = bytes | pa.Buffer
T = TypeVar("T")


class StageFunction(Protocol):
    """One unit's payload in, the next one out. It loads what it needs in its constructor, and knows nothing of Ray."""

    def __call__(self, unit: int, payload: Payload) -> Payload: ...


class Actors(Enum):
    """How many processes run a stage at once."""

    ONE = "one"
    REPLICAS = "replicas"  # cluster.replicas
    MANY = "many"  # as many as the cluster holds and the units need


@dataclass(frozen=True)
class Stage:
    """One link of a chain: a class, and the values to construct it from. They are small: addresses and settings."""

    function: Callable[..., StageFunction]
    arguments: Mapping[str, Any]
    actors: Actors = Actors.REPLICAS
    needs_gpu: bool = False  # cluster.gpus_per_actor, where it is set

    @property
    def name(self) -> str:
        return self.function.__name__


class Runner(Protocol):
    """Executes tasks, chains of stages and a training."""

    def run_tasks(
        self, label: str, function: Callable[..., T], arguments: Sequence[tuple[Any, ...]]
    ) -> Generator[T, None, None]:
        """Yield the results of `function(*arguments[i])` in any order. Tasks are independent and can be repeated."""

    def run_chain(self, label: str, units: Sequence[int], stages: Sequence[Stage]) -> None:
        """Send every unit through all stages. Raises our own error when a stage did, InfrastructureError when a unit
        was lost or doubled."""

    def shards_per_wave(self, num_shards: int) -> int:
        """How many shard searchers can be held at once, beside what else a search needs; at least one.

        Raises InputError or InfrastructureError, which name what is missing, when not even one can be held.
        """

    def train(self, night: Night, settings: Settings) -> None:
        """Train tonight's model and leave it as the Checkpoint artifact."""
