"""A small unit whose tables keep every promise, made row by row, and an audit that is slow and obvious."""

import math
import random
from dataclasses import dataclass
from datetime import date
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline import schema
from pipeline.data.histories import Bucket
from pipeline.data.lists import Lists
from pipeline.data.seen import IN_ALL_PARTS
from pipeline.quality.promises import Expected

DS = date(2026, 11, 20)
RUN_ID = "run-0123456789abcdef"
MODEL = "fedcba9876543210"
K = 4
NUM_ITEMS = 30
HIDDEN_ITEM = 17
VISIBLE_ITEMS = set(range(NUM_ITEMS)) - {HIDDEN_ITEM}

Row = dict[str, Any]


@dataclass(frozen=True)
class Unit:
    """Tables as rows, and what they are held against."""

    candidates: list[Row]
    users: list[Row]
    expected: Expected

    def tables(self) -> tuple[pa.Table, pa.Table]:
        types = self.expected.requested.type, self.expected.item_ids.type
        users = pa.Table.from_pylist(self.users, schema=schema.users(types[0]))
        if self.expected.layout == "long":
            return pa.Table.from_pylist(self.candidates, schema=schema.candidates(*types)), users
        return pa.Table.from_pylist(_nest(self.candidates), schema=schema.nested_candidates(*types)), users


def make_unit(
    layout: str = "long",
    ids: str = "string",
    seed: int = 0,
    num_users: int = 9,
    run_id: str = RUN_ID,
    model: str = MODEL,
    first_user: int = 0,
) -> Unit:
    """Users 0 to 7 have histories; 8 has none. User 1 has seen all but two items, user 2 everything."""
    rng = random.Random(seed)
    name_user, name_item = (
        ((lambda n: f"ü{first_user + n:03d}"), (lambda n: f"item {n:03d}"))
        if ids == "string"
        else ((lambda n: 2**53 + first_user + n), (lambda n: -5 + 7 * n))
    )
    histories = {user: rng.choices(range(NUM_ITEMS), k=rng.randrange(1, 12)) for user in range(8)}
    histories[1], histories[2] = list(range(2, NUM_ITEMS)), list(range(NUM_ITEMS))
    candidates: list[Row] = []
    users: list[Row] = []
    for user in range(num_users):
        scores = {item: float(np.float32(rng.choice([-0.5, 0.25, rng.random()]))) for item in range(NUM_ITEMS)}
        unseen = sorted(VISIBLE_ITEMS - set(histories.get(user, ())), key=lambda item: (-scores[item], item))
        best = unseen[:K] if user in histories else []
        provenance = {"source": "mol", "surface": "home", "ds": DS, "model_version": model, "run_id": run_id}
        for rank, item in enumerate(best, 1):
            row = {"user_id": name_user(user), "rank": rank, "item_id": name_item(item), "score": scores[item]}
            candidates.append(row | provenance)
        status = "skipped" if user not in histories else "ok" if len(best) == K else "short"
        users.append(
            {
                "user_id": name_user(user),
                "status": status,
                "num_returned": len(best),
                "num_seen_filtered": len(set(histories.get(user, ()))),
                "num_rule_filtered": 0,
                "reason": "" if status == "ok" else "because",
                "is_proven": status != "skipped" and user % 3 == 0,
                "max_gap": None if status == "skipped" or user % 3 == 1 else 0.0 if user % 3 == 0 else 0.25,
                "ds": DS,
                "run_id": run_id,
            }
        )
    id_type = pa.string() if ids == "string" else pa.int64()
    expected = Expected(
        requested=pa.array([name_user(user) for user in range(num_users)], id_type),
        histories=_bucket([name_user(user) for user in range(8)], [histories[user] for user in range(8)], id_type),
        item_ids=pa.array([name_item(item) for item in range(NUM_ITEMS)], id_type),
        is_eligible_N=np.arange(NUM_ITEMS) != HIDDEN_ITEM,
        k=K,
        layout=layout,  # type: ignore[arg-type]
        surface="home",
        ds=DS,
        model_version=model,
        run_id=run_id,
    )
    return Unit(candidates, users, expected)


