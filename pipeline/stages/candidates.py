"""The published tables of a unit: candidates and the accounting of users.

R requested users, B queries, C cold users (without a history), L lists, K items.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.columns import Mask, mask_of, numpy_of
from pipeline.data.lists import NO_ITEM, Float32, Int64, Lists, offsets_of, ranges
from pipeline.evaluation.popularity import rank_by_popularity
from pipeline.io.histories import read_bucket, read_items
from pipeline.io.night import Night
from pipeline.io.publication.units import write_unit
from pipeline.retrieval.list_rules import in_words
from pipeline.retrieval.topk import TopK
from pipeline.schema import MOL, POPULAR
from pipeline.schema import candidates as long_schema
from pipeline.schema import nested_candidates as nested_schema
from pipeline.schema import users as users_schema
from pipeline.settings import Settings
from pipeline.stages.item_columns import published_columns
from pipeline.stages.list_rules import read_list_rules
from pipeline.stages.lists import depths
from pipeline.stages.poison import FAILED
from pipeline.stages.query_batch import NO_HISTORY, NOT_FINITE, SEARCHED, QueryBatch, UserRules
from pipeline.stages.rules import TonightsRules

FALLBACK = "no history: the most popular items"

Notes = npt.NDArray[np.object_]  # of strings


@dataclass(frozen=True)
class Results:
    """The lists of a unit, one after the other, in ascending order of their users."""

    users: Int64  # (L,): the user of each list, as an index into the requested ones
    sources: npt.NDArray[np.object_]  # (L,): what made each list, MOL or POPULAR
    num_returned: Int64  # (L,): the length of each list
    item_rows: Int64  # (sum of num_returned,)
    scores: Float32  # (sum of num_returned,)

    @staticmethod
    def of(users: Int64, source: str, rows_LK: Int64, scores_LK: Float32) -> "Results":
        """Drop the padding of the lists."""
        is_item_LK = rows_LK != NO_ITEM
        num_returned = is_item_LK.sum(axis=1).astype(np.int64)
        sources = np.full(len(users), source, dtype=object)
        return Results(users, sources, num_returned, rows_LK[is_item_LK], scores_LK[is_item_LK])

    def joined(self, others: "Results") -> "Results":
        """The lists of both, whose users differ."""
        users = np.concatenate([self.users, others.users])
        lengths = np.concatenate([self.num_returned, others.num_returned])
        order = np.argsort(users)
        values = ranges(offsets_of(lengths)[:-1][order], lengths[order])
        return Results(
            users[order],
            np.concatenate([self.sources, others.sources])[order],
            lengths[order],
            np.concatenate([self.item_rows, others.item_rows])[values],
            np.concatenate([self.scores, others.scores])[values],
        )


class CandidateSink:
    """Writes a unit's candidates and accounting into tonight's run."""

    def __init__(self, night: Night, settings: Settings) -> None:
        self._night, self._settings = night, settings
        self._rules = TonightsRules(night, settings)
        of_lists = settings.rules.are_of_lists
        self._list_rules = read_list_rules(night, settings, of_scores=False) if of_lists else None
        items = read_items(night.storage, night.histories, ["item_id", "num_events"])
        columns = published_columns(night, settings)
        fields = [items.schema.field("item_id"), *columns.schema]
        self._published = pa.Table.from_arrays([items["item_id"], *columns.columns], schema=pa.schema(fields))
        # The published score of a popular item. The order follows what is published, so it is rounded first.
        self._popularity_N = numpy_of(items["num_events"]).astype(np.float32)

    def write(self, unit: int, batch: QueryBatch, result: TopK) -> None:
        """Write the unit's two tables and, after them, its sidecar."""
        results = Results.of(batch.searched, MOL, result.rows_BK.numpy(), result.scores_BK.numpy())
        notes = np.full(len(batch.user_ids), "", dtype=object)
        if batch.notes is not None:
            notes[batch.searched] = batch.notes.to_numpy(zero_copy_only=False)
        num_seen, num_hidden = (np.zeros(len(batch.user_ids), dtype=np.int32) for _ in range(2))
        num_seen[batch.searched] = batch.excluded.lengths
        num_hidden[batch.searched] = self._rules.num_hidden(batch.excluded, batch.bonuses, batch.rules_of_queries)
        cold = np.flatnonzero(mask_of(pc.equal(batch.reasons, NO_HISTORY)))
        if len(cold) and self._settings.queries.cold_users == "fallback":
            seen = self._seen_by(batch.user_ids.take(pa.array(cold)), unit)
            of_cold = None if batch.rules is None else batch.rules.take(cold)
            popular, notes[cold] = self._popular(cold, seen, of_cold)
            results = results.joined(popular)
            num_seen[cold], num_hidden[cold] = seen.lengths, self._rules.num_not_eligible(seen, of_cold)
        table = nested_table if self._settings.output.layout == "nested" else long_table
        candidates = table(batch.user_ids, results, self._published, self._night, self._settings)
        certificates = Certificates.of(result)
        k = self._settings.search.k
        users = users_table(batch, results, certificates, num_seen, num_hidden, notes, self._night, k)
        statuses = {entry["values"]: entry["counts"] for entry in pc.value_counts(users["status"]).to_pylist()}
        num_candidates, backends = len(results.item_rows), tuple(sorted(batch.backends))
        write_unit(self._night.storage, self._night.run, unit, candidates, users, num_candidates, statuses, backends)

    def _seen_by(self, user_ids: pa.Array, unit: int) -> Lists:
        """(C,) what users without a history have seen all the same, in events that were set aside."""
        bucket = read_bucket(self._night.storage, self._night.histories, unit)
        rows = pc.fill_null(pc.index_in(user_ids, bucket.user_ids), -1)
        return bucket.seen("whole").take(numpy_of(rows).astype(np.int64))

    def _popular(self, users: Int64, seen: Lists, of_users: UserRules | None) -> tuple[Results, Notes]:
        """The most popular items for each of these users, who have seen other items, (C,) all three; and (C,) notes."""
        k, popularity_N, num_items = self._settings.search.k, self._popularity_N, len(self._popularity_N)

        def popular(depth: int) -> Int64:
            def ranking(_: Int64, hidden: Lists, is_shown_N: Mask) -> Int64:
                return rank_by_popularity(popularity_N, hidden, depth, is_shown_N)

            return self._rules.rank(seen, of_users, depth, ranking)

        if self._list_rules is None:
            rows_CK, notes_C = popular(k), np.full(len(users), "", dtype=object)
        else:
            for depth in (planned := depths(self._settings.rules, k, num_items)):
                rows_CM = popular(depth)
                scores_CM = np.where(rows_CM == NO_ITEM, np.float32(-np.inf), popularity_N[rows_CM])
                chosen = self._list_rules.choose(scores_CM, rows_CM, k, depth == planned[-1])
                if not chosen.is_open_B.any():
                    break
            rows_CK = chosen.rows_of(rows_CM)
            is_whole_C = (rows_CM[:, -1] == NO_ITEM) | (depth == num_items)
            notes_C = np.array(in_words(self._list_rules, chosen, is_whole_C, depth), dtype=object)
        return Results.of(users, POPULAR, rows_CK, popularity_N[rows_CK]), notes_C


