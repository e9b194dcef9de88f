"""Judging published rows by tonight's rules, one by one: the check of what the search has made of the rules.

Shapes: R rows, each of a user and an item.
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import polars as pl
import pyarrow as pa

from pipeline.data.columns import Mask
from pipeline.data.histories import user_bucket
from pipeline.data.ids import rows_among
from pipeline.data.lists import Int64
from pipeline.data.predicates import holds_for_pairs
from pipeline.io.night import Night
from pipeline.settings import Settings
from pipeline.stages.night_rules import Attributes, NightRules


class RowRules:
    """Judges published rows one by one, to check what the masks and lists of the search have made of the rules."""

    def __init__(self, night: Night, settings: Settings) -> None:
        self._rules = NightRules.read(night, settings)
        num_buckets = settings.output.num_buckets
        self._attributes = Attributes.read(night, self._rules.conditions, num_buckets)
        # By rule, for a list that names users: the places of its rows by bucket.
        self._places = {
            block.name: _by_bucket(block.user_ids, num_buckets)
            for block in self._rules.blocks
            if block.user_ids is not None
        }

    def broken(self, unit: int, user_ids: pa.Array, user_R: Int64, item_R: Int64) -> Iterator[tuple[str, Mask]]:
        """For each rule a promise in words, and whether a row breaks it: row r is of user `user_ids[user_R[r]]`, of
        bucket `unit`, with item row `item_R[r]`."""
        users = self._attributes.of(unit, user_ids)
        queries = users.select(pl.all().gather(user_R))
        items = self._rules.items.select(pl.all().gather(item_R))
        for condition in self._rules.conditions:
            yield f"{condition.name} holds", ~holds_for_pairs(condition, items, queries, len(item_R))
        published = pl.DataFrame({"user": user_R, "item": item_R})
        for block in self._rules.blocks:
            blocked = {}
            item_ids = block.item_ids
            if block.user_ids is not None:
                places = self._places[block.name][unit]
                item_ids = item_ids.take(places)
                blocked["user"] = rows_among(block.user_ids.take(places), user_ids)
            blocked["item"] = rows_among(item_ids, self._rules.item_ids)
            known = pl.DataFrame(blocked).filter(pl.all_horizontal(pl.all() >= 0)).unique()
            is_blocked = published.with_row_index("row").join(known, on=list(blocked), how="semi")["row"].to_numpy()
            mask = np.zeros(len(item_R), dtype=bool)
            mask[is_blocked] = True
            yield f"rules.block.{block.name} does not block the item", mask


def _by_bucket(user_ids: pa.Array, num_buckets: int) -> list[pa.Array]:
    """The places of the users of each bucket."""
    buckets = user_bucket(user_ids, num_buckets)
    order = np.argsort(buckets, kind="stable")
    bounds = np.searchsorted(buckets[order], np.arange(num_buckets + 1))
    return [pa.array(order[low:high]) for low, high in pairwise(bounds)]
