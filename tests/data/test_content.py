"""Features of a catalogue: worked out by hand, and laws."""

import zlib
from datetime import date

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.content import features_of
from pipeline.errors import InputError
from pipeline.settings import ContentSettings

ITEMS = pl.DataFrame(
    {
        "brand": ["a", None, "b", ""],
        "genres": [["x", "y"], ["x"], [], None],
        "title": ["The Cat, the CAT", "Über 9", None, "--"],
        "price": [0.0, 15.0, -15.0, float("nan")],
        "live": [True, False, None, True],
        "day": [date(2026, 11, 20), None, None, date(2026, 11, 21)],
        "pair": [{"a": 1}, {"a": 2}, None, None],
    }
)


def hashes(*texts: str, size: int = 16_384) -> list[int]:
    return sorted({zlib.crc32(text.encode()) % size for text in texts})


def test_features_worked_out_by_hand():
    settings = ContentSettings(values=("brand", "genres", "live", "day"), words=("title",), numbers=("price",))
    found = [row.tolist() for row in map(features_of(ITEMS, settings).__getitem__, range(4))]
    assert found == [
        hashes("brand=a", "genres=x", "genres=y", "title=the", "title=cat", "price=0", "live=true", "day=2026-11-20"),
        hashes("genres=x", "title=über", "title=9", "price=16", "live=false"),
        hashes("brand=b", "price=-16"),
        hashes("live=true", "day=2026-11-21"),
    ]


def test_numbers_are_in_intervals_that_grow():
    prices = pl.DataFrame({"price": [10.0, 11.0, 40.0, 41.0, 43.0, 1e9]})
    rows = features_of(prices, ContentSettings(numbers=("price",)))
    first = [int(rows[item][0]) for item in range(6)]
    assert first[3] == first[4]
    assert len({*first}) == 4 or len({*first}) == 5
    assert first[0] != first[2]


@given(st.lists(st.lists(st.sampled_from("abcde"), max_size=4), max_size=6), st.randoms())
def test_the_order_of_items_and_values_changes_nothing(values, random):
    settings = ContentSettings(values=("tags",), num_hashes=7)
    frame = pl.DataFrame({"tags": values}, schema={"tags": pl.List(pl.String)})
    features = features_of(frame, settings)
    order = random.sample(range(len(values)), len(values))
    mixed = [random.sample(values[item], len(values[item])) for item in order]
    again = features_of(pl.DataFrame({"tags": mixed}, schema=frame.schema), settings)
    for place, item in enumerate(order):
        assert again[place].tolist() == features[item].tolist()
        assert features[item].tolist() == hashes(*(f"tags={value}" for value in values[item]), size=7)


@pytest.mark.parametrize(
    ("key", "column", "said"),
    [
        ("words", "price", "model.content.words: the column item.price has values of the type Float64, not texts"),
        ("numbers", "title", "model.content.numbers: the column item.title has values of the type String, not numbers"),
        ("values", "pair", "model.content.values: the column item.pair has values of the type Struct"),
        ("words", "genres", "not texts"),
    ],
)
def test_a_column_of_another_kind_is_refused(key, column, said):
    with pytest.raises(InputError) as error:
        features_of(ITEMS, ContentSettings(**{key: (column,)}))
    assert said in str(error.value)
