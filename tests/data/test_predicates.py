"""Conditions in SQL: the same answers as DuckDB's, part by part and as a whole, and sentences for what is refused."""

from datetime import date, datetime, timedelta, timezone

import duckdb
import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.predicates import (
    Differs,
    check_columns,
    check_types,
    common_type,
    holds_for_items,
    holds_for_pairs,
    naive_utc,
    parse_condition,
)
from pipeline.errors import InputError

DS = date(2026, 11, 20)
ITEM = {
    "status": pl.String,
    "seller": pl.String,
    "markets": pl.List(pl.String),
    "price": pl.Float64,
    "stock": pl.Int64,
    "created": pl.Date,
    "adult": pl.Boolean,
}
QUERY = {"user_id": pl.String, "market": pl.String, "age": pl.Int64, "since": pl.Date, "consents": pl.Boolean}

WORD = st.none() | st.sampled_from(["a", "b", "DE", "FR", "it's", ""])
NUMBER = st.none() | st.integers(-3, 3)
DAY = st.none() | st.dates(date(2026, 11, 10), date(2026, 11, 25))
BOOLEAN = st.none() | st.booleans()
ITEM_ROW = st.fixed_dictionaries(
    {
        "status": WORD,
        "seller": WORD,
        "markets": st.none() | st.lists(WORD.filter(bool), max_size=3),
        "price": st.none() | st.sampled_from([-1.5, 0.0, 2.0, 3.25]),
        "stock": NUMBER,
        "created": DAY,
        "adult": BOOLEAN,
    }
)
QUERY_ROW = st.fixed_dictionaries({"user_id": WORD, "market": WORD, "age": NUMBER, "since": DAY, "consents": BOOLEAN})

TEXTS = ["item.status", "item.seller", "query.user_id", "query.market", "'a'", "'it''s'", "LOWER(item.status)", "NULL"]
NUMBERS = ["item.price", "item.stock", "query.age", "2", "-1", "ABS(item.stock)", "item.stock + 1", "item.price * 2"]
DAYS = ["item.created", "query.since", "DATE '2026-11-18'", "CURRENT_DATE", "CURRENT_DATE - INTERVAL 3 DAY"]
SIMPLE = st.one_of(
    st.tuples(st.sampled_from(TEXTS), st.sampled_from(["=", "<>"]), st.sampled_from(TEXTS)).map(" ".join),
    st.tuples(
        st.sampled_from(NUMBERS), st.sampled_from(["=", "<>", "<", "<=", ">", ">="]), st.sampled_from(NUMBERS)
    ).map(" ".join),
    st.tuples(st.sampled_from(DAYS), st.sampled_from(["=", "<", ">="]), st.sampled_from(DAYS)).map(" ".join),
    st.sampled_from(
        [
            "ARRAY_CONTAINS(item.markets, query.market)",
            "ARRAY_LENGTH(item.markets) > 1",
            "item.status IN ('a', 'b')",
            "item.status NOT IN ('a', 'DE')",
            "item.stock BETWEEN query.age AND 2",
            "item.seller IS NULL",
            "query.market IS NOT NULL",
            "item.status LIKE 'i%'",
            "STARTS_WITH(item.status, 'D')",
            "COALESCE(item.stock, 0) >= 0",
            "LENGTH(item.seller) = 2",
            "item.adult",
            "query.consents",
            "TRUE",
            "item.stock % 2 = 0",
        ]
    ),
)
CONDITION = st.recursive(
    SIMPLE,
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from([" AND ", " AND ", " OR "]), inner).map(lambda parts: f"({''.join(parts)})"),
        inner.map(lambda part: f"NOT ({part})"),
    ),
    max_leaves=5,
)


def parsed(sql: str):
    return parse_condition("rules.show_if.x", sql, DS)


def frames(items, queries) -> tuple[pl.DataFrame, pl.DataFrame]:
    return pl.DataFrame(items, schema=ITEM, orient="row"), pl.DataFrame(queries, schema=QUERY, orient="row")


def by_duckdb(sql: str, items: pl.DataFrame, queries: pl.DataFrame) -> np.ndarray:
    """(Q, N) whether the condition is TRUE, over the cross join."""
    tables = {"item": items.with_row_index("nth"), "query": queries.with_row_index("nth")}
    with duckdb.connect() as connection:
        for name, table in tables.items():
            connection.register(name, table.to_arrow())
        dated = sql.replace("CURRENT_DATE", f"DATE '{DS}'").replace("ARRAY_CONTAINS", "list_contains")
        rows = connection.execute(
            f"SELECT query.nth, item.nth, COALESCE(CAST({dated.replace('ARRAY_LENGTH', 'len')} AS BOOLEAN), FALSE) "
            "FROM item CROSS JOIN query"
        ).fetchall()
    found = np.zeros((len(queries), len(items)), dtype=bool)
    for query, item, holds in rows:
        found[query, item] = holds
    return found


