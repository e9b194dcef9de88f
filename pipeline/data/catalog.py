"""The item index, which numbers the items of a night's catalogue."""

import pyarrow as pa
import pyarrow.compute as pc

from pipeline import schema
from pipeline.data.columns import Mask, decode_text, id_type
from pipeline.data.lists import Int64
from pipeline.errors import InputError

COUNTS = ("num_events", "num_train_events", "num_validation_events")
OURS = (*COUNTS, "is_eligible")  # columns of the item index that a catalogue must not have


def index_catalogue(catalogue: pa.Table, item_type: pa.DataType, origin: str) -> pa.Table:
    """The catalogue in ascending order of `item_id`, which comes first and has the log's type.

    Raises InputError for ids that are missing, null, doubled, or of another type than the log's, and for an attribute
    with a name of OURS.
    """
    if "item_id" not in catalogue.column_names:
        raise InputError(f"{origin}: no column 'item_id'; the catalogue has {', '.join(catalogue.column_names)}")
    ids = catalogue["item_id"].combine_chunks()
    if id_type(ids.type, "as_is", "item_id") != item_type:
        raise InputError(
            f"{origin}: item_id is {ids.type} in the catalogue but {item_type} in the log; "
            f"set item_id_type in the source, or cast one of them"
        )
    ids = decode_text(ids)[0].cast(item_type)
    if ids.null_count:
        raise InputError(f"{origin}: {ids.null_count} items have no item_id, or one that is no UTF-8; remove them")
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


def items_table(catalogue: pa.Table, counts: Int64, is_eligible: Mask) -> pa.Table:
    """The item index (`schema.items`): the indexed catalogue with `counts`, (3, items) in the order of COUNTS."""
    attributes = tuple(field for field in catalogue.schema if field.name != "item_id")
    wanted = schema.items(catalogue.schema.field("item_id").type, attributes)
    columns = [
        catalogue["item_id"],
        *(pa.array(row) for row in (*counts, is_eligible)),
        *(catalogue[f.name] for f in attributes),
    ]
    return pa.Table.from_arrays(
        [pa.chunked_array([c]) if isinstance(c, pa.Array) else c for c in columns], schema=wanted
    )
