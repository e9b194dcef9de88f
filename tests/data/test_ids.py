"""Ids of any type become ours without loss."""

from decimal import Decimal
from uuid import UUID

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.data.ids import MAX_ID_BYTES, WORDS_FOR_NOBODY, id_type, ids_of_table, read_ids, rows_among, words_in
from pipeline.errors import InputError


def test_ids_keep_every_digit():
    exact = 2**53 + 1  # a float64 would lose the last bit
    ids, is_null, is_bad = read_ids(pa.array([exact, None], pa.int64()), pa.int64())
    assert ids[0].as_py() == exact
    assert is_null.tolist() == [False, True]
    assert not is_bad.any()
    assert read_ids(pa.array([exact]), pa.string())[0].to_pylist() == [str(exact)]
    assert read_ids(pa.array([str(exact)]), pa.int64())[0].to_pylist() == [exact]


def test_ids_that_cannot_be_read_are_told_from_those_that_are_not_there():
    ids, is_null, is_bad = read_ids(pa.array([b"a", b"\xff\xfe", b"", None], pa.binary()), pa.string())
    assert ids.to_pylist()[0] == "a"
    assert is_null.tolist() == [False, False, True, True]
    assert is_bad.tolist() == [False, True, False, False]
    ids, is_null, is_bad = read_ids(pa.array(["12", "x", ""]), pa.int64())
    assert ids.to_pylist() == [12, None, None]
    assert is_null.tolist() == [False, False, True]
    assert is_bad.tolist() == [False, True, False]
    too_large = pa.array([1, 2**63], pa.uint64())
    ids, is_null, is_bad = read_ids(too_large, pa.int64())
    assert ids.to_pylist() == [1, None]
    assert is_bad.tolist() == [False, True]


def test_an_id_is_an_integer_or_text():
    assert id_type(pa.int16(), "as_is", "u", "user_id_type") == pa.int64()
    assert id_type(pa.dictionary(pa.int32(), pa.string()), "as_is", "u", "user_id_type") == pa.string()
    assert id_type(pa.int64(), "string", "u", "user_id_type") == pa.string()
    with pytest.raises(InputError, match="'uid' is double; an id must be"):
        id_type(pa.float64(), "as_is", "uid", "user_id_type")
    with pytest.raises(InputError, match=r"'uid' is decimal128.*set user_id_type: string to read its ids as text"):
        id_type(pa.decimal128(38, 0), "as_is", "uid", "user_id_type")
    assert id_type(pa.decimal128(38, 0), "string", "u", "") == pa.string()
    assert id_type(pa.null(), "as_is", "u", "") == pa.null()


def test_ids_are_found_among_others_whatever_their_type():
    ids = pa.array(["b", "new", "12"])
    assert rows_among(ids, pa.array(["12", "b", "gone"])).tolist() == [1, -1, 0]
    assert rows_among(ids, pa.array([7, 12])).tolist() == [-1, -1, 1]
    assert rows_among(pa.array([12, 7]), pa.array(["x", "12"])).tolist() == [1, -1]
    assert rows_among(ids, pa.array([], pa.string())).tolist() == [-1, -1, -1]


@given(st.text("0123456789x-+ ", min_size=1, max_size=8))
def test_text_is_a_number_only_where_it_comes_back_the_same(text):
    ids, _, is_bad = read_ids(pa.array([text]), pa.int64())
    assert (ids[0].as_py() is None) == bool(is_bad[0])
    assert is_bad[0] != (ids[0].as_py() is not None and str(ids[0].as_py()) == text)
    if text.isdecimal() and str(int(text)) == text:
        assert ids[0].as_py() == int(text)


IDS = ["a", "b", None]


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array(IDS, pa.string_view()), IDS),
        (pa.array(IDS, pa.large_string()).dictionary_encode(), IDS),
        (pa.DictionaryArray.from_arrays(pa.array([0, 1, None]), pa.array(["a", "b"], pa.string_view())), IDS),
        (pa.array([b"ab", b"cd", None], pa.binary(2)), ["ab", "cd", None]),
        (pa.array([b"ab", None], pa.binary_view()), ["ab", None]),
        (pa.array([UUID(int=7).bytes, None], pa.uuid()), [str(UUID(int=7)), None]),
        (pa.array([Decimal(12), None], pa.decimal128(38, 0)), ["12", None]),
        (pa.array([2**64 - 1], pa.uint64()), [str(2**64 - 1)]),
        (pa.array(['{"a": 1}'], pa.json_()), ['{"a": 1}']),
        (pa.nulls(2), [None, None]),
    ],
)
def test_an_id_of_any_type_becomes_its_text(column, expected):
    ids, is_null, is_bad = read_ids(column, pa.string())
    assert ids.to_pylist() == expected
    assert is_null.tolist() == [value is None for value in expected]
    assert not is_bad.any()


def test_words_for_nobody_are_found_among_text_only():
    assert words_in(pa.array(["nan", "anna", "null", ""]), WORDS_FOR_NOBODY).tolist() == [True, False, True, False]
    assert not words_in(pa.array([0, 1]), WORDS_FOR_NOBODY).any()
    assert not words_in(pa.array(["nan"]), ()).any()


@pytest.mark.parametrize(
    ("ids", "wanted", "declared", "says"),
    [
        (
            pa.array([1]),
            pa.string(),
            "as_is",
            "user_id is int64 there, but string in the log; .* user_id_type: string",
        ),
        (pa.array(["a", None, ""]), pa.string(), "as_is", r"t: 2 rows have no user_id \(null or empty\)"),
        (pa.array(["1", "01"]), pa.int64(), "int64", "t: 1 rows have a user_id that is no int64, for example '01'"),
        (pa.array([1.5]), pa.int64(), "as_is", "t: column 'user_id' is double; an id must be"),
    ],
)
def test_a_table_with_other_ids_than_the_logs_is_refused(ids, wanted, declared, says):
    with pytest.raises(InputError, match=says):
        ids_of_table(pa.chunked_array([ids]), "user_id", wanted, declared, "t")


def test_a_table_is_read_with_the_type_that_the_source_declares():
    found = ids_of_table(pa.chunked_array([pa.array([1, 2])]), "user_id", pa.string(), "string", "t")
    assert found.to_pylist() == ["1", "2"]
    assert ids_of_table(pa.chunked_array([pa.nulls(0)]), "user_id", pa.string(), "as_is", "t").type == pa.string()


def test_a_text_that_is_too_long_for_an_id_is_unreadable():
    ids, is_null, is_bad = read_ids(pa.array(["x" * MAX_ID_BYTES, "x" * (MAX_ID_BYTES + 1), None]), pa.string())
    assert [value is None for value in ids.to_pylist()] == [False, True, True]
    assert (is_null.tolist(), is_bad.tolist()) == ([False, False, True], [False, True, False])
