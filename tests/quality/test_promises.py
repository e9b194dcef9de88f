import copy
import dataclasses
import math
from collections.abc import Callable
from datetime import date
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings

from pipeline.errors import InvalidRunError
from pipeline.quality.promises import audit_unit, require_sound
from tests.quality.units import HIDDEN_ITEM, K, Row, Unit, is_sound, make_unit

Lie = Callable[[list[Row], list[Row]], object]


def audited(unit: Unit) -> list[str]:
    """The broken promises, in words."""
    return [str(violation) for violation in audit_unit(*unit.tables(), unit.expected).violations]


def with_lie(unit: Unit, lie: Lie) -> Unit:
    candidates, users = copy.deepcopy(unit.candidates), copy.deepcopy(unit.users)
    lie(candidates, users)
    return Unit(candidates, users, unit.expected)


@pytest.mark.parametrize("layout", ["long", "nested"])
@pytest.mark.parametrize("ids", ["string", "int64"])
@pytest.mark.parametrize("seed", range(5))
def test_a_sound_unit_passes_and_is_counted(layout: str, ids: str, seed: int) -> None:
    unit = make_unit(layout, ids, seed)
    audit = audit_unit(*unit.tables(), unit.expected)
    assert audit.violations == ()
    assert (audit.num_rows, audit.num_users) == (len(unit.candidates), 9)
    assert audit.statuses == {"ok": 6, "short": 2, "skipped": 1}
    require_sound(audit, "unit")


def setting(column: str, value: Any, row: int = 1) -> Lie:
    return lambda candidates, _: candidates[row].__setitem__(column, value)


def accounting(column: str, value: Any, row: int = 0) -> Lie:
    return lambda _, users: users[row].__setitem__(column, value)


def ties_in_the_wrong_order(candidates: list[Row], _: list[Row]) -> None:
    items = sorted([candidates[0]["item_id"], candidates[1]["item_id"]], reverse=True)
    for row, item in zip(candidates[:2], items, strict=True):
        row |= {"item_id": item, "score": 2.0}


