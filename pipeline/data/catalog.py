"""The item index, which numbers the items of a night's catalogue."""

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import schema
from pipeline.data.columns import Mask, plain_type, plain_values
from pipeline.data.ids import ids_of_table
from pipeline.data.item_events import NEVER, ItemEvents
from pipeline.data.sources import IdType
from pipeline.errors import InputError

COUNTS = ("num_events", "num_train_events", "num_validation_events")
OURS = (*COUNTS, "first_event_ts", "is_eligible")  # columns of the item index that a catalogue must not have


def index_catalogue(catalogue: pa.Table, item_type: pa.DataType, declared: IdType, origin: str) -> pa.Table:
    """The catalogue in ascending order of `item_id`, which comes first and has the log's type; `declared` is the log's
    item_id_type.

    Raises InputError for ids that are missing, null, doubled, or of another type than the log's, and for an attribute
    with a name of OURS.
    """
    if "item_id" not in catalogue.column_names:
        raise InputError(f"{origin}: no column 'item_id'; the catalogue has {', '.join(catalogue.column_names[:20])}")
    ids = ids_of_table(catalogue["item_id"], "item_id", item_type, declared, origin)
    taken = set(OURS) & set(catalogue.column_names)
    if taken:
        raise InputError(f"{origin}: column {min(taken)!r} has a name that the item index needs; rename it")
    order = pc.sort_indices(ids)
    ids = ids.take(order)
    doubled = pc.equal(ids.slice(1), ids.slice(0, max(0, len(ids) - 1)))
    if pc.any(doubled).as_py():
        example = ids.filter(pc.equal(pa.concat_arrays([pa.array([False]), doubled]), True))[0].as_py()
        raise InputError(f"{origin}: item_id {example!r} occurs more than once; keep one row per item")
    attributes = catalogue.drop_columns(["item_id"])
    fields = [pa.field("item_id", item_type, nullable=False), *attributes.schema]
    columns = [pa.chunked_array([ids]), *(column.take(order) for column in attributes.columns)]
    return pa.Table.from_arrays(columns, schema=pa.schema(fields))


def without_dictionaries(table: pa.Table) -> pa.Table:
    """The table with the values of its dictionaries written out, as files that differ in this need it."""
    for number, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):
            chunks = [plain_values(chunk) for chunk in table[number].chunks]
            values = pa.chunked_array(chunks or [pa.array([], plain_type(field.type))])
            table = table.set_column(number, field.name, values)
    return table


def items_table(catalogue: pa.Table, events: ItemEvents, is_eligible: Mask) -> pa.Table:
    """The item index (`schema.items`): the indexed catalogue with the events of all its items."""
    attributes = tuple(field for field in catalogue.schema if field.name != "item_id")
    wanted = schema.items(catalogue.schema.field("item_id").type, attributes)
    columns = [
        catalogue["item_id"],
        *(pa.array(counts) for counts in events.counts_3R),
        pa.array(events.first_R, schema.TIMESTAMP, mask=events.first_R == NEVER),
        pa.array(is_eligible),
        *(catalogue[f.name] for f in attributes),
    ]
    return pa.Table.from_arrays(
        [pa.chunked_array([c]) if isinstance(c, pa.Array) else c for c in columns], schema=wanted
    )
