"""The columns of the catalogue that are published beside each item (`output.item_columns`)."""

import pyarrow as pa

from pipeline import schema
from pipeline.config import nearest
from pipeline.errors import InputError
from pipeline.io.histories import read_items
from pipeline.io.night import Night
from pipeline.settings import Settings


def published_columns(night: Night, settings: Settings) -> pa.Table:
    """The columns, a row per item; no column unless they are asked for."""
    names = list(dict.fromkeys(settings.output.item_columns))
    return read_items(night.storage, night.histories, names) if names else pa.table({})


def check_item_columns(night: Night, settings: Settings) -> None:
    """Raise InputError for a column that the item index does not have, or that has a name of the published table."""
    if not settings.output.item_columns:
        return
    known = read_items(night.storage, night.histories).column_names
    for name in settings.output.item_columns:
        if name not in known:
            raise InputError(f"output.item_columns: the catalogue has no column {name!r}{nearest(name, known)}")
        if name in {*schema.candidates(pa.string(), pa.string()).names, "item_ids", "scores"}:
            raise InputError(f"output.item_columns: the published table has a column {name!r} of its own; rename it")