LIES: dict[str, tuple[Lie, str]] = {
    "unknown item": (
        setting("item_id", "no such item"),
        "the item is in the item index: 1 times, first user ü000, rank 2",
    ),
    "seen item": (
        setting("item_id", "item 003", row=4),
        "the item is not one that the user has seen: 1 times, first user ü001",
    ),
    "hidden item": (
        setting("item_id", f"item {HIDDEN_ITEM:03d}"),
        "the catalogue lets the item be shown: 1 times, first user ü000, rank 2",
    ),
    "doubled item": (lambda c, _: c[1].update(item_id=c[0]["item_id"]), "an item is once in a list: 1 times"),
    "unknown user": (
        lambda c, _: [row.update(user_id="nobody") for row in c[:K]],
        "the user is in the accounting: 4 times",
    ),
    "score of NaN": (setting("score", math.nan), "scores are finite: 1 times, first user ü000, rank 2"),
    "infinite score": (setting("score", math.inf, row=0), "scores are finite"),
    "rising score": (setting("score", 9.0), "scores do not rise within a list: 1 times, first user ü000, rank 2"),
    "ties in the wrong order": (ties_in_the_wrong_order, "equal scores are in ascending order of item id: 1 times"),
    "a row is missing": (lambda c, _: c.pop(3), "num_returned is the length of the list: 1 times, first user ü000"),
    "a list is missing": (lambda c, _: c.__delitem__(slice(0, K)), "num_returned is the length of the list"),
    "another surface": (
        setting("surface", "elsewhere", row=0),
        "surface is home: 1 times, first user ü000, surface elsewhere",
    ),
    "another day": (setting("ds", date(2026, 11, 19), row=0), "ds is 2026-11-20"),
    "another model": (setting("model_version", "old", row=0), "model_version is fedcba9876543210"),
    "another run": (setting("run_id", "run-old", row=0), "run_id is run-0123456789abcdef"),
    "no source": (setting("source", "", row=0), "source is popular for users with the status fallback, mol for others"),
    "a popular item as the search's": (setting("source", "popular", row=0), "source is popular for users with the"),
    "a list of the search as a fallback": (
        lambda _, u: u[0].update(status="fallback", reason="x"),
        "source is popular for users with the status fallback, mol for others",
    ),
    "a user without account": (
        lambda _, u: u.pop(8),
        "every requested user is accounted for: 1 times, first user ü008",
    ),
    "an account nobody asked for": (
        lambda _, u: u.append(u[8] | {"user_id": "nobody"}),
        "only requested users are accounted for: 1 times, first user nobody",
    ),
    "a user with two accounts": (lambda _, u: u.append(dict(u[8])), "a user has one accounting row: 1 times"),
    "an unknown status": (accounting("status", "fine"), "the status is one of"),
    "a wrong number": (accounting("num_returned", 3), "num_returned is the length of the list"),
    "ok with a short list": (accounting("status", "ok", row=1), "ok means exactly 4 items: 1 times, first user ü001"),
    "short with a full list": (lambda _, u: u[0].update(status="short", reason="x"), "short means under 4"),
    "skipped with a list": (lambda _, u: u[0].update(status="skipped", reason="x"), "skipped and error have no list"),
    "short without a reason": (accounting("reason", "", row=1), "every status but ok has a reason"),
    "skipped without a reason": (accounting("reason", "", row=8), "every status but ok has a reason"),
    "a negative count": (accounting("num_seen_filtered", -1), "num_seen_filtered is not negative"),
    "proven with a gap": (accounting("max_gap", 0.5), "a proven list has a max_gap of 0: 1 times, first user ü000"),
    "proven with an unknown gap": (accounting("max_gap", None), "a proven list has a max_gap of 0"),
    "a negative gap": (accounting("max_gap", -0.5, row=2), "max_gap is finite and not negative: 1 times"),
    "a gap of NaN": (accounting("max_gap", math.nan, row=2), "max_gap is finite and not negative"),
    "an infinite gap": (accounting("max_gap", math.inf, row=2), "max_gap is finite and not negative"),
    "a proof of no list": (accounting("is_proven", True, row=8), "skipped and error prove nothing: 1 times"),
    "a gap of no list": (accounting("max_gap", 0.0, row=8), "skipped and error prove nothing"),
    "an account of another day": (accounting("ds", date(2026, 11, 19)), "ds is 2026-11-20"),
    "an account of another run": (accounting("run_id", "run-old"), "run_id is run-0123456789abcdef"),
}

IN_LONG_ROWS_ONLY: dict[str, tuple[Lie, str]] = {
    "a gap in the ranks": (setting("rank", 3), "ranks go 1, 2, 3, … without gaps: 1 times, first user ü000, rank 3"),
    "ranks from zero": (lambda c, _: [row.update(rank=row["rank"] - 1) for row in c], "ranks go 1, 2, 3"),
    "a user in two places": (lambda c, _: c.append(c.pop(0)), "the rows of a user are together: 1 times"),
    "a list too long": (lambda c, _: c.insert(K, c[K - 1] | {"rank": K + 1}), "an item is once in a list"),
}


@pytest.mark.parametrize("layout", ["long", "nested"])
@pytest.mark.parametrize("name", LIES)
def test_every_lie_is_found_and_placed(layout: str, name: str) -> None:
    lie, words = LIES[name]
    found = audited(with_lie(make_unit(layout), lie))
    assert any(line.startswith(words) for line in found), found


@pytest.mark.parametrize("seed", range(4))
def test_any_item_of_any_history_is_found(seed: int) -> None:
    """Each user with a list is offered the lowest and the highest item row of the user's history."""
    unit = make_unit(seed=seed)
    histories, item_ids = unit.expected.histories, unit.expected.item_ids.to_pylist()
    firsts = {row["user_id"]: at for at, row in reversed(list(enumerate(unit.candidates)))}
    assert len(firsts) == 7
    for user, user_id in enumerate(histories.user_ids.to_pylist()):
        seen = histories.item_rows[histories.offsets[user] : histories.offsets[user + 1]]
        for item_row in {seen.min(), seen.max()} if user_id in firsts else ():
            lie = setting("item_id", item_ids[item_row], row=firsts[user_id])
            promise = f"the item is not one that the user has seen: 1 times, first user {user_id}"
            assert any(line.startswith(promise) for line in audited(with_lie(unit, lie)))


