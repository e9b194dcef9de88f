"""The features of tonight's items. No import of torch here: `prepare` reads them too, to refuse what they cannot be."""

import polars as pl

from pipeline.config import nearest
from pipeline.data.content import features_of
from pipeline.data.lists import Lists
from pipeline.errors import InputError
from pipeline.io.histories import read_items
from pipeline.io.night import Night
from pipeline.settings import Settings


def read_features(night: Night, settings: Settings) -> Lists:
    """(N,) the features of each item, by `model.content`.

    Raises InputError for a column that the catalogue does not have, or whose values are of another kind.
    """
    content = settings.model.content
    index = read_items(night.storage, night.histories)
    missing = [name for name in content.columns if name not in index.column_names]
    if missing:
        raise InputError(
            f"model.content: the catalogue has no column {missing[0]!r}{nearest(missing[0], index.column_names)}"
            + ("" if night.inputs.items else "; there is no catalogue: set items.uri")
        )
    return features_of(pl.DataFrame(pl.from_arrow(index.select(list(content.columns)))), content)
