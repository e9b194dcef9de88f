"""The simulated catalogue."""

from datetime import UTC, date, datetime, time, timedelta

import numpy as np
import pyarrow as pa

from pipeline import schema
from pipeline.data.lists import Int64

GENRES = (
    ("Nordic Noir", "Crime"),
    ("Space Opera", "Science Fiction"),
    ("Baking Duel", "Food"),
    ("Deep Ocean", "Nature"),
    ("Courtroom Drama", "Drama"),
    ("Heist Comedy", "Comedy"),
    ("Ancient Empires", "History"),
    ("Mountain Trails", "Travel"),
    ("Robot Adventures", "Children"),
    ("Jazz Nights", "Music"),
    ("Garden Makeover", "Home"),
    ("Street Football", "Sport"),
    ("Haunted House", "Horror"),
    ("Royal Court", "Drama"),
    ("Desert Western", "Western"),
    ("Silent Era", "Classics"),
    ("Kitchen Science", "Science"),
    ("Island Romance", "Romance"),
    ("Cold War Spies", "Thriller"),
    ("Dinosaur World", "Children"),
    ("Chess Masters", "Sport"),
    ("Night Trains", "Travel"),
    ("Dragon Saga", "Fantasy"),
    ("Backyard Stars", "Science"),
)

BRANDS = ("Aurora", "Bluebird", "Cedar", "Delta", "Ember", "Fjord", "Granite", "Harbour", "Iris", "Juniper")

MARKETS = ("DK", "FI", "NO", "SE", "DE", "US")


def simulated_items(
    item_ids: pa.Array, taste_of_item: Int64, first_item: Int64, births: Int64, first_day: date, seed: int
) -> pa.Table:
    """One row per item in ascending order of id; the title tells the taste and the episode."""
    rng = np.random.default_rng([seed, 2])
    number = len(item_ids)
    start = datetime.combine(first_day, time(), UTC)
    ages = np.where(births > 0, -births, rng.integers(30, 900, number))
    created = [start - timedelta(days=int(age)) for age in ages]
    leaves = rng.random(number) < 0.05
    until = [
        start + timedelta(days=400 + int(d)) if gone else None
        for gone, d in zip(leaves, rng.integers(0, 90, number), strict=True)
    ]
    in_market = rng.random((number, len(MARKETS))) < 0.8
    in_market[:, 0] |= ~in_market.any(axis=1)
    named = [GENRES[taste % len(GENRES)] for taste in taste_of_item.tolist()]
    series = [taste // len(GENRES) + 1 for taste in taste_of_item.tolist()]  # more tastes than genres: seasons
    episodes = (np.arange(number) - first_item[taste_of_item] + 1).tolist()
    return pa.table(
        {
            "item_id": item_ids,
            "title": [
                f"{genre} {episode}" if season == 1 else f"{genre} {season}.{episode}"
                for (genre, _), season, episode in zip(named, series, episodes, strict=True)
            ],
            "category": [category for _, category in named],
            "brand": pa.array(BRANDS).take(pa.array(rng.integers(0, len(BRANDS), number))),
            "created_at": pa.array(created, schema.TIMESTAMP),
            "status": pa.array(np.where(rng.random(number) < 0.98, "active", "retired")),
            "available_from": pa.array(created, schema.TIMESTAMP),
            "available_until": pa.array(until, schema.TIMESTAMP),
            "markets": pa.array(
                [[m for m, is_sold in zip(MARKETS, row, strict=True) if is_sold] for row in in_market.tolist()]
            ),
            "price": pa.array(np.round(rng.lognormal(2.3, 0.5, number), 2).astype(np.float32)),
        }
    )