@pytest.mark.parametrize("name", IN_LONG_ROWS_ONLY)
def test_every_lie_about_rows_is_found_and_placed(name: str) -> None:
    lie, words = IN_LONG_ROWS_ONLY[name]
    found = audited(with_lie(make_unit(), lie))
    assert any(line.startswith(words) for line in found), found


@pytest.mark.parametrize("layout", ["long", "nested"])
def test_a_row_that_breaks_a_rule_is_found_and_placed(layout: str) -> None:
    unit = make_unit(layout)
    users, items = (pa.array(unit.expected.requested), unit.expected.item_ids)

    def broken_rules(user_ids, user_R, item_R):
        is_second = [row for row, user in enumerate(user_ids.take(user_R).to_pylist()) if user == users[1].as_py()][1]
        yield "rules.block.legal does not block the item", np.arange(len(item_R)) == is_second
        yield "rules.show_if.fresh holds", np.zeros(len(item_R), dtype=bool)

    audit = audit_unit(*unit.tables(), dataclasses.replace(unit.expected, broken_rules=broken_rules))
    (violation,) = audit.violations
    row = [row for row in unit.candidates if row["user_id"] == users[1].as_py()][1]
    assert row["item_id"] in items.to_pylist()
    place = f"user {row['user_id']}, rank 2, item {row['item_id']}"
    assert str(violation) == f"rules.block.legal does not block the item: 1 times, first {place}"


def test_a_list_longer_than_k_is_found_even_when_the_accounting_agrees() -> None:
    unit = make_unit()

    def one_more(candidates: list[Row], users: list[Row]) -> None:
        used = {row["item_id"] for row in candidates[:K]}
        spare = next(item for item in unit.expected.item_ids.to_pylist() if item not in used)
        candidates.insert(K, candidates[K - 1] | {"rank": K + 1, "item_id": spare, "score": -2.0})
        users[0]["num_returned"] = K + 1

    assert any(line.startswith("a list has at most 4 items: 1 times") for line in audited(with_lie(unit, one_more)))


@pytest.mark.parametrize("layout", ["long", "nested"])
@pytest.mark.parametrize("which", [0, 1])
def test_another_schema_is_found_before_anything_else(layout: str, which: int) -> None:
    unit = make_unit(layout)
    tables = list(unit.tables())
    for column in tables[which].schema.names:
        wrong = list(tables)
        wrong[which] = tables[which].drop_columns([column])
        (violation,) = audit_unit(wrong[0], wrong[1], unit.expected).violations
        assert "has the columns of its schema" in violation.promise
        assert column in violation.examples[0]


def test_nulls_that_the_schema_forbids_are_found() -> None:
    unit = make_unit()
    candidates, users = unit.tables()
    scores = pa.array([None, *candidates["score"].to_pylist()[1:]], pa.float32())
    with_null = candidates.set_column(3, candidates.schema.field("score"), scores)
    (violation,) = audit_unit(with_null, users, unit.expected).violations
    assert str(violation) == "candidates.score has no nulls: 1 times"


def test_nulls_within_a_list_are_found() -> None:
    unit = make_unit("nested")
    candidates, users = unit.tables()
    for column in ("item_ids", "scores"):
        lists = candidates[column].to_pylist()
        lists[0][1] = lists[2][0] = None
        field = candidates.schema.field(column)
        at = candidates.schema.get_field_index(column)
        with_nulls = candidates.set_column(at, field, pa.array(lists, field.type))
        (violation,) = audit_unit(with_nulls, users, unit.expected).violations
        assert str(violation) == f"candidates.{column} has no nulls: 2 times"


def test_lists_of_different_lengths_are_found() -> None:
    unit = make_unit("nested")
    candidates, users = unit.tables()
    scores = [row[:-1] if i == 0 else row for i, row in enumerate(candidates["scores"].to_pylist())]
    field = candidates.schema.field("scores")
    uneven = candidates.set_column(2, field, pa.array(scores, field.type))
    assert str(audit_unit(uneven, users, unit.expected).violations[0]).startswith(
        "item_ids and scores are as long: 1 times, first user ü000"
    )


