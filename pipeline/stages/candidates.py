"""The published tables of a unit: candidates and the accounting of users. R requested users, B queries, K items."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.lists import NO_ITEM, Int64
from pipeline.io.histories import read_item_ids
from pipeline.io.night import Night
from pipeline.io.publication.units import write_unit
from pipeline.retrieval.topk import TopK
from pipeline.schema import candidates as long_schema
from pipeline.schema import nested_candidates as nested_schema
from pipeline.schema import users as users_schema
from pipeline.settings import Settings
from pipeline.stages.query_batch import NOT_FINITE, SEARCHED, QueryBatch
from pipeline.stages.rules import TonightsRules

SOURCE = "mol"


@dataclass(frozen=True)
class Results:
    """The lists of a unit, one after the other."""

    num_returned: npt.NDArray[np.int64]  # (B,): the length of each list
    item_ids: pa.Array  # (sum of num_returned,)
    scores: npt.NDArray[np.float32]  # (sum of num_returned,)


class CandidateSink:
    """Writes a unit's candidates and accounting into tonight's run."""

    def __init__(self, night: Night, settings: Settings) -> None:
        self._night, self._settings = night, settings
        self._item_ids = read_item_ids(night.storage, night.histories)
        self._rules = TonightsRules(night)

    def write(self, unit: int, batch: QueryBatch, result: TopK) -> None:
        results = to_results(result, self._item_ids)
        layout = nested_table if self._settings.output.layout == "nested" else long_table
        candidates = layout(batch, results, self._night, self._settings)
        num_hidden = self._rules.num_hidden(batch.excluded, batch.bonuses)
        users = users_table(batch, results, Certificates.of(result), num_hidden, self._night, self._settings.search.k)
        statuses = {entry["values"]: entry["counts"] for entry in pc.value_counts(users["status"]).to_pylist()}
        num_candidates, backends = len(results.item_ids), tuple(sorted(batch.backends))
        write_unit(self._night.storage, self._night.run, unit, candidates, users, num_candidates, statuses, backends)


@dataclass(frozen=True)
class Certificates:
    """How far each list can be from the list of exact search (`schema.users`)."""

    is_proven: npt.NDArray[np.bool_]  # (B,)
    max_gap: npt.NDArray[np.float32]  # (B,); +inf without a bound

    @staticmethod
    def of(result: TopK) -> "Certificates":
        return Certificates(result.is_proven_B.numpy(), result.gaps_B.numpy())


def to_results(result: TopK, item_ids: pa.Array) -> Results:
    """Drop the padding of the lists and turn item rows into item ids."""
    is_item_BK = (result.rows_BK != NO_ITEM).numpy()
    rows = result.rows_BK.numpy()[is_item_BK]
    num_returned = is_item_BK.sum(axis=1).astype(np.int64)
    return Results(num_returned, item_ids.take(pa.array(rows)), result.scores_BK.numpy()[is_item_BK])


def long_table(batch: QueryBatch, results: Results, night: Night, settings: Settings) -> pa.Table:
    """The candidates with one row per user and item (`schema.candidates`)."""
    num_rows = len(results.scores)
    starts = np.cumsum(results.num_returned) - results.num_returned
    ranks = np.arange(1, num_rows + 1) - np.repeat(starts, results.num_returned)
    queries = pa.array(np.repeat(np.arange(len(results.num_returned)), results.num_returned))
    columns = [
        batch.searched_user_ids.take(queries),
        pa.array(ranks.astype(np.int32)),
        results.item_ids,
        pa.array(results.scores),
        *_provenance(night, settings, num_rows),
    ]
    return pa.Table.from_arrays(columns, schema=long_schema(batch.user_ids.type, results.item_ids.type))


def nested_table(batch: QueryBatch, results: Results, night: Night, settings: Settings) -> pa.Table:
    """The candidates with one row of lists per user; users without an item have no row (`schema.nested_candidates`)."""
    schema = nested_schema(batch.user_ids.type, results.item_ids.type)
    has_items = results.num_returned > 0
    offsets = pa.array(np.concatenate([[0], np.cumsum(results.num_returned[has_items])]).astype(np.int32))
    columns = [
        batch.searched_user_ids.filter(pa.array(has_items)),
        pa.ListArray.from_arrays(offsets, results.item_ids, type=schema.field("item_ids").type),
        pa.ListArray.from_arrays(offsets, pa.array(results.scores), type=schema.field("scores").type),
        *_provenance(night, settings, int(has_items.sum())),
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def users_table(
    batch: QueryBatch, results: Results, certificates: Certificates, num_hidden: Int64, night: Night, k: int
) -> pa.Table:
    """The accounting: one row per requested user (`schema.users`); a rule hides `num_hidden` items from each query.

    Status: ok (k items), short (fewer items than k may be shown), skipped (no history, or left out by `prepare`) or
    error (no finite query).
    """
    num_users, searched = len(batch.user_ids), batch.searched
    num_returned, num_seen, num_by_rule = (np.zeros(num_users, dtype=np.int32) for _ in range(3))
    num_returned[searched] = results.num_returned
    num_seen[searched] = batch.excluded.lengths
    num_by_rule[searched] = num_hidden
    is_proven, max_gap = np.zeros(num_users, dtype=bool), np.full(num_users, np.inf, dtype=np.float32)
    is_proven[searched], max_gap[searched] = certificates.is_proven, certificates.max_gap
    is_searched = pc.equal(batch.reasons, SEARCHED)
    is_short = pc.and_(is_searched, pc.less(pa.array(num_returned), k))
    shortage = pc.binary_join_element_wise("only", pa.array(num_returned).cast(pa.string()), "items may be shown", " ")
    status = pc.case_when(
        pc.make_struct(is_short, is_searched, pc.equal(batch.reasons, NOT_FINITE)), "short", "ok", "error", "skipped"
    )
    columns = [
        batch.user_ids,
        status,
        pa.array(num_returned),
        pa.array(num_seen),
        pa.array(num_by_rule),
        pc.if_else(is_short, shortage, batch.reasons),
        pa.array(is_proven),
        pa.array(max_gap, mask=np.isinf(max_gap)),
        pa.repeat(pa.scalar(night.ds, pa.date32()), num_users),
        pa.repeat(night.run.run_id, num_users),
    ]
    return pa.Table.from_arrays(columns, schema=users_schema(batch.user_ids.type))


def _provenance(night: Night, settings: Settings, num_rows: int) -> list[pa.Array]:
    """The columns source, surface, ds, model_version and run_id."""
    return [
        pa.repeat(SOURCE, num_rows),
        pa.repeat(settings.output.surface, num_rows),
        pa.repeat(pa.scalar(night.ds, pa.date32()), num_rows),
        pa.repeat(night.checkpoint.id, num_rows),
        pa.repeat(night.run.run_id, num_rows),
    ]
