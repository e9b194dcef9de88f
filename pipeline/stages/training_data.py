"""The training data of one rank, which reads its own user buckets."""

from typing import Literal

import numpy as np
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
from pipeline.data.columns import DAY_US
from pipeline.data.days import end_of
from pipeline.data.histories import Bucket
from pipeline.data.lists import Float32
from pipeline.errors import InputError
from pipeline.io.histories import read_bucket, read_num_events
from pipeline.io.night import Night
from pipeline.model.encoders import columns_read
from pipeline.model.ranks import Ranks
from pipeline.model.training import TrainingData
from pipeline.settings import Settings

MIN_VALIDATION_QUERIES = 1_000
# The cost of a validation user, in pairs of a training step. Measured on one core with 43,000 items and a hit rate of
# .18: an item costs 1/57 of a pair with the native kernels and 1/17 with PyTorch, and more if more users have a hit. An
# event of a full history costs an encoder up to 17 pairs.
PAIRS_PER_ITEM, PAIRS_PER_EVENT = 1 / 10, 16
Part = Literal["train", "before_test", "whole"]  # of the histories, as `pipeline.data.seen.PARTS`


def read_training_data(
    night: Night, settings: Settings, ranks: Ranks, device: torch.device, part: Part = "train"
) -> TrainingData:
    """Windows and validation users of this rank's buckets; bucket b belongs to rank b mod world size.

    The windows are cut from the events of `part`. Validation users are those of the training events in any case. Raises
    InputError when no user of any rank has two events.
    """
    windows: list[Windows] = []
    users: list[ValidationUsers] = []
    end_us = end_of(night.ds, settings.log.time_zone)
    reads = columns_read(settings.model)
    for index in range(ranks.rank, settings.output.num_buckets, ranks.world_size):
        bucket = read_bucket(night.storage, night.histories, index)
        train = bucket.cut("train", reads)
        weights = target_weights(bucket, part, settings.train.half_life_days, end_us)
        length = settings.model.max_length
        windows.append(cut_windows(bucket.cut(part, reads), bucket.user_keys, length, weights, bucket.seen(part)))
        users.append(validation_users(train, bucket.held_out("validation"), bucket.user_keys, bucket.seen("train")))
    own_windows, own_users = join_windows(windows), join_validation_users(users)
    num_targets = counts_by_rank(own_windows.num_targets, ranks, device)
    if not any(num_targets):
        raise InputError(
            f"{night.storage.uri}/{night.histories.prefix}: no user has two events to train on, the second of a weight "
            "above 0; give a longer log, or other event_weights in the source file"
        )
    steps = num_steps(num_targets, settings.train.batch_positions)
    counts = read_num_events(night.storage, night.histories, part)
    num_users = sum(counts_by_rank(len(own_users), ranks, device))
    targets_per_round = sum(num_targets) * min(1.0, settings.train.steps_between_validations / steps)
    share = num_validation_queries(settings, targets_per_round, len(counts)) / max(num_users, 1)
    return TrainingData(
        own_windows, steps, sample_users(own_users, share, settings.train.seed), torch.from_numpy(counts)
    )


def target_weights(bucket: Bucket, part: Part, half_life_days: float | None, end_us: int) -> Float32:
    """The weight of each event of `part` as a target: the log's, halved for each half-life before `end_us` (µs)."""
    events = bucket.events_of(part)
    if half_life_days is None:
        return bucket.weights[events]
    age_days = (end_us - bucket.event_ts[events]) / DAY_US
    return np.asarray(bucket.weights[events] * 0.5 ** (age_days / half_life_days), dtype=np.float32)


def num_validation_queries(settings: Settings, targets_per_round: float, num_items: int) -> float:
    """About the number of users to validate on after each round; as many as cost a fifth of the round or less, if
    nothing else is set."""
    if settings.train.validation_queries is not None:
        return settings.train.validation_queries
    pairs_per_round = targets_per_round * settings.train.num_negatives
    pairs_per_user = PAIRS_PER_ITEM * num_items + PAIRS_PER_EVENT * settings.model.max_length
    return max(MIN_VALIDATION_QUERIES, 0.2 * pairs_per_round / pairs_per_user)


def counts_by_rank(count: int, ranks: Ranks, device: torch.device) -> list[int]:
    """Gather the `count` of every rank; every rank gets the whole list."""
    counts = torch.zeros(ranks.world_size, dtype=torch.int64, device=device)
    counts[ranks.rank] = count
    summed: list[int] = ranks.sum_(counts).tolist()
    return summed
