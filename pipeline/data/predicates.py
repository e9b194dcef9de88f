"""Conditions on an item and a query, written in SQL: parsed and checked by sqlglot, evaluated by polars.

A condition is an expression over columns `item.…` and `query.…`. An item may be shown where it is TRUE, and not where
it is FALSE or NULL. CURRENT_DATE is the night's `ds`.

Shapes: N items, R pairs of an item and a query.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date

import numpy as np
import polars as pl
import sqlglot
from sqlglot import exp

from pipeline.config import nearest
from pipeline.data.columns import Mask
from pipeline.errors import InputError

ITEM, QUERY = "item", "query"

# The parts of SQL that a condition may be made of. All are functions of their arguments alone.
KNOWN: tuple[type[exp.Expr], ...] = (
    *(exp.And, exp.Or, exp.Not, exp.Paren, exp.Is, exp.In, exp.Between, exp.Like, exp.ILike, exp.Coalesce),
    *(exp.EQ, exp.NEQ, exp.GT, exp.GTE, exp.LT, exp.LTE, exp.Add, exp.Sub, exp.Mul, exp.Div, exp.Mod, exp.Neg),
    *(exp.Column, exp.Identifier, exp.Literal, exp.Null, exp.Boolean, exp.Cast, exp.DataType, exp.Interval, exp.Var),
    *(exp.ArrayContains, exp.ArraySize, exp.Lower, exp.Upper, exp.Length, exp.Abs, exp.StartsWith, exp.CurrentDate),
)


@dataclass(frozen=True)
class Conjunct:
    """A part of a condition, which is the AND of its parts; `sql` names columns as `"item.status"`."""

    sql: str
    item_columns: tuple[str, ...]
    query_columns: tuple[str, ...]


@dataclass(frozen=True)
class Differs:
    """The part `item.<item_column> <> query.<query_column>`: it hides few items from each query, so it becomes a list
    of them. It is not TRUE where one of the two is null either: `parts` has the item's null, not the query's."""

    item_column: str
    query_column: str


@dataclass(frozen=True)
class Condition:
    """A parsed condition: `whole` is TRUE where all of `parts` and `differs` are."""

    name: str
    whole: Conjunct
    parts: tuple[Conjunct, ...]
    differs: tuple[Differs, ...]


def parse_condition(name: str, sql: str, ds: date) -> Condition:
    """Parse a condition; `name` is the key that holds it, for errors.

    Raises InputError for what is no SQL expression, or has a part that is not in KNOWN.
    """
    try:
        tree = sqlglot.parse_one(sql, dialect="duckdb")
    except sqlglot.errors.SqlglotError as error:
        said = str(error).splitlines()[0] if str(error) else "it is empty"
        raise InputError(f"{name}: {sql!r} is no SQL condition: {said}") from None
    for node in tree.walk():
        if not isinstance(node, KNOWN):
            raise InputError(
                f"{name}: {node.sql('duckdb')!r} ({type(node).__name__}) is not known in a condition; README, "
                "'What may be shown', lists what is"
            )
        if isinstance(node, exp.Column):
            _check_column(name, node)
        if isinstance(node, exp.Interval) and not (isinstance(node.this, exp.Literal) and node.args.get("unit")):
            raise InputError(f"{name}: {node.sql('duckdb')!r}: write an interval as INTERVAL 7 DAY")
    dated = tree.transform(lambda node: _day(ds) if isinstance(node, exp.CurrentDate) else node)
    parts: list[Conjunct] = []
    differs: list[Differs] = []
    for part in _conjuncts(dated):
        differing = _differs(part)
        if differing is None:
            parts.append(_conjunct(part))
            continue
        differs.append(differing)
        (column,) = (side for side in (part.this, part.expression) if side.table.lower() == ITEM)
        parts.append(_conjunct(exp.Not(this=exp.Is(this=column.copy(), expression=exp.Null()))))
    return Condition(name, _conjunct(dated), tuple(parts), tuple(differs))


def check_columns(condition: Condition, items: Sequence[str], queries: Sequence[str], no_queries: str) -> None:
    """Raise InputError when a condition names a column that is in neither table. `no_queries` says what to do where a
    query column is missing."""
    for side, named, known in (
        (ITEM, condition.whole.item_columns, items),
        (QUERY, condition.whole.query_columns, queries),
    ):
        for column in named:
            if column not in known:
                way_out = no_queries if side == QUERY else ""
                raise InputError(
                    f"{condition.name}: there is no column {side}.{column}{nearest(column, known)}{way_out}"
                )


def check_types(condition: Condition, items: pl.Schema, queries: pl.Schema) -> None:
    """Raise InputError when a condition compares values of types that cannot be compared, or is not true or false."""
    frame = pl.DataFrame(schema={f"{ITEM}.{name}": kind for name, kind in items.items()}).hstack(
        pl.DataFrame(schema={f"{QUERY}.{name}": kind for name, kind in queries.items()})
    )
    try:
        kind = frame.select(found=pl.sql_expr(condition.whole.sql))["found"].dtype
        for differing in condition.differs:
            common_type(items[differing.item_column], queries[differing.query_column])
    except pl.exceptions.PolarsError as error:
        raise InputError(f"{condition.name}: {condition.whole.sql}: {str(error).splitlines()[0]}") from None
    if kind not in (pl.Boolean, pl.Null):
        raise InputError(f"{condition.name}: {condition.whole.sql} is a {kind}, and not true or false")


def holds_for_items(part: Conjunct, items: pl.DataFrame, query: Mapping[str, pl.Series]) -> Mask:
    """(N,) whether a part of a condition is TRUE for each item and one query, whose columns are series of length 1."""
    frame = items.select(pl.col(name).alias(f"{ITEM}.{name}") for name in part.item_columns)
    values = [pl.lit(query[name]).first().alias(f"{QUERY}.{name}") for name in part.query_columns]
    if not part.item_columns:
        return np.full(len(items), _is_true(pl.select(values), part)[0])
    return _is_true(frame.with_columns(values), part)


def holds_for_pairs(condition: Condition, items: pl.DataFrame, queries: pl.DataFrame, num_pairs: int) -> Mask:
    """(R,) whether a condition is TRUE for each of `num_pairs` pairs: row i of `items` with row i of `queries`."""
    whole = condition.whole
    frame = pl.DataFrame(
        [items[name].alias(f"{ITEM}.{name}") for name in whole.item_columns]
        + [queries[name].alias(f"{QUERY}.{name}") for name in whole.query_columns]
    )
    found = _is_true(frame, whole)
    return found if whole.item_columns or whole.query_columns else np.full(num_pairs, found[0])


def common_type(left: pl.DataType, right: pl.DataType) -> pl.DataType:
    """The type in which values of both types can be compared. Raises a PolarsError when there is none."""
    return pl.concat([pl.DataFrame(schema={"": kind}) for kind in (left, right)], how="vertical_relaxed").schema[""]


def naive_utc(frame: pl.DataFrame) -> pl.DataFrame:
    """The frame with times in UTC and without a time zone, to be compared with literals."""
    zoned = [name for name, kind in frame.schema.items() if isinstance(kind, pl.Datetime) and kind.time_zone]
    return frame.with_columns(pl.col(name).dt.convert_time_zone("UTC").dt.replace_time_zone(None) for name in zoned)


def _is_true(frame: pl.DataFrame, part: Conjunct) -> Mask:
    try:
        found = frame.select(found=pl.sql_expr(part.sql).cast(pl.Boolean).fill_null(False))["found"]
    except pl.exceptions.PolarsError as error:
        raise InputError(f"rules.show_if: {part.sql}: {str(error).splitlines()[0]}") from None
    return found.to_numpy().copy()


def _check_column(name: str, column: exp.Column) -> None:
    if (
        column.table.lower() not in (ITEM, QUERY)
        or column.args.get("db")
        or not isinstance(column.this, exp.Identifier)
    ):
        raise InputError(f"{name}: write {column.sql('duckdb')} as item.<column> or query.<column>")


def _conjuncts(tree: exp.Expr) -> Iterator[exp.Expr]:
    if isinstance(tree, exp.Paren):
        yield from _conjuncts(tree.this)
    elif isinstance(tree, exp.And):
        yield from _conjuncts(tree.this)
        yield from _conjuncts(tree.expression)
    else:
        yield tree


def _differs(part: exp.Expr) -> Differs | None:
    sides = [part.this, part.expression] if isinstance(part, exp.NEQ) else []
    by_table = {side.table.lower(): side.name for side in sides if isinstance(side, exp.Column)}
    return Differs(by_table[ITEM], by_table[QUERY]) if len(by_table) == 2 else None


def _conjunct(tree: exp.Expr) -> Conjunct:
    columns = [(column.table.lower(), column.name) for column in tree.find_all(exp.Column)]
    by_table = {side: tuple(dict.fromkeys(name for table, name in columns if table == side)) for side in (ITEM, QUERY)}
    in_polars = tree.transform(_null_of_null).transform(_for_polars)
    return Conjunct(in_polars.sql("duckdb"), by_table[ITEM], by_table[QUERY])


def _null_of_null(node: exp.Expr) -> exp.Expr:
    """polars finds no null in a list; in SQL it is not known whether a null is in it."""
    if not isinstance(node, exp.ArrayContains):
        return node
    is_null = exp.Is(this=node.expression.copy(), expression=exp.Null())
    return exp.Case(ifs=[exp.If(this=is_null, true=exp.Null())], default=node)


def _for_polars(node: exp.Expr) -> exp.Expr:
    if isinstance(node, exp.Column):
        return exp.column(exp.to_identifier(f"{node.table.lower()}.{node.name}", quoted=True))
    if type(node) is exp.Cast:  # a value that cannot be cast is null, and ends no night
        return exp.TryCast(this=node.this.transform(_for_polars), to=node.args["to"].copy())
    if isinstance(node, exp.Interval):
        return exp.var(f"INTERVAL '{node.this.name} {node.args['unit'].name.lower()}'")
    return node


def _day(ds: date) -> exp.Expr:
    return exp.cast(exp.Literal.string(ds.isoformat()), "date")
