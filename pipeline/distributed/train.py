"""Training on Ray Train: every worker reads its own user buckets, and all sum their gradients.

The run is named by the checkpoint's id. Ray Train starts the workers again when one dies, and the same name finds the
last checkpoint again when the whole job does.
"""

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray.train
import torch
from ray.actor import ActorHandle
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from pipeline.artifacts import Histories, Manifest, Night
from pipeline.command import cause_of
from pipeline.data.batches import (
    ValidationUsers,
    Windows,
    cut_windows,
    join_validation_users,
    join_windows,
    num_steps,
    sample_users,
    validation_users,
)
from pipeline.distributed.cluster import ActorNeed, connect, preflight
from pipeline.distributed.messages import messages_logged
from pipeline.errors import InfrastructureError, InputError, NightrailsError
from pipeline.io.artifacts import read_manifest
from pipeline.io.checkpoint import load_state, read_best_weights, read_history, save_state, write_checkpoint
from pipeline.io.histories import read_bucket, read_items
from pipeline.io.storage import open_storage
from pipeline.io.storage.base import Storage
from pipeline.io.storage.local import LocalStorage
from pipeline.io.storage.s3 import S3Storage
from pipeline.model.model import RetrievalModel
from pipeline.model.results import training_metrics
from pipeline.model.training import (
    VALIDATION_CUTOFF,
    EpochReport,
    Ranks,
    TrainingData,
    TrainingState,
    fit,
    new_state,
    popular_hit_rate,
    seed_everything,
)
from pipeline.settings import Settings

STATES_KEPT = 2


def train_checkpoint(storage: Storage, night: Night, settings: Settings) -> Manifest:
    """Train tonight's model, unless it exists, and leave it as the Checkpoint artifact."""
    existing = read_manifest(storage, night.checkpoint.prefix)
    if existing is not None:
        return existing
    if read_manifest(storage, night.histories.prefix) is None:
        raise InputError(f"{storage.uri}/{night.histories.prefix}: not there; run jobs/prepare.py first")
    need = ActorNeed("training worker", settings.train.num_workers, *_resources(settings))
    preflight(connect(settings), [need])
    with messages_logged() as messages:
        result = _run(storage, night, settings, messages)
    manifest = _keep_best(storage, night, settings, result)
    _remove_run(storage, night)
    return manifest


def _resources(settings: Settings) -> tuple[float, float]:
    return float(settings.train.threads_per_worker), 1.0 if settings.train.use_gpu else 0.0


def _place(storage: Storage, key: str) -> tuple[Any, str]:
    assert isinstance(storage, LocalStorage | S3Storage), "connect() has refused stores of one process"
    return storage.arrow_path(key)


def _run(storage: Storage, night: Night, settings: Settings, messages: ActorHandle) -> ray.train.Result:
    cpus, gpus = _resources(settings)
    filesystem, path = _place(storage, "training")
    trainer = TorchTrainer(
        _train_worker,
        train_loop_config={
            "root": storage.uri,
            "histories": night.histories,
            "settings": settings,
            "messages": messages,
        },
        torch_config=TorchConfig(backend="nccl" if settings.train.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=settings.train.num_workers,
            use_gpu=settings.train.use_gpu,
            resources_per_worker={"CPU": cpus} | ({"GPU": gpus} if gpus else {}),
        ),
        run_config=RunConfig(
            name=night.checkpoint.id,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=settings.train.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=STATES_KEPT),
        ),
    )
    try:
        return trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise _explained(error) from error


def _explained(error: Exception) -> NightrailsError:
    """Our own error of a worker, when one raised it; else what a retry may mend."""
    failures = getattr(error, "worker_failures", {})
    for failure in [*failures.values(), error]:
        cause = cause_of(failure)
        if isinstance(cause, NightrailsError):
            return cause
    return InfrastructureError(f"training failed: {error}; run again to go on from the last epoch")


