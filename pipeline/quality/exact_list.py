"""The list that exact search makes for one user, and why an item is not in it. N items that the user may be shown."""

from dataclasses import dataclass

import numpy as np

from pipeline.data.lists import NO_ITEM, Float32, Int64
from pipeline.io.night import Night
from pipeline.retrieval.list_rules import ListRules
from pipeline.settings import Settings
from pipeline.stages.list_rules import read_list_rules


@dataclass(frozen=True)
class ExactList:
    """All that the user may be shown, best first, and the list that exact search makes of it."""

    rows_N: Int64
    scores_N: Float32
    listed: Int64  # item rows
    rules: ListRules
    depth: int  # the number of the best that the list is chosen from

    @staticmethod
    def of(night: Night, settings: Settings, rows_N: Int64, scores_N: Float32) -> "ExactList":
        k = settings.search.k
        if not settings.rules.are_of_lists or not len(rows_N):
            return ExactList(rows_N, scores_N, rows_N[:k], ListRules(), len(rows_N))
        rules, depth = read_list_rules(night, settings), max(k, min(settings.rules.max_depth, len(rows_N)))
        rows_1M, scores_1M = rows_N[None, :depth], scores_N[None, :depth]
        listed = rules.choose(scores_1M, rows_1M, k, is_whole=True).rows_of(rows_1M)[0]
        return ExactList(rows_N, scores_N, listed[listed != NO_ITEM], rules, depth)

    def why_not(self, row: int, place: int) -> str:
        """Why an item is not in the list that exact search makes."""
        rules, listed = self.rules, self.listed
        if rules.min_score is not None and self.scores_N[place] < rules.min_score:
            return f"rules.min_score is {rules.min_score:g}"
        for quota in rules.quotas:
            for value in quota.values[row].tolist():
                if sum(value in quota.values[each] for each in listed.tolist()) >= quota.most:
                    return f"the list has {quota.most} items with the same value already ({quota.name})"
        if place >= self.depth:
            return f"the list is chosen from the best {self.depth:,}"
        last = self.scores_N[np.flatnonzero(self.rows_N == listed[-1])[0]]
        if last < self.scores_N[place]:
            asking = [need.name for need in rules.needs] + (["rules.diversity"] if rules.diversity else [])
            return f"its place went to others ({', '.join(asking)})"
        return f"the last of the {len(listed)} that are shown has {last:.4f}"
