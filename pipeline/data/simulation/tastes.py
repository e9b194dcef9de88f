"""The hidden tastes behind a simulated log, and the items that people take on one day.

Every item belongs to one of `num_tastes` tastes and has a successor within it: a series that is watched in order. A
user is in one taste at a time and mostly takes the successor of the last item, or a popular item of the taste, or
(seldom) a popular item of any taste. So the next item depends on the user's present taste and on the last
item: a model of sequences can learn it, popularity cannot.
"""

from dataclasses import dataclass
from datetime import date, timedelta

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.lists import Int64, offsets_of
from pipeline.settings import SimulateSettings

DAY_US = 86_400_000_000
SUCCESSOR_SHARE = 0.45  # share of events that take the next item of the series
ELSEWHERE_SHARE = 0.08  # share of events that take a popular item of any taste
DRIFT_SHARE = 0.12  # share of active days on which the user has moved to another taste
ZIPF_EXPONENT = 1.1
RECENT = 24  # items that a user does not take again soon
COLD_DAYS_SHARE = 0.1  # share of the log's days, at its end, in which cold users and items appear

Float64 = npt.NDArray[np.float64]
Generator = np.random.Generator


@dataclass(frozen=True)
class World:
    """The part that no day changes: items in order of taste, their popularity, and how active each user is."""

    num_tastes: int
    taste_of_item: Int64
    first_item: Int64  # the first item of each taste, and the end
    popularity: Float64
    taste_share: Float64  # share of moving users who choose each taste
    item_birth: Int64  # day on which the item appears
    activity: Float64
    active_share: Float64  # share of days on which the user comes at all
    user_birth: Int64
    user_ids: pa.Array
    item_ids: pa.Array


@dataclass
class People:
    """The state that a day leaves for the next."""

    taste: Int64
    recent: npt.NDArray[np.int32]  # (users, RECENT) ring of the last items
    position: Int64  # of the newest item in the ring


@dataclass(frozen=True)
class Events:
    """Events of one day in order of arrival; `item` -1 is an item that no catalogue knows."""

    user: Int64
    item: Int64
    time: Int64  # µs since 1970


def first_day(settings: SimulateSettings) -> date:
    """The day of the first partition."""
    return settings.last_day - timedelta(days=settings.num_days - 1)


def make_world(settings: SimulateSettings) -> World:
    """Draw the part that no day changes."""
    rng = np.random.default_rng([settings.seed, 0])
    num_tastes = min(settings.num_tastes, settings.num_items)
    taste_of_item = np.sort(
        np.concatenate([np.arange(num_tastes), rng.integers(0, num_tastes, settings.num_items - num_tastes)])
    )
    first_item = np.searchsorted(taste_of_item, np.arange(num_tastes + 1))
    rank = np.arange(settings.num_items) - first_item[taste_of_item]
    taste_popularity = rng.lognormal(0.0, 0.5, num_tastes)
    # A series runs through the ids in order; popularity is shuffled within a taste, so that neither tells
    # anything about the other.
    shuffled = np.lexsort((rng.random(settings.num_items), taste_of_item))
    popularity = np.empty(settings.num_items)
    popularity[shuffled] = taste_popularity[taste_of_item] / (rank + 1.0) ** ZIPF_EXPONENT
    return World(
        num_tastes=num_tastes,
        taste_of_item=taste_of_item,
        first_item=first_item,
        popularity=popularity,
        taste_share=taste_popularity / taste_popularity.sum(),
        item_birth=_births(settings.num_items, settings, rng),
        activity=rng.lognormal(0.0, 0.8, settings.num_users),
        active_share=rng.beta(2.0, 4.0, settings.num_users).clip(0.05, 1.0),
        user_birth=_births(settings.num_users, settings, rng),
        user_ids=ids("u", settings.num_users, 7),
        item_ids=ids("i", settings.num_items, 6),
    )


def _births(number: int, settings: SimulateSettings, rng: Generator) -> Int64:
    """The day on which each appears: day 0, or for the cold ones one of the last days."""
    cold_days = min(max(2, round(settings.num_days * COLD_DAYS_SHARE)), settings.num_days)
    births = np.zeros(number, dtype=np.int64)
    cold = rng.permutation(number)[: min(round(number * settings.cold_share), number - 1)]  # day 0 is never empty
    births[cold] = settings.num_days - cold_days + rng.integers(0, cold_days, len(cold))
    return births


def first_people(world: World, rng: Generator) -> People:
    """Draw everybody's first taste; nobody has taken anything."""
    num_users = len(world.user_ids)
    return People(
        rng.choice(world.num_tastes, num_users, p=world.taste_share),
        np.full((num_users, RECENT), -1, dtype=np.int32),
        np.zeros(num_users, dtype=np.int64),
    )


