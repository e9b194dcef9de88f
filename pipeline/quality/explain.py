"""Why a user was shown what they were shown, and why an item was not: from a night's artifacts, by exact search.

Shapes: N items, H events of the user's history, K items of a list.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch.nn import functional as F

from pipeline.data.columns import Mask, mask_of, numpy_of
from pipeline.data.histories import Bucket, user_bucket
from pipeline.data.lists import NO_ITEM, Float32, Int32, Int64
from pipeline.data.seen import hides_in
from pipeline.errors import InputError
from pipeline.io.artifacts import read_file
from pipeline.io.checkpoint import load_model
from pipeline.io.corpus import open_corpus, read_shard, shard_entries
from pipeline.io.histories import read_bucket, read_items
from pipeline.io.night import Night
from pipeline.io.parquet import read_parquet_bytes
from pipeline.io.publication.units import units_of
from pipeline.quality.exact_list import ExactList
from pipeline.quality.explanation import Explanation, Seen, Shown
from pipeline.quality.promises import Rows, flatten
from pipeline.quality.report import item_name
from pipeline.retrieval.brute_force import brute_force
from pipeline.settings import Settings
from pipeline.stages.encode import encode_queries
from pipeline.stages.memory import bonus_source
from pipeline.stages.queries import Requested
from pipeline.stages.query_batch import QueryBatch
from pipeline.stages.row_rules import RowRules
from pipeline.stages.rules import TonightsRules, needs_bonus
from pipeline.stages.user_rules import UserRulesSource

LAST_EVENTS = 10
NUM_PAIRS = 3  # of components, with the largest weights of the gate
NUM_NEAREST = 2  # events of the history, by the cosine of the items' embeddings


@dataclass(frozen=True)
class _OneUser:
    """A `QuerySource`: one user of a bucket, with the whole history."""

    row: int
    part: str = "whole"

    def select(self, unit: int, bucket: Bucket) -> Requested:
        return Requested(bucket.user_ids.slice(self.row, 1), np.array([self.row]))


@dataclass(frozen=True)
class _Found:
    """The user's place in the artifacts."""

    user_id: pa.Scalar
    ids: pa.Array  # of this user alone
    unit: int
    bucket: Bucket
    row: int  # in the bucket; -1 for a user without a history

    @property
    def history(self) -> Int32:
        """The items of the user's events, oldest first."""
        return self.bucket.cut("whole").take(np.array([self.row]))[0]

    @property
    def num_events(self) -> int:
        return len(self.history)


def explain(night: Night, settings: Settings, user: str, item: str | None, num_best: int) -> Explanation:
    """Explain the list of a user, and what became of an item. Ids are given as text.

    Raises InputError for a user or an item that the night does not know, and when the night has no corpus yet.
    """
    items = read_items(night.storage, night.histories)
    found = _find(night, settings, user)
    account, published = _published(night, found)
    if account is None and found.row < 0:
        raise InputError(f"user {user!r}: neither a history nor a row of the accounting has this id on {night.ds}")
    item_row = None if item is None else _row_of(items, item)
    batch, rows_N, scores_N = _exact_list(night, settings, found, len(items))
    filters = _filters(night, settings, found, batch)
    published_rows = numpy_of(pc.index_in(published, items["item_id"].combine_chunks())).astype(np.int64)
    exact = ExactList.of(night, settings, rows_N, scores_N)
    why = None
    if item_row is not None:
        why = _why(item_row, filters, exact, published_rows, account)
    return Explanation(
        user_id=found.user_id.as_py(),
        user_status=account["status"] if account else "not in the run",
        reason=account["reason"] if account else "",
        num_events=int(found.num_events),
        last_events=_last_events(found, items),
        num_items=len(items),
        hidden={name: int(mask_N.sum()) for name, mask_N in filters.items()},
        num_shown=int((~np.any(list(filters.values()), axis=0)).sum()),
        best=_best(night, items, found, batch, rows_N[:num_best], scores_N[:num_best], published_rows),
        num_published=len(published_rows),
        num_common=len(np.intersect1d(exact.listed, published_rows)),
        item=None if item_row is None else _names(items, np.array([item_row]))[0],
        why=why,
    )


