"""Simulated items and users for a benchmark: users with several tastes, items with several aspects.

An item has one value of each aspect (say genre, author and theme). A value has a vector, which is near the vectors of
its family of values. A taste is one value of one aspect. A user follows a few tastes at once and takes popular items
that have the value, so the next item is near one taste and far from the others: the best items of a user with many
tastes have large single logits and ordinary mean logits.

The simulator of `pipeline/data/simulation` is another: it writes the raw log of a night, with times, bots and
duplicates; a market has item vectors instead, so that a model of 695,762 items can be trained in minutes.

N items, E width of an item row, A aspects.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pipeline.data.lists import Float32, Int64, Lists, offsets_of
from pipeline.errors import InputError

Float64 = npt.NDArray[np.float64]
Generator = np.random.Generator

VALUES_PER_FAMILY = 20
ROW_SCALE = 0.25  # standard deviation of an item row's entries
ELSEWHERE_SHARE = 0.08  # share of events that take any popular item, whatever the tastes
LENGTH_SHAPE = (1.2, 6.0)  # gamma: shape and scale of a history's length beyond the first event


@dataclass(frozen=True)
class MarketRecipe:
    """The numbers that make a market; the same recipe gives the same market."""

    num_items: int
    num_values: tuple[int, ...]  # number of values of each aspect
    aspect_shares: tuple[float, ...]  # the share of the tastes that are about each aspect
    max_tastes: int
    zipf_exponent: float = 0.9
    family_share: float = 0.4  # share of the variance of a value's vector that its family has in common
    own_share: float = 0.2  # share of the variance of an item's vector, in every aspect, that is its own
    dim: int = 64
    max_length: int = 16
    seed: int = 0


@dataclass(frozen=True)
class Aspect:
    """One value per item, and the items in the order of their values, with their cumulated popularity."""

    value_of_item_N: Int64
    items_N: Int64
    first_item: Int64  # position of each value's first item in `items_N`
    cumulated: Float64  # (N + 1,)

    def draw(self, values: Int64, draws: Float64) -> Int64:
        """Draw an item of each value by popularity; `draws` are uniform in [0, 1)."""
        low, high = self.cumulated[self.first_item[values]], self.cumulated[self.first_item[values + 1]]
        positions = np.searchsorted(self.cumulated, low + draws * (high - low), side="right") - 1
        return self.items_N[np.clip(positions, self.first_item[values], self.first_item[values + 1] - 1)]


@dataclass(frozen=True)
class Market:
    """Items with their vectors, and the distributions from which users draw them."""

    recipe: MarketRecipe
    rows_NE: Float32
    popularity: Float64  # (N + 1,), cumulated
    aspects: tuple[Aspect, ...]


def make_market(recipe: MarketRecipe) -> Market:
    """Draw popularity, aspects and item rows. Raises InputError for fewer items than an aspect has values."""
    if recipe.num_items < max(recipe.num_values):
        raise InputError(
            f"{recipe.num_items} items are too few for this market: give at least {max(recipe.num_values)}"
        )
    rng = np.random.default_rng([recipe.seed, 0])
    ranks_N = rng.permutation(recipe.num_items) + 1.0
    popularity_N = np.power(ranks_N, -recipe.zipf_exponent, dtype=np.float64)
    aspects = tuple(_aspect(num_values, popularity_N, rng) for num_values in recipe.num_values)
    return Market(recipe, _rows(recipe, popularity_N, aspects, rng), _cumulated(popularity_N), aspects)


def draw_histories(market: Market, num_users: int, stream: int) -> Lists:
    """Draw histories of new users, in which no item comes twice; another `stream` gives other users."""
    recipe = market.recipe
    rng = np.random.default_rng([recipe.seed, 1, stream])
    lengths = np.minimum(1 + rng.gamma(*LENGTH_SHAPE, num_users).astype(np.int64), recipe.max_length)
    num_tastes = rng.integers(1, recipe.max_tastes + 1, num_users)
    aspect_of_taste = rng.choice(len(market.aspects), (num_users, recipe.max_tastes), p=recipe.aspect_shares)
    seeds = _popular(market, rng.random(aspect_of_taste.shape))  # a taste begins with an item that somebody met
    rows = np.full((num_users, recipe.max_length), -1, dtype=np.int64)
    for event in range(recipe.max_length):
        taste = (rng.random(num_users) * num_tastes).astype(np.int64)
        users = np.arange(num_users)
        taken = _take(market, aspect_of_taste[users, taste], seeds[users, taste], rng)
        is_new = (rows != taken[:, None]).all(axis=1)
        rows[:, event] = np.where(is_new & (event < lengths), taken, -1)
    kept = rows >= 0
    return Lists(offsets_of(kept.sum(axis=1)), rows[kept].astype(np.int32))


def _take(market: Market, aspect_of_user: Int64, seeds: Int64, rng: Generator) -> Int64:
    """Draw one item for each user: of the value that the taste's seed has, or sometimes any popular item."""
    draws, chances = rng.random((2, len(seeds)))
    taken = _popular(market, rng.random(len(seeds)))
    for number, aspect in enumerate(market.aspects):
        chosen = np.flatnonzero((aspect_of_user == number) & (chances >= ELSEWHERE_SHARE))
        taken[chosen] = aspect.draw(aspect.value_of_item_N[seeds[chosen]], draws[chosen])
    return taken


