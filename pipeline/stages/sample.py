"""Draws the users of an evaluation. Imports no torch: the tasks start in a fraction of the time."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.targets import evaluable_users, sampling_keys
from pipeline.io.evaluation import Sample
from pipeline.io.histories import read_bucket
from pipeline.io.night import Night
from pipeline.settings import Settings

# Queries by which an exact search is compared with brute force in float64, which scores every pair of the corpus.
NUM_VERIFIED = 5


@dataclass(frozen=True)
class UnitDraw:
    """What a unit brings to the draw: its smallest sampling keys, ascending, and its counts."""

    unit: int
    keys: NDArray[np.uint64]
    num_evaluable: int
    num_without_history: int


def make_sample(
    keys: Mapping[int, NDArray[np.uint64]], settings: Settings, num_evaluable: int, num_without_history: int
) -> Sample:
    """The sample from each unit's keys, ascending. An approximate search is checked on the smallest of all keys,
    an exact one on a handful of one unit, so that brute force reads the corpus once."""
    merged = np.sort(np.concatenate(list(keys.values())))
    query_threshold = int(merged[: settings.evaluate.max_queries][-1])
    units = [unit for unit in sorted(keys) if keys[unit].size and keys[unit][0] <= query_threshold]
    if settings.search.is_exact:
        checked_units = [next(unit for unit in units if keys[unit][0] == merged[0])]
        mine = keys[checked_units[0]]
        checked_threshold = int(mine[mine <= query_threshold][:NUM_VERIFIED][-1])
    else:
        checked_threshold = min(query_threshold, int(merged[: settings.evaluate.num_checked][-1]))
        checked_units = [unit for unit in units if keys[unit][0] <= checked_threshold]
    return Sample(
        query_threshold=query_threshold,
        checked_threshold=checked_threshold,
        units=units,
        checked_units=checked_units,
        num_evaluable=num_evaluable,
        num_without_history=num_without_history,
    )


def draw_unit(night: Night, unit: int, seed: int, most: int) -> UnitDraw:
    """The `most` smallest sampling keys of a unit's evaluable users."""
    bucket = read_bucket(night.storage, night.histories, unit)
    at, num_without_history = evaluable_users(bucket)
    keys = np.sort(sampling_keys(bucket.user_keys[at], seed))[:most]
    return UnitDraw(unit, keys, len(at), num_without_history)
