from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pytest

from pipeline.data.catalog import index_catalogue, items_table
from pipeline.data.item_events import NEVER, ItemEvents
from pipeline.errors import InputError


def test_the_index_ascends_by_id_with_its_attributes():
    catalogue = pa.table({"title": ["B", "A"], "item_id": ["b", "a"]})
    indexed = index_catalogue(catalogue, pa.string(), "as_is", "items")
    assert indexed.to_pylist() == [{"item_id": "a", "title": "A"}, {"item_id": "b", "title": "B"}]
    events = ItemEvents(np.arange(2), np.array([[3, 0], [2, 0], [1, 0]]), np.array([5, NEVER]))
    table = items_table(indexed, events, np.array([False, True]))
    assert table.to_pylist()[0] == {
        "item_id": "a",
        "num_events": 3,
        "num_train_events": 2,
        "num_validation_events": 1,
        "first_event_ts": datetime(1970, 1, 1, microsecond=5, tzinfo=UTC),
        "is_eligible": False,
        "title": "A",
    }
    assert table["first_event_ts"][1].as_py() is None
    assert table.schema.field("item_id").nullable is False


def test_smaller_integers_are_widened():
    indexed = index_catalogue(pa.table({"item_id": pa.array([2, 1], pa.int16())}), pa.int64(), "as_is", "items")
    assert indexed["item_id"].type == pa.int64()
    assert indexed["item_id"].to_pylist() == [1, 2]


@pytest.mark.parametrize(
    ("catalogue", "message"),
    [
        (pa.table({"id": ["a"]}), "no column 'item_id'; the catalogue has id"),
        (pa.table({"item_id": ["b", "a", "b"]}), "item_id 'b' occurs more than once"),
        (pa.table({"item_id": ["a", None]}), "1 rows have no item_id"),
        (pa.table({"item_id": [1]}), "item_id is int64 there, but string in the log"),
        (pa.table({"item_id": ["a"], "num_events": [1]}), "column 'num_events' has a name that"),
    ],
)
def test_a_catalogue_that_cannot_be_indexed_is_refused(catalogue, message):
    with pytest.raises(InputError, match=message):
        index_catalogue(catalogue, pa.string(), "as_is", "items")