@dataclass(frozen=True)
class Certificates:
    """How far each list can be from the list of exact search (`schema.users`)."""

    is_proven: npt.NDArray[np.bool_]  # (B,)
    max_gap: Float32  # (B,); +inf without a bound

    @staticmethod
    def of(result: TopK) -> "Certificates":
        return Certificates(result.is_proven_B.numpy(), result.gaps_B.numpy())


def long_table(user_ids: pa.Array, results: Results, items: pa.Table, night: Night, settings: Settings) -> pa.Table:
    """The candidates with one row per user and item (`schema.candidates`); `user_ids` are the requested users, `items`
    the ids of the items and what is published beside them."""
    num_rows = len(results.scores)
    starts = offsets_of(results.num_returned)[:-1]
    ranks = np.arange(1, num_rows + 1) - np.repeat(starts, results.num_returned)
    item_ids, *others = _of_items(items, results)
    columns = [
        user_ids.take(pa.array(np.repeat(results.users, results.num_returned))),
        pa.array(ranks.astype(np.int32)),
        item_ids,
        pa.array(results.scores),
        *_provenance(np.repeat(results.sources, results.num_returned), night, settings),
        *others,
    ]
    return pa.Table.from_arrays(columns, schema=long_schema(user_ids.type, item_ids.type, list(items.schema)[1:]))


