"""Judging published rows by tonight's rules, one by one: the check of what the search has made of the rules.

Shapes: R rows, each of a user and an item.
"""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.columns import Mask, mask_of
from pipeline.data.histories import user_bucket
from pipeline.data.ids import rows_among
from pipeline.data.lists import Float32, Int64
from pipeline.data.predicates import holds_for_pairs
from pipeline.io.night import Night
from pipeline.settings import Settings
from pipeline.stages.list_rules import read_list_rules
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


class PublishedLists:
    """Judges published lists by tonight's rules for lists: by sorting and grouping their rows."""

    def __init__(self, night: Night, settings: Settings) -> None:
        self._rules = read_list_rules(night, settings, of_scores=False) if settings.rules.are_of_lists else None
        self._min_score = settings.rules.min_score
        self._values = [
            pl.DataFrame({"item": quota.values.owners, "value": quota.values.values})
            for quota in (self._rules.quotas if self._rules else ())
        ]

    def broken(self, users: pa.Table, user_R: Int64, item_R: Int64, score_R: Float32) -> Iterator[tuple[str, Mask]]:
        """For each rule a promise in words, and whether a row's list breaks it: row r is of row `user_R[r]` of the
        accounting `users`, with item row `item_R[r]`."""
        if self._rules is None:
            return
        rows = pl.DataFrame({"user": user_R, "item": item_R})
        for quota, values in zip(self._rules.quotas, self._values, strict=True):
            same = rows.with_row_index("row").join(values, on="item").with_columns(pl.len().over("user", "value"))
            is_broken = np.zeros(len(rows), dtype=bool)
            is_broken[same.filter(pl.col("len") > quota.most)["row"].to_numpy()] = True
            yield f"{quota.name}: at most {quota.most} items of a list have the same value", is_broken
        for need in self._rules.needs:
            found = np.bincount(user_R, weights=need.fulfils_N[item_R], minlength=users.num_rows).astype(np.int64)
            said = [f"{count} of {need.least} items for {need.name}" for count in found.tolist()]
            is_said = [words in reason for words, reason in zip(said, users["reason"].to_pylist(), strict=True)]
            is_broken_U = (found < need.least) & ~np.array(is_said, dtype=bool)
            yield (
                f"{need.name}: {need.least} items of a list fulfil it, or the reason says how many",
                is_broken_U[user_R],
            )
        if self._min_score is not None:
            is_searched_U = mask_of(pc.not_equal(users["status"], "fallback"))
            too_low = is_searched_U[user_R] & ~(score_R >= np.float32(self._min_score))
            yield f"rules.min_score: no score is below {self._min_score:g}", too_low


def _by_bucket(user_ids: pa.Array, num_buckets: int) -> list[pa.Array]:
    """The places of the users of each bucket."""
    buckets = user_bucket(user_ids, num_buckets)
    order = np.argsort(buckets, kind="stable")
    bounds = np.searchsorted(buckets[order], np.arange(num_buckets + 1))
    return [pa.array(order[low:high]) for low, high in pairwise(bounds)]