@given(CONDITION, st.lists(ITEM_ROW, min_size=1, max_size=6), st.lists(QUERY_ROW, min_size=1, max_size=3))
def test_a_condition_holds_where_duckdb_says_true_over_the_cross_join(sql, item_rows, query_rows):
    items, queries = frames(item_rows, query_rows)
    condition = parsed(sql)
    check_columns(condition, list(ITEM), list(QUERY), "")
    check_types(condition, items.schema, queries.schema)
    expected = by_duckdb(sql, items, queries)
    for number in range(len(queries)):
        query = {name: queries[name].slice(number, 1) for name in QUERY}
        by_parts = np.ones(len(items), dtype=bool)
        for part in condition.parts:
            by_parts &= holds_for_items(part, items, query)
        for differs in condition.differs:
            same = items[differs.item_column].eq(query[differs.query_column][0]).fill_null(False)
            by_parts &= ~same.to_numpy() & (query[differs.query_column][0] is not None)
        assert by_parts.tolist() == expected[number].tolist()
        asked = queries.select(pl.all().gather([number] * len(items)))
        assert holds_for_pairs(condition, items, asked, len(items)).tolist() == expected[number].tolist()


def test_a_different_seller_is_a_list_and_no_group():
    condition = parsed("item.status = 'a' AND query.user_id != item.seller AND query.consents")
    assert condition.differs == (Differs("seller", "user_id"),)
    assert [part.query_columns for part in condition.parts] == [(), (), ("consents",)]


def test_two_columns_of_the_item_that_differ_are_no_list():
    assert parsed("item.status <> item.seller").differs == ()


@pytest.mark.parametrize(
    ("sql", "said"),
    [
        ("", "no SQL condition"),
        ("item.status = ", "no SQL condition"),
        ("item.status ~ 'a'", "is not known in a condition"),
        ("(SELECT 1) = 1", "is not known in a condition"),
        ("item.price > random()", "is not known in a condition"),
        ("read_text('/etc/passwd') = ''", "is not known in a condition"),
        ("item.status = 'a'; DROP TABLE item", "is not known in a condition"),
        ("item.created > CURRENT_DATE - INTERVAL '7'", "write an interval as INTERVAL 7 DAY"),
        ("item.created > CURRENT_DATE - INTERVAL (item.stock) DAY", "write an interval as INTERVAL 7 DAY"),
        ("status = 'a'", "write status as item.<column> or query.<column>"),
        ("items.status = 'a'", "write items.status as item.<column> or query.<column>"),
        ("main.item.status = 'a'", "as item.<column> or query.<column>"),
        ("item.* = 'a'", "write item.* as item.<column>"),
    ],
)
def test_what_is_no_condition_is_refused_with_its_key(sql, said):
    with pytest.raises(InputError, match=r"rules\.show_if\.x: ") as error:
        parsed(sql)
    assert said in str(error.value)


@pytest.mark.parametrize(
    ("sql", "said"),
    [
        ("item.statsu = 'a'", "there is no column item.statsu; did you mean 'status'?"),
        ("query.markt = 'a'", "there is no column query.markt; did you mean 'market'?; set queries.uri"),
        ("item.status = 3", "cannot compare string with numeric type"),
        ("item.price", "is a Float64, and not true or false"),
        ("ARRAY_CONTAINS(item.price, 3)", "rules.show_if.x: "),
        ("item.stock <> query.user_id", "cannot compare"),
    ],
)
def test_a_condition_that_the_tables_do_not_fit_is_refused(sql, said):
    def check() -> None:
        check_columns(parsed(sql), list(ITEM), list(QUERY), "; set queries.uri")
        check_types(parsed(sql), pl.Schema(ITEM), pl.Schema(QUERY))

    with pytest.raises(InputError) as error:
        check()
    assert said in str(error.value)


def test_times_are_compared_in_utc():
    zone = timezone(timedelta(hours=5))
    items = pl.DataFrame({"t": [datetime(2026, 11, 20, 3, tzinfo=zone), datetime(2026, 11, 20, 6, tzinfo=zone)]})
    condition = parsed("item.t >= TIMESTAMP '2026-11-20 00:00:00'")
    assert holds_for_items(condition.whole, naive_utc(items), {}).tolist() == [False, True]


def test_numbers_of_two_widths_can_be_compared():
    assert common_type(pl.Int32(), pl.Int64()) == pl.Int64()


def test_a_value_that_cannot_be_cast_is_null_and_hides_its_item():
    items = pl.DataFrame({"price": ["3", "free", None, "0.5"]})
    condition = parsed("CAST(item.price AS DOUBLE) < 1 OR item.price = 'free'")
    assert holds_for_items(condition.whole, items, {}).tolist() == [False, True, False, True]
    assert holds_for_items(parsed("CAST(item.price AS DOUBLE) > 1").whole, items, {}).tolist() == [True, *[False] * 3]


def test_a_condition_on_the_query_alone_is_true_of_all_items_or_of_none():
    items, part = pl.DataFrame({"item_id": [1, 2, 3]}), parsed("query.consents").parts[0]
    for consents in (True, False, None):
        query = {"consents": pl.Series([consents], dtype=pl.Boolean)}
        assert holds_for_items(part, items, query).tolist() == [consents is True] * 3