def _keep_best(storage: Storage, night: Night, settings: Settings, result: ray.train.Result) -> Manifest:
    """Write the artifact from the run's last checkpoint, which holds the weights of its best epoch."""
    assert result.checkpoint is not None
    assert result.metrics is not None
    with result.checkpoint.as_directory() as folder:
        history, weights = read_history(Path(folder)), read_best_weights(Path(folder))
    model = RetrievalModel(settings.model, len(read_items(storage, night.histories)))
    model.load_state_dict(weights)
    metrics = training_metrics(history, result.metrics["popularity_hit_rate"])
    return write_checkpoint(storage, night.checkpoint, model, settings, metrics, {"histories": night.histories.id})


def progress(report: EpochReport, popularity: float, max_epochs: int) -> str:
    """The line that a person sees after each epoch."""
    return (
        f"epoch {report.epoch} of at most {max_epochs}: loss {report.loss:.3f}, HR@{VALIDATION_CUTOFF} "
        f"{report.hit_rate:.4f} (popularity {popularity:.4f}), {report.num_positions / report.seconds:,.0f} "
        f"positions/s, {report.seconds + report.validation_seconds:.0f} s"
    )


def _remove_run(storage: Storage, night: Night) -> None:
    filesystem, path = _place(storage, f"training/{night.checkpoint.id}")
    filesystem.delete_dir(path)


def _train_worker(config: dict[str, Any]) -> None:
    """What every worker runs, from the last checkpoint if there is one."""
    settings: Settings = config["settings"]
    context = ray.train.get_context()
    ranks = Ranks(context.get_world_rank(), context.get_world_size())
    torch.set_num_threads(settings.train.threads_per_worker)
    device = ray.train.torch.get_device() if settings.train.use_gpu else torch.device("cpu")
    data = read_training_data(open_storage(config["root"]), config["histories"], settings, ranks, device)
    seed_everything(settings.train.seed)  # the same first weights on every rank
    model = RetrievalModel(settings.model, len(data.item_counts_N)).to(device)
    state = new_state(model, settings.train)
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            load_state(Path(folder), state)
    popularity = popular_hit_rate(data, ranks, device)

    def report(state: TrainingState) -> None:
        last = state.history[-1]
        metrics = asdict(last) | {"popularity_hit_rate": popularity}
        if ranks.rank != 0:
            ray.train.report(metrics)
            return
        config["messages"].say.remote(progress(last, popularity, settings.train.max_epochs))
        with tempfile.TemporaryDirectory() as folder:
            save_state(Path(folder), state)
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder))

    fit(state, data, settings.train, ranks, report)


def read_training_data(
    storage: Storage, histories: Histories, settings: Settings, ranks: Ranks, device: torch.device
) -> TrainingData:
    """The windows and validation users of this rank's buckets: bucket b belongs to rank b mod world size."""
    windows: list[Windows] = []
    users: list[ValidationUsers] = []
    for index in range(ranks.rank, settings.output.num_buckets, ranks.world_size):
        bucket = read_bucket(storage, histories, index)
        train = bucket.cut("train")
        windows.append(cut_windows(train, bucket.user_keys, settings.model.max_length))
        users.append(validation_users(train, bucket.held_out("validation"), bucket.user_keys))
    own_windows, own_users = join_windows(windows), join_validation_users(users)
    num_windows = _by_rank(len(own_windows), ranks, device)
    if not any(num_windows):
        raise InputError(f"{storage.uri}/{histories.prefix}: no user has two events to train on; give a longer log")
    num_users = sum(_by_rank(len(own_users), ranks, device))
    share = settings.train.validation_queries / max(num_users, 1)
    counts = read_items(storage, histories)["num_train_events"].to_numpy().copy()
    return TrainingData(
        own_windows,
        num_steps(num_windows, settings.train.batch_size),
        sample_users(own_users, share, settings.train.seed),
        torch.from_numpy(counts),
    )


def _by_rank(count: int, ranks: Ranks, device: torch.device) -> list[int]:
    """This number of every rank, on every rank."""
    counts = torch.zeros(ranks.world_size, dtype=torch.int64, device=device)
    counts[ranks.rank] = count
    found: list[int] = ranks.sum_(counts).tolist()
    return found
