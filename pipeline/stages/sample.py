"""Drawing the users of an evaluation. No import of torch here, so that the tasks start fast."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluation.targets import Turnout, count_turnout, evaluable_users, sampling_keys
from pipeline.io.evaluation import Sample
from pipeline.io.histories import read_bucket, read_items
from pipeline.io.night import Night
from pipeline.settings import Settings

# Users of an exact search whose lists are compared with brute force. Few, because it scores every item in float64.
NUM_VERIFIED = 5


@dataclass(frozen=True)
class UnitDraw:
    """The contribution of one unit to the draw of the sample."""

    unit: int
    keys: NDArray[np.uint64]  # the smallest sampling keys of its evaluable users, ascending
    num_evaluable: int  # users with a visible event and a test event to predict
    turnout: Turnout


def make_sample(
    keys: Mapping[int, NDArray[np.uint64]], settings: Settings, num_evaluable: int, turnout: Turnout
) -> Sample:
    """Sample the users with the smallest keys; `keys` has the ascending sampling keys of each unit.

    The recall check of an approximate search takes the smallest keys of all units. The check of an exact search takes
    a few users of one unit, so that brute force reads the corpus once.
    """
    merged = np.sort(np.concatenate(list(keys.values())))
    query_threshold = int(merged[: settings.evaluate.max_queries][-1])
    units = [unit for unit in sorted(keys) if keys[unit].size and keys[unit][0] <= query_threshold]
    if settings.search.is_exact:
        checked_units = [next(unit for unit in units if keys[unit][0] == merged[0])]
        unit_keys = keys[checked_units[0]]
        checked_threshold = int(unit_keys[unit_keys <= query_threshold][:NUM_VERIFIED][-1])
    else:
        checked_threshold = min(query_threshold, int(merged[: settings.evaluate.num_checked][-1]))
        checked_units = [unit for unit in units if keys[unit][0] <= checked_threshold]
    return Sample(
        query_threshold=query_threshold,
        checked_threshold=checked_threshold,
        units=units,
        checked_units=checked_units,
        num_evaluable=num_evaluable,
        turnout=turnout,
    )


def draw_unit(night: Night, unit: int, seed: int, max_keys: int) -> UnitDraw:
    """The `max_keys` smallest sampling keys of a unit's evaluable users, and its counts."""
    bucket = read_bucket(night.storage, night.histories, unit)
    users = evaluable_users(bucket)
    is_learned_N = read_items(night.storage, night.histories, ["num_train_events"])["num_train_events"].to_numpy() > 0
    keys = np.sort(sampling_keys(bucket.user_keys[users], seed))[:max_keys]
    return UnitDraw(unit, keys, len(users), count_turnout(bucket, is_learned_N))
