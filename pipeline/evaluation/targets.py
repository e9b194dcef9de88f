"""Users that an evaluation asks and items that they should find: targets and a seeded sample. U users of a bucket."""

from dataclasses import astuple, dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.data.columns import Mask
from pipeline.data.histories import Bucket
from pipeline.data.lists import Int64, Lists


def held_out_targets(bucket: Bucket) -> Lists:
    """(U users): the distinct items of each user's test events that may be shown to the user.

    An item that was seen before is excluded from every list, so it could not be found and is no target. A user may have
    none.
    """
    return bucket.held_out("test").distinct().minus(bucket.seen("before_test"))


def evaluable_users(bucket: Bucket) -> Int64:
    """The users with a visible event and a target."""
    has_target = held_out_targets(bucket).lengths > 0
    has_history = bucket.cut("before_test").lengths > 0
    return np.flatnonzero(has_target & has_history)


@dataclass(frozen=True)
class Turnout:
    """Numbers of users with test events: all of them, and those who leave the metrics or cannot be served well."""

    with_test_events: int = 0
    only_repeats: int = 0  # all items of their test events were seen before: they have no target
    without_history: int = 0  # they have a target, but no visible event
    only_unlearned: int = 0  # they have a target and a visible event, but no target that is learned

    def __add__(self, other: "Turnout") -> "Turnout":
        return Turnout(*(mine + its for mine, its in zip(astuple(self), astuple(other), strict=True)))


def count_turnout(bucket: Bucket, is_learned_N: Mask) -> Turnout:
    """Count the users of a bucket; `is_learned_N` marks the items that have a training event."""
    targets = held_out_targets(bucket)
    has_target = targets.lengths > 0
    has_history = bucket.cut("before_test").lengths > 0
    has_events = bucket.held_out("test").lengths > 0
    has_learned = targets.where(is_learned_N[targets.values]).lengths > 0
    return Turnout(
        with_test_events=int(has_events.sum()),
        only_repeats=int((has_events & ~has_target).sum()),
        without_history=int((has_target & ~has_history).sum()),
        only_unlearned=int((has_target & has_history & ~has_learned).sum()),
    )


def sampling_keys(user_keys: Int64, seed: int) -> NDArray[np.uint64]:
    """(U,): a pseudo-random number for each user (splitmix64). The users with the m smallest keys are a sample of m,
    whatever the buckets and the order of the users."""
    mixed = user_keys.astype(np.uint64) + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % (1 << 64))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))
