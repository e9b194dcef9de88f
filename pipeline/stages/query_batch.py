"""The queries of a unit on their way through the shards, and their form between processes.

R requested users, B queries, G groups of users, W numbers per query.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from pipeline.data.columns import Mask, mask_of
from pipeline.data.lists import Int64, Lists
from pipeline.model.mol import QuerySide
from pipeline.retrieval.bonuses import Bonuses
from pipeline.retrieval.topk import TopK

SEARCHED = ""
NO_HISTORY = "no history"
NOT_FINITE = "the query is not a finite number"


@dataclass(frozen=True)
class UserRules:
    """What tonight's rules say of each of U users, who are in G groups."""

    groups: pa.Table  # (G,): the group's values in the query columns that conditions compare
    group_of_U: Int64
    blocked: Lists  # (U,): item rows that a rule hides from this user alone, distinct

    def take(self, users: Int64) -> "UserRules":
        """The rules of the given users, in the given order."""
        return UserRules(self.groups, self.group_of_U[users], self.blocked.take(users))

    @staticmethod
    def concat(parts: Sequence["UserRules"]) -> "UserRules":
        """Join the users of one or more parts, one part after the other; groups are not merged."""
        firsts = np.cumsum([0, *(part.groups.num_rows for part in parts[:-1])])
        return UserRules(
            pa.concat_tables([part.groups for part in parts]),
            np.concatenate([part.group_of_U + first for part, first in zip(parts, firsts, strict=True)]),
            Lists.concat(part.blocked for part in parts),
        )


@dataclass(frozen=True)
class QueryBatch:
    """The requested users of one unit, and a query for each user that can be searched for, in the same order."""

    user_ids: pa.Array  # (R,) string or int64, ascending; in an evaluation of memory twice
    reasons: pa.Array  # (R,) string: why the user has no query; SEARCHED if there is one
    queries: QuerySide  # (B,)
    excluded: Lists  # (B,): item rows
    backends: frozenset[str] = frozenset()  # names of the backends that have searched for these queries so far
    bonuses: Bonuses | None = None  # (B,)
    rules: UserRules | None = None  # of the requested users; None: no rule reads the query or names a user
    # (B,) string: why a query could not be searched for, "" where it could; None: all could.
    failures: pa.Array | None = None
    # (B,) string: why a list is short, or what it owes; not sent between processes. None: no rule is of whole lists.
    notes: pa.Array | None = None

    @property
    def rules_of_queries(self) -> UserRules | None:
        """The rules of each query's user; (B,)."""
        return None if self.rules is None else self.rules.take(self.searched)

    @property
    def searched(self) -> npt.NDArray[np.int64]:
        """Each query's user, as an index into `user_ids`; (B,)."""
        return np.flatnonzero(pc.equal(self.reasons, SEARCHED).to_numpy(zero_copy_only=False))

    @property
    def is_sound(self) -> Mask:
        """Whether no search for the query has failed so far; (B,)."""
        if self.failures is None:
            return np.ones(len(self.excluded), dtype=bool)
        return mask_of(pc.equal(self.failures, ""))

    def failing(self, reasons: Mapping[int, str]) -> "QueryBatch":
        """The same queries, of which those at these places have failed too."""
        if not reasons:
            return self
        failures = np.full(len(self.excluded), "", dtype=object)
        if self.failures is not None:
            failures[:] = self.failures.to_pylist()
        failures[list(reasons)] = list(reasons.values())
        return replace(self, failures=pa.array(failures, pa.string()))

    def without_failures(self) -> "QueryBatch":
        """The same users, of which those whose query has failed have the reason for it instead."""
        if self.failures is None:
            return self
        sound = np.flatnonzero(self.is_sound)
        reasons = np.array(self.reasons.to_pylist(), dtype=object)
        reasons[self.searched] = self.failures.to_pylist()  # "" is SEARCHED
        return replace(
            self,
            reasons=pa.array(reasons, pa.string()),
            queries=self.queries.take(torch.from_numpy(sound)),
            excluded=self.excluded.take(sound),
            bonuses=None if self.bonuses is None else self.bonuses.take(sound),
            failures=None,
            notes=None if self.notes is None else self.notes.take(pa.array(sound)),
        )

    @property
    def searched_user_ids(self) -> pa.Array:
        """Each query's user; (B,)."""
        return self.user_ids.take(pa.array(self.searched))

    def and_without_bonuses(self) -> "QueryBatch":
        """The same users twice: first all with their bonuses, then all without."""
        assert self.bonuses is not None
        without = Bonuses.none(len(self.bonuses), self.bonuses.num_items)
        return QueryBatch(
            pa.concat_arrays([self.user_ids, self.user_ids]),
            pa.concat_arrays([self.reasons, self.reasons]),
            QuerySide.cat([self.queries, self.queries]),
            Lists.concat([self.excluded, self.excluded]),
            self.backends,
            Bonuses.concat([self.bonuses, without]),
            None if self.rules is None else UserRules.concat([self.rules, self.rules]),
        )


