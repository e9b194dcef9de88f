"""Training on Ray Train: each worker is one rank, and the ranks sum their gradients.

All models of a night are trained in one run of Ray Train, whose workers take seconds to start. When a worker dies, Ray
Train restarts all workers from the last saved state. When the job dies, its next run finds the state by the name of the
Ray Train run, which is the id of the model that serves.
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.actor import ActorHandle
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

from pipeline.distributed.cluster import ActorNeed, preflight
from pipeline.distributed.errors import ray_errors_translated
from pipeline.distributed.messages import Messages, messages_logged
from pipeline.io.checkpoint import save_state
from pipeline.io.night import Night
from pipeline.model.ranks import Ranks
from pipeline.model.training import TrainingState
from pipeline.settings import Settings
from pipeline.stages.devices import device_for
from pipeline.stages.train import is_trained, keep_best, models_of, train_rank, training_memory
from pipeline.stages.training_states import STATES_KEPT

START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
# Seconds between two looks of Ray Train at its workers (by default 2). A worker that has a report waits until the one
# before it has been seen.
LOOK_INTERVAL = "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"
SECONDS_BETWEEN_LOOKS = "0.2"
MODEL_ID = "model_id"  # a file beside a state: whose it is
MAX_FAILURES = 10  # of workers or their nodes; the training resumes from its last state each time, then fails
MAX_LATE_STARTS = 1  # times that not all workers could start within cluster.wait_minutes


def train(night: Night, settings: Settings) -> None:
    """Train those models of the night that do not exist on the cluster, and leave each as its Checkpoint artifact.

    Raises InputError or InfrastructureError when the workers do not fit, our own error as a worker raised it, and
    InfrastructureError when workers died more than MAX_FAILURES times.
    """
    preflight([_workers(night, settings)], settings.cluster.wait_minutes)
    with messages_logged() as messages, ray_errors_translated():
        _run(night, settings, messages)
    filesystem, path = night.storage.arrow_path(f"training/{night.checkpoint.id}")
    filesystem.delete_dir(path)


def _workers(night: Night, settings: Settings) -> ActorNeed:
    cpus, gpus = float(settings.train.threads_per_worker), 1.0 if settings.train.use_gpu else 0.0
    return ActorNeed("training worker", settings.train.num_workers, cpus, gpus, training_memory(night, settings))


class _Trainer(TorchTrainer):
    def _register_sigint_handler(self, controller: ActorHandle[Any]) -> None:
        """Leave SIGINT alone. Ray Train's own handler stays when the training has ended, waits for three interrupts and
        then ends the process with 0: a job that its deadline interrupts would look finished."""

    def _create_default_callbacks(self) -> list[Any]:
        """Leave out the cleaner, which waits for Ray's dashboard: without one each training would end 12 s later.

        It frees the workers' places when Ray Train's controller dies and the job lives on. Ours ends then.
        """
        callbacks = super()._create_default_callbacks()  # type: ignore[misc]  # mypy sees another TorchTrainer
        return [callback for callback in callbacks if not isinstance(callback, PlacementGroupCleanerCallback)]


def _run(night: Night, settings: Settings, messages: ActorHandle[Messages]) -> None:
    # By default Ray Train gives up on a group of workers that has not started after a minute, and tries again for ever.
    os.environ[START_TIMEOUT] = str(60 * max(1.0, settings.cluster.wait_minutes))
    os.environ[LOOK_INTERVAL] = SECONDS_BETWEEN_LOOKS
    filesystem, path = night.storage.arrow_path("training")
    trainer = _Trainer(
        _train_worker,
        train_loop_config={"night": night, "settings": settings, "messages": messages},
        torch_config=TorchConfig(backend="nccl" if settings.train.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=settings.train.num_workers,
            use_gpu=settings.train.use_gpu,
            resources_per_worker=_workers(night, settings).resources,
        ),
        run_config=RunConfig(
            name=night.checkpoint.id,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(MAX_FAILURES, controller_failure_limit=MAX_LATE_STARTS),  # type: ignore[call-arg]
            checkpoint_config=CheckpointConfig(num_to_keep=STATES_KEPT),
        ),
    )
    trainer.fit()


def _train_worker(config: dict[str, Any]) -> None:
    """Train as the rank of this worker, one model after the other, from the last saved state if there is one."""
    night: Night = config["night"]
    settings: Settings = config["settings"]
    context = ray.train.get_context()
    ranks = Ranks(context.get_world_rank(), context.get_world_size())
    device = device_for(1.0 if settings.train.use_gpu else 0.0)
    if settings.train.use_gpu:
        device = ray.train.torch.get_device()  # of this worker

    def say(line: str) -> None:
        if ranks.rank == 0:
            config["messages"].say.remote(line)

    models = models_of(night)
    is_missing = ranks.sum_(torch.tensor([not is_trained(each) for each in models], device=device, dtype=torch.int64))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)  # holds the newest state, and the id of its model
        if (saved := ray.train.get_checkpoint()) is not None:
            saved.to_directory(folder)
        for each, missing in zip(models, is_missing.tolist(), strict=True):
            if missing:
                _train_one(each, settings, ranks, device, folder, say)
                ranks.sum_(torch.zeros(1, device=device))  # wait: the next model may start from this one


def _train_one(
    night: Night, settings: Settings, ranks: Ranks, device: torch.device, folder: Path, say: Callable[[str], None]
) -> None:
    """Train one model, from the state in `folder` if it is of this model, and keep it when it is done."""
    owner = folder / MODEL_ID
    is_begun = owner.exists() and owner.read_text() == night.checkpoint.id

    def report(state: TrainingState, popularity: float) -> None:
        metrics = {"model": night.checkpoint.id, "number": state.number}
        if ranks.rank != 0:
            ray.train.report(metrics)
            return
        save_state(folder, state)
        owner.write_text(night.checkpoint.id)
        ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))

    popularity = train_rank(night, settings, ranks, device, folder if is_begun else None, report, say)
    if ranks.rank == 0:
        keep_best(night, settings, folder, popularity)