def is_sound(unit: Unit) -> bool:
    """The promises of a unit in long layout, one row after the other."""
    expected = unit.expected
    index = {item: row for row, item in enumerate(expected.item_ids.to_pylist())}
    offsets, events = expected.histories.offsets, expected.histories.item_rows
    seen = {u: set(events[offsets[i] : offsets[i + 1]]) for i, u in enumerate(expected.histories.user_ids.to_pylist())}
    lists: dict[Any, list[Row]] = {}
    previous = None
    for row in unit.candidates:
        user = row["user_id"]
        if user != previous and user in lists:
            return False  # not together
        lists.setdefault(user, []).append(row)
        previous = user
        provenance = (row["surface"], row["ds"], row["model_version"], row["run_id"])
        if provenance != ("home", DS, MODEL, RUN_ID):
            return False
        if (
            row["item_id"] not in index
            or index[row["item_id"]] in seen.get(user, ())
            or not math.isfinite(row["score"])
        ):
            return False
    accounts = {row["user_id"]: row for row in unit.users}
    if len(accounts) != len(unit.users) or accounts.keys() != set(expected.requested.to_pylist()):
        return False
    if not lists.keys() <= accounts.keys():
        return False
    for user, rows in lists.items():
        source = "popular" if accounts[user]["status"] == "fallback" else "mol"
        if any(row["source"] != source for row in rows):
            return False
    for rows in lists.values():
        order = [(-row["score"], index[row["item_id"]]) for row in rows]
        if len({row["item_id"] for row in rows}) != len(rows) or order != sorted(order):
            return False
        if [row["rank"] for row in rows] != list(range(1, len(rows) + 1)):
            return False
    return all(_account_is_sound(row, len(lists.get(user, ()))) for user, row in accounts.items())


def _account_is_sound(row: Row, num_rows: int) -> bool:
    length_fits = {
        "ok": num_rows == K,
        "short": num_rows < K,
        "fallback": num_rows <= K,
        "skipped": num_rows == 0,
        "error": num_rows == 0,
    }
    return (
        (row["ds"], row["run_id"], row["num_returned"]) == (DS, RUN_ID, num_rows)
        and row["num_seen_filtered"] >= 0
        and row["num_rule_filtered"] >= 0
        and _certificate_is_sound(row)
        and length_fits.get(row["status"], False)
        and (bool(row["reason"]) or row["status"] == "ok")
    )


def _certificate_is_sound(row: Row) -> bool:
    if row["status"] in ("skipped", "error"):
        return not row["is_proven"] and row["max_gap"] is None
    if row["is_proven"]:
        return bool(row["max_gap"] == 0)
    return row["max_gap"] is None or 0 <= row["max_gap"] < math.inf


def _bucket(user_ids: list[Any], histories: list[list[int]], id_type: pa.DataType) -> Bucket:
    lengths = [len(history) for history in histories]
    num_events = sum(lengths)
    return Bucket(
        user_ids=pa.array(user_ids, id_type),
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        item_rows=np.array([item for history in histories for item in history], dtype=np.int32),
        event_ts=np.arange(num_events, dtype=np.int64),
        weights=np.ones(num_events, dtype=np.float32),
        hides=np.full(num_events, IN_ALL_PARTS, np.uint8),
        num_train=np.array(lengths, dtype=np.int32),
        num_validation=np.zeros(len(lengths), dtype=np.int32),
        left_out=pa.repeat("", len(lengths)),
        also_seen=Lists.empty(len(lengths)),
    )


def _nest(rows: list[Row]) -> list[Row]:
    nested: dict[Any, Row] = {}
    for row in rows:
        start = {key: value for key, value in row.items() if key not in ("rank", "item_id", "score")}
        one = nested.setdefault(row["user_id"], start | {"item_ids": [], "scores": []})
        one["item_ids"].append(row["item_id"])
        one["scores"].append(row["score"])
    return list(nested.values())
