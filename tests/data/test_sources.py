import re

import pytest

from pipeline.config import load_config, validate
from pipeline.data.sources import SourceSpec
from pipeline.errors import InputError


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"colums": {}}, "colums: unknown key; did you mean 'columns'"),
        ({"columns": {"user": "uid"}}, "columns.user: unknown key"),
        ({"time_unit": "sec"}, "time_unit"),
        ({"csv": {"delimiter": "::"}}, "works only with quote: ''"),
        ({"csv": {"encoding": "latin-99"}}, "no encoding of text is called 'latin-99'; utf-8, latin-1, cp1252 and"),
        ({"csv": {"escape": ","}}, "delimiter, quote and escape must differ"),
        ({"event_type": "view", "columns": {"event_type": "kind"}}, "not both"),
        ({"event_weights": {"view": -1.0}}, "must not be negative"),
        ({"value_is_weight": True}, "value_is_weight needs columns.event_value"),
        ({"optional_columns": ["user_id"]}, "optional_columns"),
    ],
)
def test_a_faulty_source_is_refused_with_its_key(values, says):
    with pytest.raises(InputError) as error:
        validate(SourceSpec, values, "conf/sources/mine.yaml")
    assert says in str(error.value)


def test_only_named_columns_are_read():
    spec = validate(SourceSpec, {"columns": {"user_id": "uid", "event_id": "key"}}, "mine")
    assert spec.columns.named == {"user_id": "uid", "item_id": "item_id", "event_ts": "event_ts", "event_id": "key"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("event_weights: {0: 1.0}", "the key 0 is a number for YAML; put it in quotes, as in '0': 1.0"),
        (
            "event_weights: {like: 1.0, no: 0.5}",
            "YAML reads a key as False (yes, no, on and off too)",
        ),
        ("{time_format: '%Y', time_unit: s}", "give time_format (of text) or time_unit (of numbers), not both"),
        ("time_zone: CEST", "'CEST' is no time zone that this machine knows; give one like 'Europe/Berlin'"),
    ],
)
def test_a_source_that_cannot_be_meant_says_what_to_write(tmp_path, text, says):
    (tmp_path / "own.yaml").write_text(text)
    with pytest.raises(InputError, match=re.escape(says)):
        load_config(SourceSpec, tmp_path / "own.yaml")