def _popular(market: Market, draws: Float64) -> Int64:
    total = market.popularity[-1]
    items: Int64 = np.searchsorted(market.popularity, draws * total, side="right") - 1
    return items.clip(max=market.recipe.num_items - 1)


def _aspect(num_values: int, popularity_N: Float64, rng: Generator) -> Aspect:
    """Draw an aspect whose values have very different numbers of items, each at least one."""
    num_items = len(popularity_N)
    sizes = rng.lognormal(0.0, 0.8, num_values)
    drawn = rng.choice(num_values, num_items - num_values, p=sizes / sizes.sum())
    value_of_item_N = rng.permutation(np.concatenate([np.arange(num_values), drawn]))
    items_N = np.argsort(value_of_item_N, kind="stable")
    first_item = np.searchsorted(value_of_item_N[items_N], np.arange(num_values + 1))
    return Aspect(value_of_item_N, items_N, first_item, _cumulated(popularity_N[items_N]))


def _rows(recipe: MarketRecipe, popularity_N: Float64, aspects: Sequence[Aspect], rng: Generator) -> Float32:
    """Make item rows: each aspect in a subspace of its own, log popularity in one more dimension, all rotated."""
    width = (recipe.dim - 1) // len(aspects)
    parts = []
    for aspect in aspects:
        vectors = _value_vectors(int(aspect.value_of_item_N.max()) + 1, width, recipe.family_share, rng)
        own = rng.standard_normal((recipe.num_items, width), dtype=np.float32)
        shared = vectors[aspect.value_of_item_N]
        parts.append(np.sqrt(1 - recipe.own_share) * shared + np.sqrt(recipe.own_share) * own)
    spare = recipe.dim - 1 - width * len(aspects)
    logarithm_N = np.log(popularity_N)
    popular_N1 = ((logarithm_N - logarithm_N.mean()) / logarithm_N.std())[:, None].astype(np.float32)
    noise = rng.standard_normal((recipe.num_items, spare), dtype=np.float32)
    plain_NE = np.concatenate([*parts, popular_N1, noise], axis=1).astype(np.float32)
    rotation_EE = np.linalg.qr(rng.standard_normal((recipe.dim, recipe.dim)))[0].astype(np.float32)
    rows_NE: Float32 = ROW_SCALE * (plain_NE @ rotation_EE)
    return rows_NE


def _value_vectors(num_values: int, width: int, family_share: float, rng: Generator) -> Float32:
    families = rng.standard_normal((-(-num_values // VALUES_PER_FAMILY), width), dtype=np.float32)
    own = rng.standard_normal((num_values, width), dtype=np.float32)
    of_family = families[rng.integers(0, len(families), num_values)]
    vectors: Float32 = np.sqrt(family_share) * of_family + np.sqrt(1 - family_share) * own
    return vectors


def _cumulated(weights: Float64) -> Float64:
    return np.concatenate([[0.0], np.cumsum(weights)])
