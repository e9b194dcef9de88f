"""The training data of one rank, which reads its own user buckets."""

import torch

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
from pipeline.errors import InputError
from pipeline.io.histories import read_bucket, read_items
from pipeline.io.night import Night
from pipeline.model.training import Ranks, TrainingData
from pipeline.settings import Settings


def read_training_data(night: Night, settings: Settings, ranks: Ranks, device: torch.device) -> TrainingData:
    """Windows and validation users of this rank's buckets; bucket b belongs to rank b mod world size.

    Raises InputError when no user of any rank has two events.
    """
    windows: list[Windows] = []
    users: list[ValidationUsers] = []
    for index in range(ranks.rank, settings.output.num_buckets, ranks.world_size):
        bucket = read_bucket(night.storage, night.histories, index)
        train = bucket.cut("train")
        windows.append(cut_windows(train, bucket.user_keys, settings.model.max_length))
        users.append(validation_users(train, bucket.held_out("validation"), bucket.user_keys))
    own_windows, own_users = join_windows(windows), join_validation_users(users)
    num_windows = counts_by_rank(len(own_windows), ranks, device)
    if not any(num_windows):
        raise InputError(
            f"{night.storage.uri}/{night.histories.prefix}: no user has two events to train on; give a longer log"
        )
    num_users = sum(counts_by_rank(len(own_users), ranks, device))
    share = settings.train.validation_queries / max(num_users, 1)
    counts = read_items(night.storage, night.histories, ["num_train_events"])["num_train_events"].to_numpy().copy()
    return TrainingData(
        own_windows,
        num_steps(num_windows, settings.train.batch_size),
        sample_users(own_users, share, settings.train.seed),
        torch.from_numpy(counts),
    )


def counts_by_rank(count: int, ranks: Ranks, device: torch.device) -> list[int]:
    """Gather the `count` of every rank; every rank gets the whole list."""
    counts = torch.zeros(ranks.world_size, dtype=torch.int64, device=device)
    counts[ranks.rank] = count
    summed: list[int] = ranks.sum_(counts).tolist()
    return summed
