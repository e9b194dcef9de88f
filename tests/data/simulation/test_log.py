from collections import Counter, defaultdict
from datetime import date

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from pipeline import schema
from pipeline.data.simulation.log import simulate_days, simulate_items, simulated_prefix
from pipeline.data.simulation.tastes import first_day, make_world
from pipeline.settings import SimulateSettings

SETTINGS = SimulateSettings(
    num_users=400, num_items=300, num_events=30_000, num_days=12, num_tastes=10, bot_share=0.005
)


@pytest.fixture(scope="module")
def days() -> list[tuple[date, pa.Table]]:
    return list(simulate_days(SETTINGS))


@pytest.fixture(scope="module")
def events(days) -> pa.Table:
    return pa.concat_tables(table for _, table in days)


def test_the_same_seed_gives_the_same_log(days):
    again = list(simulate_days(SETTINGS))
    assert [day for day, _ in again] == [day for day, _ in days]
    assert all(one.equals(other) for (_, one), (_, other) in zip(days, again, strict=True))
    assert simulate_items(SETTINGS).equals(simulate_items(SETTINGS))


def test_another_seed_gives_another_log(days):
    other = SETTINGS.model_copy(update={"seed": 1})
    assert not next(iter(simulate_days(other)))[1].equals(days[0][1])
    assert simulated_prefix(other) != simulated_prefix(SETTINGS)


def test_there_is_a_partition_for_every_day_in_our_schema(days):
    assert [day for day, _ in days] == [date(2026, 11, 9 + i) for i in range(12)]
    for _, table in days:
        assert table.schema.equals(schema.interactions(pa.string(), pa.string()))
        assert table.num_rows > 0
        assert not any(column.null_count for column in table.columns)


def test_the_people_make_exactly_the_events_that_were_asked_for(events):
    bots = bot_users(events)
    distinct = events.group_by("event_id").aggregate([("user_id", "min")])
    of_people = pc.invert(pc.is_in(distinct["user_id_min"], value_set=pa.array(bots)))
    own = pc.sum(of_people).as_py()
    assert len(bots) == 2
    # a bot is a person on its other days, so its few events of those are missing here
    assert SETTINGS.num_events - 1_000 < own <= SETTINGS.num_events


def bot_users(events: pa.Table) -> list[str]:
    days = pc.floor_temporal(events["event_ts"], unit="day")
    counts = events.append_column("day", days).group_by(["user_id", "day"]).aggregate([([], "count_all")])
    return pc.unique(counts.filter(pc.greater(counts["count_all"], 2_000))["user_id"]).to_pylist()


def test_some_events_come_twice_and_late_and_on_unknown_items(days, events):
    repeated = 1 - len(pc.unique(events["event_id"])) / events.num_rows
    assert 0.5 * SETTINGS.repeated_share < repeated < 2 * SETTINGS.repeated_share
    delays = Counter()
    for day, table in days:
        event_days = table["event_ts"].cast(pa.timestamp("us")).cast(pa.date32(), safe=False)
        delays.update((day - event_day).days for event_day in event_days.to_pylist())
    late = sum(number for delay, number in delays.items() if delay > 0) / events.num_rows
    assert min(delays) == 0
    assert max(delays) <= 4  # three partitions late, and then once more
    assert 0.5 * SETTINGS.late_share < late < 3 * SETTINGS.late_share
    known = pc.is_in(events["item_id"], value_set=simulate_items(SETTINGS)["item_id"].combine_chunks())
    orphans = 1 - pc.sum(known).as_py() / events.num_rows
    assert 0.5 * SETTINGS.orphan_share < orphans < 2 * SETTINGS.orphan_share


def test_cold_users_and_items_appear_in_the_last_days_only(days):
    world = make_world(SETTINGS)
    cold_items = set(world.item_ids.filter(pa.array(world.item_birth > 0)).to_pylist())
    cold_users = set(world.user_ids.filter(pa.array(world.user_birth > 0)).to_pylist())
    assert len(cold_items) == 15
    assert len(cold_users) == 20
    bots = set(bot_users(pa.concat_tables(table for _, table in days)))  # click whatever is going to exist
    early = pa.concat_tables(table for _, table in days[:10])
    early = early.filter(pc.invert(pc.is_in(early["user_id"], value_set=pa.array(sorted(bots)))))
    assert not cold_items & set(early["item_id"].to_pylist())
    assert not cold_users & set(early["user_id"].to_pylist())
    late = pa.concat_tables(table for _, table in days[10:])
    assert len(cold_items & set(late["item_id"].to_pylist())) > 5
    assert len(cold_users & set(late["user_id"].to_pylist())) > 5


def test_the_last_item_tells_far_more_than_popularity(events):
    """The next item among the ten that most often follow the last one, against the ten most popular."""
    people = events.filter(pc.invert(pc.is_in(events["user_id"], value_set=pa.array(bot_users(events)))))
    people = people.sort_by([("user_id", "ascending"), ("event_ts", "ascending")])
    users, items = people["user_id"].to_pylist(), people["item_id"].to_pylist()
    pairs = [(items[i - 1], items[i], i) for i in range(1, len(items)) if users[i] == users[i - 1]]
    cut = len(pairs) // 2
    follows, popular = defaultdict(Counter), Counter(items[:cut])
    for last, following, _ in pairs[:cut]:
        follows[last][following] += 1
    best = {item for item, _ in popular.most_common(10)}
    by_last = np.mean([following in dict(follows[last].most_common(10)) for last, following, _ in pairs[cut:]])
    by_popularity = np.mean([following in best for _, following, _ in pairs[cut:]])
    assert by_last > 3 * by_popularity
    assert by_last > 0.4


def test_popularity_has_a_long_tail(events):
    counts = np.sort([count for _, count in Counter(events["item_id"].to_pylist()).items()])[::-1]
    assert counts[:30].sum() > 0.2 * counts.sum()  # a tenth of the items
    assert counts[-150:].sum() < 0.3 * counts.sum()  # half of them


def test_a_catalogue_row_can_be_read_by_a_person():
    items = simulate_items(SETTINGS)
    assert items["item_id"].to_pylist() == [f"i{n:06d}" for n in range(300)]
    first = items.slice(0, 1).to_pylist()[0]
    assert first["title"] == "Nordic Noir 1"
    assert first["category"] == "Crime"
    assert set(first["markets"]) <= {"DK", "FI", "NO", "SE", "DE", "US"}
    assert first["price"] > 0
    assert len(set(items["title"].to_pylist())) == 300
    assert items["available_until"].null_count > 0


def test_more_tastes_than_genres_become_seasons():
    settings = SimulateSettings(num_users=10, num_items=100, num_events=100, num_days=2, num_tastes=60)
    assert len(set(simulate_items(settings)["title"].to_pylist())) == 100


@pytest.mark.parametrize(
    "changes",
    [
        {"num_days": 1},
        {"num_users": 1},
        {"num_items": 1},
        {"num_tastes": 500},
        {"num_events": 3},
        {"cold_share": 1.0},
        {"late_share": 1.0, "repeated_share": 1.0},
        {"orphan_share": 1.0},
    ],
)
def test_extreme_settings_still_give_every_day(changes):
    settings = SimulateSettings(**{"num_users": 20, "num_items": 15, "num_events": 300, "num_days": 5} | changes)
    tables = [table for _, table in simulate_days(settings)]
    assert len(tables) == settings.num_days
    assert sum(table.num_rows for table in tables) >= settings.num_events
    for number, table in enumerate(tables):
        latest = pc.max(table["event_ts"]).as_py()
        assert latest is None or (latest.date() - first_day(settings)).days <= number
