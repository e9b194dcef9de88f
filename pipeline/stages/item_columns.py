"""The columns of the catalogue that are published beside each item (`output.item_columns`)."""

import pyarrow as pa

from pipeline import schema
from pipeline.config import nearest
from pipeline.errors import InputError
from pipeline.io.histories import read_items
from pipeline.io.night import Night
from pipeline.settings import Settings


def published_columns(night: Night, settings: Settings) -> pa.Table:
    """The columns, a row per item; none unless they are asked for.

    Raises InputError for a column that the item index does not have, or that has a name of the published table.
    """
    names = list(dict.fromkeys(settings.output.item_columns))
    index = read_items(night.storage, night.histories)
    for name in names:
        if name not in index.column_names:
            raise InputError(
                f"output.item_columns: the catalogue has no column {name!r}{nearest(name, index.column_names)}"
            )
        if name in {*schema.candidates(pa.string(), pa.string()).names, "item_ids", "scores"}:
            raise InputError(f"output.item_columns: the published table has a column {name!r} of its own; rename it")
    return index.select(names)
