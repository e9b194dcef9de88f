"""Two rankings compared on the same users: a paired test, which the differences between users do not blur."""

import math
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from pipeline.data.columns import numpy_of
from pipeline.data.lists import Lists, offsets_of
from pipeline.errors import InputError
from pipeline.evaluation.metrics import Z95, Floats, hits_at, ranking_values
from pipeline.evaluation.results import Difference


def paired_difference(first_B: Floats, second_B: Floats) -> Difference:
    """Compare a metric's values for B users, at least one, by the normal approximation of the paired t-test.

    Users should be some hundred or more. One user says nothing of the spread: the interval is then all of [-1, 1].
    """
    differences_B = second_B - first_B
    mean, num_users = float(differences_B.mean()), len(differences_B)
    if num_users > 1:
        error = float(differences_B.std(ddof=1)) / math.sqrt(num_users)
        low, high = mean - Z95 * error, mean + Z95 * error
        p_value = math.erfc(abs(mean) / error / math.sqrt(2.0)) if error > 0.0 else float(mean == 0.0)
    else:
        low, high, p_value = -1.0, 1.0, 1.0
    return Difference(
        first=float(first_B.mean()),
        second=float(second_B.mean()),
        mean=mean,
        low=low,
        high=high,
        p_value=p_value,
        num_better=int(np.sum(differences_B > 0)),
        num_worse=int(np.sum(differences_B < 0)),
    )


def differences(
    first: tuple[pa.Table, str], second: tuple[pa.Table, str], k: int, cutoffs: Sequence[int]
) -> dict[str, Difference]:
    """Compare two rankings on the same users, in the same order; each is a table of them (`schema.evaluated_users`) and
    the name of a ranking in it. The differences are of `ranking_values`, by name."""
    values = [_values(users, ranking, k, cutoffs) for users, ranking in (first, second)]
    return {name: paired_difference(values[0][name], values[1][name]) for name in values[0]}


def common_users(first: pa.Table, second: pa.Table) -> tuple[pa.Table, pa.Table]:
    """The users of two evaluations that had to find the same items in both, in one order.

    Raises InputError when there is none, or when the ids are of two types.
    """
    types = [users.schema.field("user_id").type for users in (first, second)]
    if types[0] != types[1]:
        raise InputError(f"user ids are {types[0]} in the first evaluation and {types[1]} in the second")
    places: dict[tuple[object, ...], int] = {key: place for place, key in enumerate(_keys(second))}
    pairs = [(place, places[key]) for place, key in enumerate(_keys(first)) if key in places]
    if not pairs:
        raise InputError(
            "no user had to find the same items in both evaluations; compare evaluations of the same log, ds and split"
        )
    mine, theirs = (pa.array(column) for column in zip(*pairs, strict=True))
    return first.take(mine), second.take(theirs)


def _keys(users: pa.Table) -> list[tuple[object, ...]]:
    """The id and the items to find of each user; both evaluations may number the items in their own way."""
    items = users["item_ids"].to_pylist()
    return [(user, *sorted(of_user)) for user, of_user in zip(users["user_id"].to_pylist(), items, strict=True)]


def _values(users: pa.Table, ranking: str, k: int, cutoffs: Sequence[int]) -> dict[str, Floats]:
    ranks = users[f"{ranking}_ranks"].combine_chunks()
    lengths = numpy_of(ranks.value_lengths()).astype(np.int64)
    values = numpy_of(ranks.flatten())
    targets = Lists(offsets_of(lengths), values)
    return ranking_values(hits_at(values, targets, k), lengths, cutoffs)