def day_of_people(
    world: World, people: People, day: int, num_events: int, settings: SimulateSettings, rng: Generator
) -> Events:
    """Draw who comes today, how often, and the items taken: all users take their first item, then their second, …"""
    comes = (world.user_birth <= day) & (rng.random(settings.num_users) < world.active_share)
    comes[world.user_birth == day] = True
    weights = world.activity * comes
    if not weights.any():
        weights = world.activity
    counts = rng.multinomial(num_events, weights / weights.sum())
    active = np.flatnonzero(counts)
    active = active[np.argsort(-counts[active], kind="stable")]  # users with many events first: a round is a prefix
    lengths = counts[active]
    drifts = active[rng.random(len(active)) < DRIFT_SHARE]
    people.taste[drifts] = rng.choice(world.num_tastes, len(drifts), p=world.taste_share)

    shelf = Shelf(world, day)
    starts = offsets_of(lengths)
    items = np.empty(num_events, dtype=np.int64)
    in_round = np.searchsorted(-lengths, -np.arange(lengths.max(initial=0)), side="left")
    for step, size in enumerate(in_round):
        users = active[:size]
        taken = shelf.take(people, users, rng)
        people.position[users] = (people.position[users] + 1) % RECENT
        people.recent[users, people.position[users]] = taken
        items[starts[:size] + step] = taken
    return Events(np.repeat(active, lengths), items, _times(lengths, day, settings, rng))


class Shelf:
    """The items that exist on a day, ready to be drawn from by popularity."""

    def __init__(self, world: World, day: int) -> None:
        self.world = world
        self.exists = world.item_birth <= day
        weights = np.where(self.exists, world.popularity, 0.0)
        self.everywhere = np.cumsum(weights) / weights.sum()
        total = np.concatenate([[0.0], np.cumsum(weights)])
        before, of_taste = total[world.first_item[:-1]], np.diff(total[world.first_item])
        shares = (total[1:] - before[world.taste_of_item]) / np.where(of_taste > 0, of_taste, 1.0)[world.taste_of_item]
        self.within = world.taste_of_item + np.where(of_taste[world.taste_of_item] > 0, shares, 0.0)
        self.is_empty = of_taste == 0

    def take(self, people: People, users: Int64, rng: Generator) -> Int64:
        """The next item of each user."""
        chance, draw = rng.random((2, len(users)))
        tastes = people.taste[users]
        last = people.recent[users, people.position[users]].astype(np.int64)
        popular = self._draw(tastes, draw)
        in_series = (chance < SUCCESSOR_SHARE) & (last >= 0) & (self.world.taste_of_item[last] == tastes)
        items = np.where(in_series, self._successor(last), popular)
        elsewhere = (chance >= 1.0 - ELSEWHERE_SHARE) | self.is_empty[tastes]
        anywhere = np.searchsorted(self.everywhere, draw, side="right")
        items = np.where(elsewhere, anywhere, items)
        for _ in range(3):  # step over items taken lately; after a few steps people do repeat themselves
            again = np.flatnonzero((people.recent[users] == items[:, None]).any(axis=1))
            if not len(again):
                break
            items[again] = self._successor(items[again])
        return np.where(self.exists[items], items, np.where(self.is_empty[tastes], anywhere, popular))

    def _draw(self, tastes: Int64, draw: Float64) -> Int64:
        """Draw by popularity within the taste: `within` climbs from t to t + 1 over the items of taste t."""
        items = np.searchsorted(self.within, tastes + draw, side="right")
        return np.minimum(items, self.world.first_item[tastes + 1] - 1)

    def _successor(self, items: Int64) -> Int64:
        """The next item of the series, which is a ring over the items of the taste."""
        following = items + 1
        tastes = self.world.taste_of_item[items]
        return np.where(following == self.world.first_item[tastes + 1], self.world.first_item[tastes], following)


def _times(lengths: Int64, day: int, settings: SimulateSettings, rng: Generator) -> Int64:
    """Times of day: sessions begin mostly in the evening, events follow each other by a minute or two."""
    evening = rng.random(len(lengths)) < 0.65
    start = np.where(evening, rng.normal(20.0, 1.8, len(lengths)), rng.normal(12.5, 3.0, len(lengths))) % 24.0
    gaps = (rng.exponential(90e6, lengths.sum()) + 1e6).astype(np.int64)
    gaps[offsets_of(lengths)[:-1]] = 0
    total = np.cumsum(gaps)
    offset = total - np.repeat(total[offsets_of(lengths)[:-1]], lengths)
    span = offset[offsets_of(lengths)[1:] - 1]
    room = DAY_US - 1_000_000
    squeeze = np.minimum(1.0, room / np.maximum(span, 1))  # a very busy day is compressed into 24 hours
    offset = (offset * np.repeat(squeeze, lengths)).astype(np.int64)
    start_us = np.minimum((start * 3600e6).astype(np.int64), room - (span * squeeze).astype(np.int64))
    times: Int64 = midnight(settings, day) + np.repeat(np.maximum(start_us, 0), lengths) + offset
    return times


def midnight(settings: SimulateSettings, day: int) -> int:
    """The start of a day in µs since 1970."""
    return ((first_day(settings) - date(1970, 1, 1)).days + day) * DAY_US


def ids(prefix: str, number: int, width: int) -> pa.Array:
    """Number the ids: prefix0000000, prefix0000001, …"""
    digits = pc.utf8_lpad(pa.array(np.arange(number)).cast(pa.string()), width, "0")
    return pc.binary_join_element_wise(pa.scalar(prefix), digits, "")