def _find(night: Night, settings: Settings, user: str) -> _Found:
    user_type = read_bucket(night.storage, night.histories, 0).user_ids.type
    user_id = _id_of(user, user_type, "user")
    ids = pa.array([user_id.as_py()], user_type)
    unit = int(user_bucket(ids, settings.output.num_buckets)[0])
    bucket = read_bucket(night.storage, night.histories, unit)
    row = pc.index(bucket.user_ids, user_id).as_py()
    return _Found(user_id, ids, unit, bucket, row)


def _id_of(text: str, kind: pa.DataType, what: str) -> pa.Scalar:
    try:
        return pa.scalar(text, pa.string()).cast(kind)
    except pa.ArrowInvalid:
        raise InputError(f"{what} {text!r}: the ids of this night are {kind}") from None


def _row_of(items: pa.Table, item: str) -> int:
    ids = items["item_id"].combine_chunks()
    row: int = pc.index(ids, _id_of(item, ids.type, "item")).as_py()
    if row < 0:
        raise InputError(f"item {item!r}: not in the catalogue of this night, which has {len(ids):,} items")
    return row


def _published(night: Night, found: _Found) -> tuple[dict[str, Any] | None, pa.Array]:
    """The user's row of the accounting, and the items of their list; no row before jobs/retrieve.py has run."""
    sidecar = units_of(night.storage, night.run).read(found.unit)
    item_type = read_items(night.storage, night.histories, ["item_id"])["item_id"].type
    if sidecar is None:
        return None, pa.array([], item_type)
    candidates, users = (
        read_parquet_bytes(
            read_file(night.storage, night.run.table_prefix, file, "run jobs/retrieve.py again"),
            f"{night.storage.uri}/{night.run.table_prefix}/{file.key}",
        )
        for file in sidecar.files
    )
    accounts = users.filter(pc.equal(users["user_id"], found.user_id)).to_pylist()
    rows = flatten(candidates) if "item_ids" in candidates.column_names else Rows.of(candidates)
    is_of_user = mask_of(pc.equal(rows.user_ids, found.user_id))
    return (accounts[0] if accounts else None), rows.item_ids.filter(pa.array(is_of_user))


def _filters(night: Night, settings: Settings, found: _Found, batch: QueryBatch | None) -> dict[str, Mask]:
    """(N,) what each filter hides from the user, whatever the others hide."""
    is_eligible_N = mask_of(read_items(night.storage, night.histories, ["is_eligible"])["is_eligible"])
    is_seen_N = np.zeros(len(is_eligible_N), dtype=bool)
    is_seen_N[found.bucket.seen("whole").take(np.array([found.row]))[0]] = True
    filters = {"seen by the user": is_seen_N, "hidden by the catalogue": ~is_eligible_N}
    every_item = np.arange(len(is_eligible_N))
    broken = RowRules(night, settings).broken(found.unit, found.ids, np.zeros_like(every_item), every_item)
    for promise, is_broken_N in broken:
        filters[promise.partition(" ")[0]] = is_broken_N
    needs_bonus_N = needs_bonus(night)
    if needs_bonus_N is not None:
        is_unknown_N = needs_bonus_N.numpy().copy()
        if batch is not None and batch.bonuses is not None:
            is_unknown_N[batch.bonuses.rows[0]] = False
        filters["unknown to the model that was taken over"] = is_unknown_N
    return filters


def _exact_list(
    night: Night, settings: Settings, found: _Found, num_items: int
) -> tuple[QueryBatch | None, Int64, Float32]:
    """The user's query, and all items that they may be shown, best first, with their scores; empty without a query."""
    if found.num_events == 0:
        return None, np.empty(0, np.int64), np.empty(0, np.float32)
    model = load_model(night.storage, night.checkpoint)
    batch = encode_queries(model, found.bucket, _OneUser(found.row), found.unit, bonus_source(night, settings))
    if not len(batch.excluded):
        return None, np.empty(0, np.int64), np.empty(0, np.float32)
    batch = replace(batch, rules=UserRulesSource(night, settings)(found.unit, batch.user_ids))
    rules = TonightsRules(night, settings).for_queries(batch.excluded, batch.bonuses, batch.rules_of_queries)
    corpus = open_corpus(night.storage, night.corpus)
    shards = (read_shard(night.storage, night.corpus, entry) for entry in shard_entries(corpus))
    scores_1N, rows_1N = brute_force(model.mol, batch.queries, shards, rules, num_items)
    is_item = rows_1N[0] != NO_ITEM
    return batch, rows_1N[0][is_item], scores_1N[0][is_item]


