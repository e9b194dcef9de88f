"""Catalogues: the simulated one, and the index that numbers the items of a night."""

from datetime import UTC, date, datetime, time, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import schema
from pipeline.data.columns import decode_text, id_type
from pipeline.data.interactions import Int64
from pipeline.errors import InputError

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
COUNTS = ("num_events", "num_train_events", "num_validation_events")
MARKETS = ("DK", "FI", "NO", "SE", "DE", "US")


def simulated_items(
    item_ids: pa.Array, taste_of_item: Int64, first_item: Int64, births: Int64, first_day: date, seed: int
) -> pa.Table:
    """One row per item in ascending order of id; the title tells the taste, and the place in its series."""
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
    places = (np.arange(number) - first_item[taste_of_item] + 1).tolist()
    return pa.table(
        {
            "item_id": item_ids,
            "title": [
                f"{genre} {place}" if season == 1 else f"{genre} {season}.{place}"
                for (genre, _), season, place in zip(named, series, places, strict=True)
            ],
            "category": [category for _, category in named],
            "brand": pa.array(BRANDS).take(pa.array(rng.integers(0, len(BRANDS), number))),
            "created_at": pa.array(created, schema.TIMESTAMP),
            "status": pa.array(np.where(rng.random(number) < 0.98, "active", "retired")),
            "available_from": pa.array(created, schema.TIMESTAMP),
            "available_until": pa.array(until, schema.TIMESTAMP),
            "markets": pa.array(
                [[m for m, here in zip(MARKETS, row, strict=True) if here] for row in in_market.tolist()]
            ),
            "price": pa.array(np.round(rng.lognormal(2.3, 0.5, number), 2).astype(np.float32)),
        }
    )


def index_catalogue(catalogue: pa.Table, item_type: pa.DataType, origin: str) -> pa.Table:
    """The catalogue in ascending order of `item_id`, which comes first and has the log's type.

    Raises InputError for ids that are missing, null, doubled, or of another type than the log's.
    """
    if "item_id" not in catalogue.column_names:
        raise InputError(f"{origin}: no column 'item_id'; the catalogue has {', '.join(catalogue.column_names)}")
    ids = catalogue["item_id"].combine_chunks()
    if id_type(ids.type, "as_is", "item_id") != item_type:
        raise InputError(
            f"{origin}: item_id is {ids.type} in the catalogue but {item_type} in the log; "
            f"set item_id_type in the source, or cast one of them"
        )
    ids = decode_text(ids)[0].cast(item_type)
    if ids.null_count:
        raise InputError(f"{origin}: {ids.null_count} items have no item_id, or one that is no UTF-8; remove them")
    taken = set(COUNTS) & set(catalogue.column_names)
    if taken:
        raise InputError(f"{origin}: column {min(taken)!r} has a name that the item index needs; rename it")
    order = pc.sort_indices(ids)
    ids = ids.take(order)
    doubled = pc.equal(ids.slice(1), ids.slice(0, max(0, len(ids) - 1)))
    if pc.any(doubled).as_py():
        example = ids.filter(pc.equal(pa.concat_arrays([pa.array([False]), doubled]), True))[0].as_py()
        raise InputError(f"{origin}: item_id {example!r} occurs more than once; keep one row per item")
    attributes = catalogue.drop_columns(["item_id"])
    fields = [pa.field("item_id", item_type, nullable=False), *attributes.schema]
    columns = [pa.chunked_array([ids]), *(column.take(order) for column in attributes.columns)]
    return pa.Table.from_arrays(columns, schema=pa.schema(fields))


def items_table(catalogue: pa.Table, counts: Int64) -> pa.Table:
    """The item index (`schema.items`): the indexed catalogue with `counts`, (3, items) in the order of COUNTS."""
    attributes = tuple(field for field in catalogue.schema if field.name != "item_id")
    wanted = schema.items(catalogue.schema.field("item_id").type, attributes)
    columns = [catalogue["item_id"], *(pa.array(row) for row in counts), *(catalogue[f.name] for f in attributes)]
    return pa.Table.from_arrays(
        [pa.chunked_array([c]) if isinstance(c, pa.Array) else c for c in columns], schema=wanted
    )