def _of_items(items: pa.Table, results: Results) -> list[pa.Array]:
    """The columns of `items` for all items of the lists, one after the other."""
    rows = pa.array(results.item_rows)
    return [column.combine_chunks().take(rows) for column in items.columns]


def nested_table(user_ids: pa.Array, results: Results, items: pa.Table, night: Night, settings: Settings) -> pa.Table:
    """The candidates with one row of lists per user; users without an item have no row (`schema.nested_candidates`)."""
    item_ids, *others = _of_items(items, results)
    schema = nested_schema(user_ids.type, item_ids.type, list(items.schema)[1:])
    has_items = results.num_returned > 0
    offsets = pa.array(offsets_of(results.num_returned[has_items]).astype(np.int32))
    columns = [
        user_ids.take(pa.array(results.users[has_items])),
        pa.ListArray.from_arrays(offsets, item_ids, type=schema.field("item_ids").type),
        pa.ListArray.from_arrays(offsets, pa.array(results.scores), type=schema.field("scores").type),
        *_provenance(results.sources[has_items], night, settings),
        *(
            pa.ListArray.from_arrays(offsets, values, type=schema.field(name).type)
            for name, values in zip(items.column_names[1:], others, strict=True)
        ),
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def users_table(
    batch: QueryBatch,
    results: Results,
    certificates: Certificates,
    num_seen: npt.NDArray[np.int32],
    num_hidden: npt.NDArray[np.int32],
    notes: Notes,
    night: Night,
    k: int,
) -> pa.Table:
    """The accounting: one row per requested user (`schema.users`), who has seen `num_seen` items; a rule hides
    `num_hidden` others; `notes` say what the rules for lists have left open, or ""; (R,) each.

    Status: ok (k items), short (fewer items than k may be shown), fallback (popular items, for want of a history),
    skipped (no history, or left out by `prepare`) or error (no finite query, or the search for it failed).
    """
    num_users, searched = len(batch.user_ids), batch.searched
    num_returned = np.zeros(num_users, dtype=np.int32)
    num_returned[results.users] = results.num_returned
    is_fallback = np.zeros(num_users, dtype=bool)
    is_fallback[results.users[results.sources == POPULAR]] = True
    is_proven, max_gap = np.zeros(num_users, dtype=bool), np.full(num_users, np.inf, dtype=np.float32)
    is_proven[searched], max_gap[searched] = certificates.is_proven, certificates.max_gap
    is_searched = pc.equal(batch.reasons, SEARCHED)
    is_short = pc.and_(is_searched, pc.less(pa.array(num_returned), k))
    has_failed = pc.or_(pc.equal(batch.reasons, NOT_FINITE), pc.starts_with(batch.reasons, FAILED))
    shortage = pc.binary_join_element_wise("only", pa.array(num_returned).cast(pa.string()), "items may be shown", " ")
    noted = pa.array(notes, pa.string())
    has_note = pc.not_equal(noted, "")
    fallback = pc.if_else(has_note, pc.binary_join_element_wise(FALLBACK, noted, "; "), FALLBACK)
    cases = pc.make_struct(pa.array(is_fallback), is_short, is_searched, has_failed)
    columns = [
        batch.user_ids,
        pc.case_when(cases, "fallback", "short", "ok", "error", "skipped"),
        pa.array(num_returned),
        pa.array(num_seen),
        pa.array(num_hidden),
        pc.case_when(
            pc.make_struct(pa.array(is_fallback), has_note, is_short), fallback, noted, shortage, batch.reasons
        ),
        pa.array(is_proven),
        pa.array(max_gap, mask=np.isinf(max_gap)),
        pa.repeat(pa.scalar(night.ds, pa.date32()), num_users),
        pa.repeat(night.run.run_id, num_users),
    ]
    return pa.Table.from_arrays(columns, schema=users_schema(batch.user_ids.type))


def _provenance(sources: npt.NDArray[np.object_], night: Night, settings: Settings) -> list[pa.Array]:
    """The columns source, surface, ds, model_version and run_id, one entry for each of the sources."""
    return [
        pa.array(sources, pa.string()),
        pa.repeat(settings.output.surface, len(sources)),
        pa.repeat(pa.scalar(night.ds, pa.date32()), len(sources)),
        pa.repeat(night.checkpoint.id, len(sources)),
        pa.repeat(night.run.run_id, len(sources)),
    ]
