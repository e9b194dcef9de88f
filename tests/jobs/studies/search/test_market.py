from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from jobs.studies.search.market import Market, MarketRecipe, draw_histories, make_market
from pipeline.errors import InputError

RECIPE = MarketRecipe(num_items=4_000, num_values=(10, 200), aspect_shares=(0.3, 0.7), max_tastes=3, dim=16)


@pytest.fixture(scope="module")
def market() -> Market:
    return make_market(RECIPE)


def test_the_same_recipe_gives_the_same_market_and_users(market: Market):
    again = make_market(RECIPE)
    np.testing.assert_array_equal(market.rows_NE, again.rows_NE)
    first, second = draw_histories(market, 50, stream=1), draw_histories(again, 50, stream=1)
    np.testing.assert_array_equal(first.values, second.values)
    other = draw_histories(market, 50, stream=2)
    assert first.values.tolist() != other.values.tolist()


def test_a_market_with_fewer_items_than_values_is_refused_with_the_way_out():
    with pytest.raises(InputError, match="150 items are too few for this market: give at least 200"):
        make_market(replace(RECIPE, num_items=150))


def test_histories_have_at_least_one_event_at_most_the_longest_and_no_item_twice(market: Market):
    histories = draw_histories(market, 500, stream=1)
    assert histories.lengths.min() >= 1
    assert 2 < histories.lengths.mean() < histories.lengths.max() == RECIPE.max_length
    assert histories.values.min() >= 0
    assert histories.values.max() < RECIPE.num_items
    for low, high in zip(histories.offsets[:-1], histories.offsets[1:], strict=True):
        assert len(set(histories.values[low:high].tolist())) == high - low


def test_every_value_has_items_and_a_draw_has_the_value_that_was_asked_for(market: Market):
    rng = np.random.default_rng(0)
    for aspect, num_values in zip(market.aspects, RECIPE.num_values, strict=True):
        assert set(aspect.value_of_item_N.tolist()) == set(range(num_values))
        values = rng.integers(0, num_values, 2_000)
        drawn = aspect.draw(values, rng.random(2_000))
        np.testing.assert_array_equal(aspect.value_of_item_N[drawn], values)
        edges = aspect.draw(np.arange(num_values), np.full(num_values, np.nextafter(1.0, 0.0)))
        np.testing.assert_array_equal(aspect.value_of_item_N[edges], np.arange(num_values))


def test_popular_items_are_taken_more_often(market: Market):
    taken = np.bincount(draw_histories(market, 5_000, stream=3).values, minlength=RECIPE.num_items)
    by_popularity = taken[np.argsort(-np.diff(market.popularity))]
    assert by_popularity[:400].sum() > 0.3 * taken.sum()  # a tenth of the items; one in ten without popularity
    assert by_popularity[-2_000:].sum() > 0.02 * taken.sum()  # and a long tail


def test_a_user_comes_back_to_the_same_values(market: Market):
    histories = draw_histories(market, 2_000, stream=4)
    values = market.aspects[1].value_of_item_N[histories.values]
    starts = histories.offsets[:-1][histories.lengths >= 2]
    same = (values[starts] == values[starts + 1]).mean()
    rng = np.random.default_rng(0)
    by_chance = (values == rng.permutation(values)).mean()
    assert same > 10 * by_chance


def test_items_with_a_value_in_common_lie_nearer_than_others(market: Market):
    rows_NE = market.rows_NE / np.linalg.norm(market.rows_NE, axis=1, keepdims=True)
    aspect = market.aspects[1]
    low, high = aspect.first_item[:-1], aspect.first_item[1:]
    pairs = [aspect.items_N[a : a + 2] for a, b in zip(low, high, strict=True) if b - a >= 2]
    alike = np.mean([rows_NE[a] @ rows_NE[b] for a, b in pairs])
    others = np.mean([rows_NE[a] @ rows_NE[b] for (a, _), (_, b) in pairwise(pairs)])
    assert alike > others + 0.2
