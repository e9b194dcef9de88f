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
    """(N,) the features of each item, by `model.content`. Raises InputError for values of another kind."""
    columns = list(settings.model.content.columns)
    return features_of(
        pl.DataFrame(pl.from_arrow(read_items(night.storage, night.histories, columns))), settings.model.content
    )


def check_content(night: Night, settings: Settings) -> None:
    """Raise InputError for a column that the catalogue does not have, or whose values are of another kind."""
    if not settings.model.content.columns:
        return
    known = read_items(night.storage, night.histories).column_names
    for name in settings.model.content.columns:
        if name not in known:
            no_catalogue = "" if night.inputs.items else "; there is no catalogue: set items.uri"
            raise InputError(f"model.content: the catalogue has no column {name!r}{nearest(name, known)}{no_catalogue}")
    read_features(night, settings)
