"""Divisions of the held-out events, by which an evaluation tells its metrics apart: long and short histories, popular
and rare items, old and new ones.

A user counts in a class with those targets that belong to it, so one with targets in two classes counts in both.
Shapes: B users, T targets of all users, N items.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.data.columns import DAY_US
from pipeline.data.lists import Int64, Lists
from pipeline.evaluation.metrics import MeanSum, Rows, ranking_sums

HISTORY_BOUNDS = (5, 10, 20, 50, 100)  # numbers of visible events: each begins a class
HISTORIES = ("1 to 4 events", "5 to 9 events", "10 to 19 events", "20 to 49 events", "50 to 99 events", "100 or more")
POPULARITIES = ("popular: half of all events", "middle: the next 30 %", "rare: the last 20 %", "without an event")
AGE_BOUNDS = (DAY_US, 7 * DAY_US, 30 * DAY_US)
AGES = ("less than a day", "1 to 6 days", "7 to 29 days", "30 days or more")
DIVISIONS = {"history": HISTORIES, "popularity": POPULARITIES, "age": AGES}  # the names of their classes


@dataclass(frozen=True)
class Division:
    """A class for each target."""

    by: str  # one of DIVISIONS
    class_T: Int64  # index into its names


def by_history(num_visible_B: Int64, targets: Lists) -> Division:
    """By the number of events that the user's history shows, which is not 0."""
    classes_B = np.searchsorted(HISTORY_BOUNDS, num_visible_B, side="right")
    return Division("history", classes_B[targets.owners])


def by_popularity(popularity_N: Int64, targets: Lists) -> Division:
    """By the number of events of the item before the test; the most popular items come first, ties by row."""
    return Division("popularity", popularity_classes(popularity_N)[targets.values])


def popularity_classes(popularity_N: Int64) -> Int64:
    """(N,) index into POPULARITIES: an item belongs where the events of the items before it end."""
    order_N = np.argsort(-popularity_N, kind="stable")
    events_before_N = np.cumsum(popularity_N[order_N]) - popularity_N[order_N]
    classes_N = np.empty(len(popularity_N), dtype=np.int64)
    classes_N[order_N] = np.searchsorted([5, 8], 10 * events_before_N // max(1, int(popularity_N.sum())), side="right")
    classes_N[popularity_N == 0] = len(POPULARITIES) - 1
    return classes_N


def by_age(first_event_N: Int64, asked_at_B: Int64, targets: Lists) -> Division:
    """By the time from the item's first event to the user's first test event, both in µs since 1970 UTC."""
    age_T = asked_at_B[targets.owners] - first_event_N[targets.values]
    return Division("age", np.searchsorted(AGE_BOUNDS, age_T, side="right"))


def segment_sums(
    division: Division, ranked: Mapping[str, Rows], targets: Lists, cutoffs: Sequence[int]
) -> Iterator[tuple[str, dict[str, dict[str, MeanSum]]]]:
    """For each class that has a target: its name, and the sums of `ranking_sums` for each of the rankings (B, K)."""
    for index, name in enumerate(DIVISIONS[division.by]):
        chosen = targets.where(division.class_T == index)
        users = np.flatnonzero(chosen.lengths)
        if len(users):
            of_users = chosen.take(users)
            yield name, {key: ranking_sums(lists_BK[users], of_users, cutoffs) for key, lists_BK in ranked.items()}
