"""A simulated log: the items that people take, day by day, with the troubles of a real log: repeated deliveries, late
and unknown events, bots, cold users and items."""

from collections import defaultdict
from collections.abc import Iterator
from datetime import date, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import schema
from pipeline.config import fingerprint
from pipeline.data.lists import Int64
from pipeline.data.simulation.items import simulated_items
from pipeline.data.simulation.tastes import (
    DAY_US,
    Events,
    Generator,
    World,
    day_of_people,
    first_day,
    first_people,
    ids,
    make_world,
    midnight,
)
from pipeline.settings import SimulateSettings

SIMULATION_VERSION = 1  # raised by hand when the same settings would give another log

EVENT_TYPES = ("view", "click", "cart", "purchase")
TYPE_SHARES = (0.60, 0.25, 0.10, 0.05)
BOT_EVENTS = (2_200, 3_000)  # a bot's clicks on its one day: more than any person's


def simulated_prefix(settings: SimulateSettings) -> str:
    """Where the log of these settings lies below the root."""
    return f"simulated/{fingerprint('simulated', SIMULATION_VERSION, settings)}"


def simulate_items(settings: SimulateSettings) -> pa.Table:
    """The catalogue: `item_id`, a title that a person can read, and attributes for rules."""
    world = make_world(settings)
    return simulated_items(
        world.item_ids, world.taste_of_item, world.first_item, world.item_birth, first_day(settings), settings.seed
    )


def simulate_days(settings: SimulateSettings) -> Iterator[tuple[date, pa.Table]]:
    """Each `ds=` partition in turn (`schema.interactions`), holding one day in memory.

    There are `num_events` events of people; repeated deliveries and the clicks of bots come on top. A late event lies
    in a partition after its day; the last days' late events arrive in the last partition.
    """
    rng = np.random.default_rng([settings.seed, 1])
    world = make_world(settings)
    people = first_people(world, rng)
    bot_days = _bot_days(settings, rng)
    waiting: defaultdict[int, list[pa.Table]] = defaultdict(list)
    for day, num_events in enumerate(_events_per_day(settings, rng)):
        people_events = day_of_people(world, people, day, int(num_events), settings, rng)
        events = _with_bots(people_events, np.flatnonzero(bot_days == day), world, day, settings, rng)
        table = _as_table(events, world, day, settings, rng)
        for delay, part in _deliveries(table, settings, rng):
            waiting[min(day + delay, settings.num_days - 1)].append(part)
        arrived = pa.concat_tables(waiting.pop(day))
        yield first_day(settings) + timedelta(days=day), arrived.take(pc.sort_indices(arrived["event_ts"]))


def _bot_days(settings: SimulateSettings, rng: Generator) -> Int64:
    """The day on which each user is a bot; -1 for people."""
    days = np.full(settings.num_users, -1, dtype=np.int64)
    bots = rng.permutation(settings.num_users)[: round(settings.num_users * settings.bot_share)]
    days[bots] = rng.integers(0, settings.num_days, len(bots))
    return days


def _events_per_day(settings: SimulateSettings, rng: Generator) -> Int64:
    weekdays = (np.arange(settings.num_days) + first_day(settings).weekday()) % 7
    share = np.where(weekdays >= 5, 1.3, 1.0) * rng.uniform(0.9, 1.1, settings.num_days)
    return rng.multinomial(settings.num_events, share / share.sum())


def _with_bots(
    events: Events, bots: Int64, world: World, day: int, settings: SimulateSettings, rng: Generator
) -> Events:
    """Add the clicks of today's bots, on any item, all day."""
    lengths = rng.integers(*BOT_EVENTS, len(bots))
    number = int(lengths.sum())
    return Events(
        np.concatenate([events.user, np.repeat(bots, lengths)]),
        np.concatenate([events.item, rng.integers(0, len(world.item_ids), number)]),
        np.concatenate([events.time, midnight(settings, day) + rng.integers(0, DAY_US, number)]),
    )


def _as_table(events: Events, world: World, day: int, settings: SimulateSettings, rng: Generator) -> pa.Table:
    """The day's events in our schema, some of them on items that no catalogue knows."""
    number = len(events.user)
    unknown = rng.random(number) < settings.orphan_share
    known_ids = world.item_ids.take(pa.array(events.item))
    orphan_ids = ids("x", max(1, settings.num_items // 20), 6)
    strange = orphan_ids.take(pa.array(rng.integers(0, len(orphan_ids), number)))
    types = rng.choice(len(EVENT_TYPES), number, p=TYPE_SHARES)
    value = np.select([types == 3, types == 0], [rng.lognormal(3.0, 0.6, number), rng.exponential(40.0, number)], 1.0)
    columns = [
        world.user_ids.take(pa.array(events.user)),
        pc.if_else(pa.array(unknown), strange, known_ids),
        pa.array(events.time).cast(schema.TIMESTAMP),
        pa.array(EVENT_TYPES).take(pa.array(types)),
        pa.array(np.round(value, 2).astype(np.float32)),
        ids(f"e{day:04d}-", number, 8),
    ]
    return pa.Table.from_arrays(columns, schema=schema.interactions(pa.string(), pa.string()))


def _deliveries(table: pa.Table, settings: SimulateSettings, rng: Generator) -> Iterator[tuple[int, pa.Table]]:
    """Split the day's events by how many partitions late they come; some events are delivered twice."""
    number = table.num_rows
    delay = np.where(rng.random(number) < settings.late_share, rng.integers(1, 4, number), 0)
    repeated = np.flatnonzero(rng.random(number) < settings.repeated_share)
    again = delay[repeated] + rng.integers(0, 2, len(repeated))
    rows = np.concatenate([np.arange(number), repeated])
    delays = np.concatenate([delay, again])
    yield 0, table.slice(0, 0)  # every day has a partition
    for days in np.unique(delays):
        yield int(days), table.take(pa.array(rows[delays == days]))