def test_an_empty_unit_is_sound() -> None:
    unit = make_unit()
    nobody = dataclasses.replace(unit.expected, requested=pa.array([], pa.string()))
    audit = audit_unit(*Unit([], [], nobody).tables(), nobody)
    assert (audit.violations, audit.num_rows, audit.num_users) == ((), 0, 0)


def test_the_error_names_the_file_and_the_first_places() -> None:
    unit = with_lie(make_unit(), setting("score", math.nan))
    with pytest.raises(InvalidRunError) as raised:
        require_sound(audit_unit(*unit.tables(), unit.expected), "candidates-00003.parquet")
    assert raised.value.exit_code == 10
    assert str(raised.value).startswith("candidates-00003.parquet: ")
    assert "scores are finite: 1 times, first user ü000, rank 2, item item 0" in str(raised.value)


VALUES: dict[str, st.SearchStrategy[Any]] = {
    "user_id": st.sampled_from([f"ü{n:03d}" for n in range(10)]),
    "rank": st.integers(0, 6),
    "item_id": st.sampled_from([f"item {n:03d}" for n in range(32)]),
    "score": st.sampled_from([-1.0, -0.5, 0.25, 0.5, 1.5, math.inf, math.nan]),
    "status": st.sampled_from(["ok", "short", "fallback", "skipped", "error", "other"]),
    "num_returned": st.integers(0, 5),
    "reason": st.sampled_from(["", "because"]),
    "source": st.sampled_from(["mol", "popular", ""]),
    "num_rule_filtered": st.integers(-1, 1),
    "is_proven": st.booleans(),
    "max_gap": st.sampled_from([None, -0.25, 0.0, 0.25, math.inf, math.nan]),
}
CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("set"), st.integers(0, 99), st.sampled_from(sorted(VALUES))),
        st.tuples(st.sampled_from(["drop", "double", "swap", "drop account"]), st.integers(0, 99)),
    ),
    min_size=0,
    max_size=3,
)


@settings(max_examples=400)
@given(seed=st.integers(0, 3), changes=CHANGES, data=st.data())
def test_the_audit_agrees_with_the_slow_and_obvious_one(seed: int, changes: list[Any], data: st.DataObject) -> None:
    unit = make_unit(seed=seed)
    candidates, users = copy.deepcopy(unit.candidates), copy.deepcopy(unit.users)
    for change in changes:
        rows = users if change[0] == "drop account" else candidates
        at = change[1] % len(rows)
        if change[0] == "set":
            column = change[2]
            rows = users if column not in candidates[0] else candidates
            rows[change[1] % len(rows)][column] = data.draw(VALUES[column])
        elif change[0] in ("drop", "drop account"):
            rows.pop(at)
        elif change[0] == "double":
            rows.insert(at, dict(rows[at]))
        else:
            rows[at - 1], rows[at] = rows[at], rows[at - 1]
    changed = Unit(candidates, users, unit.expected)
    assert (not audited(changed)) == is_sound(changed)


@pytest.mark.parametrize("layout", ["long", "nested"])
def test_a_column_that_is_not_that_of_the_catalogue_is_found(layout: str) -> None:
    unit = make_unit(layout)
    candidates, users = unit.tables()
    prices = pa.array([None if item % 7 == 0 else item / 4 for item in range(len(unit.expected.item_ids))])
    expected = dataclasses.replace(unit.expected, item_columns=pa.table({"price": prices}))
    ids = candidates["item_ids" if layout == "nested" else "item_id"].combine_chunks()
    flat = ids.flatten() if layout == "nested" else ids
    right = prices.take(pc.index_in(flat, unit.expected.item_ids))

    def with_prices(values: pa.Array) -> pa.Table:
        if layout == "long":
            return candidates.append_column("price", values)
        kind = pa.list_(pa.field("element", pa.float64()))
        lists = pa.ListArray.from_arrays(ids.offsets, values, type=kind)
        return candidates.append_column(pa.field("price", kind, nullable=False), lists)

    assert audit_unit(with_prices(right), users, expected).violations == ()
    wrong = pa.array([99.0, *right.to_pylist()[1:]])
    (violation,) = audit_unit(with_prices(wrong), users, expected).violations
    assert str(violation).startswith("price is that of the catalogue: 1 times, first user")
    (missing,) = audit_unit(candidates, users, expected).violations
    assert "candidates has the columns of its schema" in str(missing)
