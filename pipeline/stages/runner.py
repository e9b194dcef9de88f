"""The runner of a night: tasks, chains of stages and a training, in this process or on a cluster.

`pipeline/stages/local.py` is the definition; `pipeline/distributed/runner.py` gives the same results on many machines.
"""

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
    """Turns a unit's payload into the payload for the next stage; loads its model or shard in the constructor."""

    def __call__(self, unit: int, payload: Payload) -> Payload: ...


class Actors(Enum):
    """The number of processes that run one stage at the same time."""

    ONE = "one"
    REPLICAS = "replicas"  # cluster.replicas
    AS_MANY_AS_FIT = "as many as fit"  # on the cluster, at most one per unit


@dataclass(frozen=True)
class Stage:
    """One link of a chain: a class and its constructor's arguments by name, which are small (URIs, settings)."""

    function: Callable[..., StageFunction]
    arguments: Mapping[str, Any]
    actors: Actors = Actors.REPLICAS
    gpus: float = 0.0  # per actor
    memory: int = 0  # bytes that an actor holds, at most, beside PROCESS_BYTES; 0: little
    searches: bool = False  # a node must have search.backend to run it

    @property
    def name(self) -> str:
        return self.function.__name__


class InTurn:
    """Runs several stages in one process, one after the other."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self._functions = [stage.function(**stage.arguments) for stage in stages]

    def __call__(self, unit: int, payload: Payload) -> Payload:
        result = payload
        for function in self._functions:
            result = function(unit, result)
        return result


def in_turn(stages: Sequence[Stage], actors: Actors) -> Stage:
    """Make one stage of several that ask for the same GPUs: each of its processes runs all of them."""
    name = "+".join(dict.fromkeys(stage.name for stage in stages))
    return Stage(
        type(name, (InTurn,), {"__module__": __name__}),
        {"stages": tuple(stages)},
        actors,
        gpus=stages[0].gpus,
        memory=sum(stage.memory for stage in stages),
        searches=any(stage.searches for stage in stages),
    )


class Runner(Protocol):
    """Runs tasks, chains of stages and a training. The tests of `tests/stages/test_runner.py` hold for every runner."""

    def run_tasks(
        self, label: str, function: Callable[..., T], arguments: Sequence[tuple[Any, ...]]
    ) -> Generator[T, None, None]:
        """Yield `function(*arguments[i])` for every i, in any order; closing the generator cancels the tasks left.

        A task may run twice. Raises our own error as the task raised it.
        """

    def run_chain(self, label: str, units: Sequence[int], stages: Sequence[Stage]) -> None:
        """Send every unit through all stages in order; the first stage gets an empty payload.

        A unit may pass a stage twice. Raises our own error as the stage raised it, InputError or InfrastructureError
        when the stages do not fit on the cluster, and InfrastructureError when a unit was lost or came out twice.
        """

    def num_fitting(self, stages: Sequence[Stage], beside: Sequence[Stage]) -> int:
        """The number of `stages`, from the first one on, that fit at once beside those of `beside`; at least 1.

        Raises InputError or InfrastructureError, which say what is missing, when not even the first one fits.
        """

    def train(self, night: Night, settings: Settings) -> None:
        """Train those models of the night that do not exist, one after the other, and leave each as an artifact.

        Raises InputError when the settings ask for workers that this runner does not have, or nobody has two events.
        """