def encode_batch(batch: QueryBatch, running: TopK) -> pa.Buffer:
    """The batch and its running top-k as bytes: Arrow streams of the requested users, of the queries, and of the groups
    of users where there are rules."""
    users = pa.record_batch({"user_id": batch.user_ids, "reason": batch.reasons, **_rule_columns(batch.rules)})
    components_BQD = batch.queries.components_BQD
    queries = pa.record_batch(
        {
            "components": _to_lists(components_BQD.flatten(1), pa.float32()),
            "gate": _to_lists(batch.queries.gate_BP, pa.float32()),
            "excluded": pa.LargeListArray.from_arrays(batch.excluded.offsets, batch.excluded.values),
            **_bonus_columns(batch.bonuses),
            **({} if batch.failures is None else {"failure": batch.failures}),
            **topk_columns(running),
        }
    ).replace_schema_metadata(
        {
            "num_components": str(components_BQD.shape[1]),
            **backends_metadata(batch.backends),
            **_bonus_metadata(batch.bonuses),
        }
    )
    sink = pa.BufferOutputStream()
    for part in (users, queries):
        with pa.ipc.new_stream(sink, part.schema) as stream:
            stream.write_batch(part)
    if batch.rules is not None:
        with pa.ipc.new_stream(sink, batch.rules.groups.schema) as stream:
            stream.write_table(batch.rules.groups)
    return sink.getvalue()


def decode_batch(payload: pa.Buffer | bytes) -> tuple[QueryBatch, TopK]:
    """The inverse of `encode_batch`, on the CPU."""
    source = pa.BufferReader(payload)
    (users,) = pa.ipc.open_stream(source)
    (queries,) = pa.ipc.open_stream(source)
    groups = pa.ipc.open_stream(source).read_all() if "group" in users.schema.names else None
    num_components = int(queries.schema.metadata[b"num_components"])
    components_BQD = _to_tensor(queries["components"]).unflatten(1, (num_components, -1))
    batch = QueryBatch(
        users["user_id"],
        users["reason"],
        QuerySide(components_BQD, _to_tensor(queries["gate"])),
        _lists(queries["excluded"]),
        backends_in(queries.schema),
        _bonuses_in(queries),
        None if groups is None else UserRules(groups, users["group"].to_numpy().copy(), _lists(users["blocked"])),
        queries["failure"] if "failure" in queries.schema.names else None,
    )
    return batch, topk_from_columns(queries)


def backends_metadata(backends: frozenset[str]) -> dict[str, str]:
    """The names of backends as metadata of a schema."""
    return {"backends": json.dumps(sorted(backends))}


def backends_in(schema: pa.Schema) -> frozenset[str]:
    """The inverse of `backends_metadata`; empty for a file of a version that kept no names."""
    return frozenset(json.loads((schema.metadata or {}).get(b"backends", b"[]")))


def topk_columns(running: TopK) -> dict[str, pa.Array]:
    """The running top-k as columns: lists of scores, lists of item rows (int32), and bounds."""
    return {
        "scores": _to_lists(running.scores_BK, pa.float32()),
        "rows": _to_lists(running.rows_BK.int(), pa.int32()),
        "bound": pa.array(running.bounds_B.cpu().numpy()),
    }


def topk_from_columns(columns: pa.RecordBatch | pa.Table) -> TopK:
    """The inverse of `topk_columns`."""
    bounds_B = torch.from_numpy(columns["bound"].to_numpy().copy())
    return TopK(_to_tensor(columns["scores"]), _to_tensor(columns["rows"]).long(), bounds_B)


def _rule_columns(rules: UserRules | None) -> dict[str, pa.Array]:
    """The rules of users as columns, without the groups; no column where there are none."""
    if rules is None:
        return {}
    blocked = pa.LargeListArray.from_arrays(rules.blocked.offsets, rules.blocked.values)
    return {"group": pa.array(rules.group_of_U, pa.int64()), "blocked": blocked}


def _bonus_columns(bonuses: Bonuses | None) -> dict[str, pa.Array]:
    """The bonuses as columns; no column where there are none."""
    if bonuses is None:
        return {}
    return {
        "bonus_rows": pa.LargeListArray.from_arrays(bonuses.rows.offsets, bonuses.rows.values),
        "bonus_amounts": pa.LargeListArray.from_arrays(bonuses.rows.offsets, bonuses.amounts),
    }


def _bonus_metadata(bonuses: Bonuses | None) -> dict[str, str]:
    return {} if bonuses is None else {"num_bonus_items": str(bonuses.num_items)}


def _bonuses_in(queries: pa.RecordBatch) -> Bonuses | None:
    """The inverse of `_bonus_columns` and `_bonus_metadata`."""
    if "bonus_rows" not in queries.schema.names:
        return None
    amounts = queries["bonus_amounts"].values.to_numpy().copy()
    return Bonuses(_lists(queries["bonus_rows"]), amounts, int(queries.schema.metadata[b"num_bonus_items"]))


def _lists(column: pa.LargeListArray) -> Lists:
    return Lists(column.offsets.to_numpy().copy(), column.values.to_numpy().copy())


def _to_lists(values_BW: Tensor, kind: pa.DataType) -> pa.FixedSizeListArray:
    flat = pa.array(values_BW.cpu().contiguous().numpy().reshape(-1), type=kind)
    return pa.FixedSizeListArray.from_arrays(flat, values_BW.shape[1])


def _to_tensor(lists: pa.FixedSizeListArray | pa.ChunkedArray) -> Tensor:
    """The lists as a (B, W) tensor; copied, because the memory of a payload may be read-only."""
    array = lists.combine_chunks() if isinstance(lists, pa.ChunkedArray) else lists
    return torch.from_numpy(array.flatten().to_numpy().copy()).reshape(len(array), array.type.list_size)
