"""A night in this process, without Ray: what each stage is given and in which order. It is the definition; Ray executes
the same stages on more machines and leaves the same table, to the bit."""

import logging
from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar

import torch

from pipeline.io.night import Night
from pipeline.settings import Settings
from pipeline.stages.progress import Progress
from pipeline.stages.runner import Payload, Stage
from pipeline.stages.train import train_locally

T = TypeVar("T")

log = logging.getLogger("nightrails")


class LocalRunner:
    """A `Runner` that does one thing after the other. All shards of a search are held in memory at once."""

    def __init__(self, settings: Settings) -> None:
        self._threads = settings.cluster.threads_per_actor

    def run_tasks(
        self, label: str, function: Callable[..., T], arguments: Sequence[tuple[Any, ...]]
    ) -> Generator[T, None, None]:
        """As Runner.run_tasks, in order."""
        progress = Progress(label, len(arguments))
        for values in arguments:
            yield function(*values)
            progress.report(1)

    def run_chain(self, label: str, units: Sequence[int], stages: Sequence[Stage]) -> None:
        """As Runner.run_chain, unit by unit."""
        torch.set_num_threads(self._threads)
        functions = [stage.function(**stage.arguments) for stage in stages]
        progress = Progress(label, len(units))
        for unit in units:
            payload: Payload = b""
            for function in functions:
                payload = function(unit, payload)
            progress.report(1)
        progress.finish()

    def shards_per_wave(self, num_shards: int) -> int:
        """As Runner.shards_per_wave: all of them."""
        return max(1, num_shards)

    def train(self, night: Night, settings: Settings) -> None:
        """As Runner.train, with one rank."""
        train_locally(night, settings, lambda line: log.info("   %s", line))