@torch.inference_mode()
def _best(
    night: Night,
    items: pa.Table,
    found: _Found,
    batch: QueryBatch | None,
    rows_K: Int64,
    scores_K: Float32,
    published_rows: Int64,
) -> tuple[Shown, ...]:
    if batch is None or not len(rows_K):
        return ()
    model = load_model(night.storage, night.checkpoint)
    rows = torch.from_numpy(rows_K)
    pairs = model.mol.pairs(batch.queries, model.item_side(rows))
    history = torch.from_numpy(found.history.astype(np.int64)).unique()
    vectors_KE, vectors_HE = (F.normalize(model.item_embedding(each), dim=-1) for each in (rows, history))
    nearest_KH = (vectors_KE @ vectors_HE.T).topk(min(NUM_NEAREST, len(history)), dim=1).indices
    names, of_history = _names(items, rows_K), _names(items, history.numpy())
    bonuses = dict.fromkeys(rows_K.tolist(), 0.0)
    if batch.bonuses is not None:
        bonuses |= dict(zip(batch.bonuses.rows[0].tolist(), batch.bonuses.amounts.tolist(), strict=True))
    places = {int(row): rank for rank, row in enumerate(published_rows, start=1)}
    num_item_components = model.settings.mol.num_item_components
    shown = []
    for place, row in enumerate(rows_K.tolist()):
        weights, which = pairs.gates_BNP[0, place].topk(min(NUM_PAIRS, pairs.gates_BNP.shape[-1]))
        logits_P = pairs.logits_BNP[0, place]
        parts = tuple(
            (f"{pair // num_item_components}x{pair % num_item_components}", weight, float(logits_P[pair]))
            for pair, weight in zip(which.tolist(), weights.tolist(), strict=True)
        )
        nearest = tuple(of_history[each] for each in nearest_KH[place].tolist())
        shown.append(
            Shown(
                rank=place + 1,
                item_id=items["item_id"][row].as_py(),
                item=names[place],
                score=float(scores_K[place]),
                counts=bonuses[row],
                pairs=parts,
                nearest=nearest,
                published_rank=places.get(row),
            )
        )
    return tuple(shown)


def _why(
    row: int,
    filters: Mapping[str, Mask],
    exact: ExactList,
    published_rows: Int64,
    account: Mapping[str, Any] | None,
) -> str:
    """What became of an item, in one sentence."""
    rows_N = exact.rows_N
    hiding = [name for name, mask_N in filters.items() if mask_N[row]]
    if row in published_rows:
        return f"it is published, at rank {int(np.flatnonzero(published_rows == row)[0]) + 1}"
    if row not in rows_N:
        if hiding:
            return "it is " + " and ".join(_in_words(name) for name in hiding)
        return f"the user has no query: {account['reason'] if account else 'no history'}"
    place = int(np.flatnonzero(rows_N == row)[0])
    score = exact.scores_N[place]
    standing = f"by exact search it has rank {place + 1:,} of {len(rows_N):,}, with a score of {score:.4f}"
    if row not in exact.listed:
        return f"{standing}; {exact.why_not(row, place)}"
    shown = f"among the {len(exact.listed)} that are shown"
    if account is None:
        return f"{standing}, {shown}: there is no list of the user yet, run jobs/retrieve.py"
    return f"{standing}, {shown}: the approximate search has lost it (search.method: exact finds it)"


def _in_words(name: str) -> str:
    return f"hidden by {name}" if name.startswith("rules.") else name


def _last_events(found: _Found, items: pa.Table) -> tuple[Seen, ...]:
    if found.row < 0:
        return ()
    first, end = int(found.bucket.offsets[found.row]), int(found.bucket.offsets[found.row + 1])
    last = slice(max(first, end - LAST_EVENTS), end)
    days = [datetime.fromtimestamp(ts / 1e6, UTC).date().isoformat() for ts in found.bucket.event_ts[last].tolist()]
    is_hidden = hides_in(found.bucket.hides[last], "whole").tolist()
    names = _names(items, found.bucket.item_rows[last].astype(np.int64))
    return tuple(Seen(*event) for event in zip(days, names, is_hidden, strict=True))


def _names(items: pa.Table, rows: Int64) -> list[str]:
    columns = [name for name in ("item_id", "title", "category") if name in items.column_names]
    return [item_name(row["item_id"], row) for row in items.select(columns).take(pa.array(rows)).to_pylist()]
