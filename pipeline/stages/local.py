"""The runner without a cluster: each task and each unit in turn, in this process. It defines the result of a night."""

import logging
from collections.abc import Callable, Generator, Sequence
from typing import Any, TypeVar

import torch

from pipeline.io.night import Night
from pipeline.settings import Settings
from pipeline.stages.local_training import train_locally
from pipeline.stages.progress import Progress
from pipeline.stages.runner import InTurn, Stage
from pipeline.stages.train import is_trained, models_of

T = TypeVar("T")

log = logging.getLogger("nightrails")


class LocalRunner:
    """A `Runner` for small nights: holds all shards of a search in memory at once."""

    def __init__(self, settings: Settings) -> None:
        self._threads = settings.cluster.threads_per_actor

    def run_tasks(
        self, label: str, function: Callable[..., T], arguments: Sequence[tuple[Any, ...]]
    ) -> Generator[T, None, None]:
        """Run the tasks in the given order."""
        progress = Progress(label, len(arguments))
        for values in arguments:
            yield function(*values)
            progress.report(1)

    def run_chain(self, label: str, units: Sequence[int], stages: Sequence[Stage]) -> None:
        """Send one unit after the other through all stages."""
        torch.set_num_threads(self._threads)
        chain = InTurn(stages)
        progress = Progress(label, len(units))
        for unit in units:
            chain(unit, b"")
            progress.report(1)
        progress.finish()

    def num_fitting(self, stages: Sequence[Stage], beside: Sequence[Stage]) -> int:
        """All of them: memory is not checked."""
        return len(stages)

    def train(self, night: Night, settings: Settings) -> None:
        """Train as the only rank."""
        for each in models_of(night):
            if not is_trained(each):
                train_locally(each, settings, lambda line: log.info("   %s", line))
