"""Tonight's rules for whole lists, with what they read of the items. N items of the index, D numbers of a vector."""

import logging

import numpy as np
import polars as pl
import pyarrow as pa

from pipeline.config import nearest
from pipeline.data.columns import Mask
from pipeline.data.lists import Float32, Lists, offsets_of
from pipeline.data.predicates import Condition, check_columns, check_types, holds_for_items, naive_utc, parse_condition
from pipeline.errors import InputError
from pipeline.io.corpus import open_corpus, read_shard, shard_entries
from pipeline.io.histories import read_items
from pipeline.io.night import Night
from pipeline.retrieval.list_rules import ListRules, Need, Quota
from pipeline.settings import Settings

log = logging.getLogger("nightrails")


def read_list_rules(night: Night, settings: Settings, *, of_scores: bool = True) -> ListRules:
    """Read tonight's rules for lists; without `of_scores` those that do not compare scores of the model.

    Raises InputError when the night is not prepared yet, when there is no corpus to compare vectors of, and for a rule
    that `check_list_rules` refuses.
    """
    rules = settings.rules
    conditions = parse_needs(night, settings)
    columns = dict.fromkeys([*rules.at_most, *(name for each in conditions for name in each.whole.item_columns)])
    table = read_items(night.storage, night.histories, ["item_id", *(name for name in columns if name != "item_id")])
    items = naive_utc(pl.DataFrame(pl.from_arrow(table)))
    return ListRules(
        quotas=tuple(
            Quota(f"rules.at_most.{name}", most, values_of(items[name])) for name, most in rules.at_most.items()
        ),
        needs=tuple(
            Need(each.name, need.items, _holds(each, items))
            for each, need in zip(conditions, rules.at_least.values(), strict=True)
        ),
        min_score=rules.min_score if of_scores else None,
        diversity=rules.diversity if of_scores else 0.0,
        vectors_ND=mean_components(night) if of_scores and rules.diversity else None,
    )


def parse_needs(night: Night, settings: Settings) -> tuple[Condition, ...]:
    """Parse the conditions of `rules.at_least`. Raises InputError for one that is no SQL, or reads the query."""
    conditions = tuple(
        parse_condition(f"rules.at_least.{name}", need.of, night.ds) for name, need in settings.rules.at_least.items()
    )
    for condition in conditions:
        if condition.whole.query_columns:
            raise InputError(
                f"{condition.name}: reads query.{condition.whole.query_columns[0]}; a condition of at_least is of the "
                "item alone"
            )
    return conditions


def check_list_rules(night: Night, settings: Settings) -> None:
    """Raise InputError for a rule for lists that tonight's catalogue does not fit: a column that is not there, or types
    that cannot be compared. A need that no item fulfils is named in the log."""
    if not (settings.rules.at_most or settings.rules.at_least):
        return
    conditions = parse_needs(night, settings)
    index = read_items(night.storage, night.histories)
    names = [name for name in index.column_names if name != "is_eligible"]
    for condition in conditions:
        check_columns(condition, names, [], "")
    for name in settings.rules.at_most:
        if name not in names:
            raise InputError(f"rules.at_most.{name}: there is no column item.{name}{nearest(name, names)}")
    schema = naive_utc(pl.DataFrame(pl.from_arrow(index.select(names).slice(0, 0)))).schema
    for condition in conditions:
        check_types(condition, schema, pl.Schema())
    for need in read_list_rules(night, settings, of_scores=False).needs:
        if not need.fulfils_N.any():
            log.warning("%s: no item fulfils it tonight, so no list will", need.name)


def values_of(column: pl.Series) -> Lists:
    """(N,) the values of each item as distinct whole numbers from 0; an item without a value has none.

    The items of a list column have a value for each entry of their list.
    """
    rows = pl.DataFrame({"row": np.arange(len(column)), "value": column})
    if isinstance(column.dtype, pl.List):
        rows = rows.explode("value")
    try:
        rows = rows.drop_nulls("value").unique(maintain_order=True)
        codes = rows["value"].to_arrow().dictionary_encode().indices.to_numpy()
    except (pl.exceptions.PolarsError, pa.ArrowException):
        raise InputError(
            f"rules.at_most.{column.name}: values of the type {column.dtype} cannot be counted; name a column of plain "
            "values, or of lists of them"
        ) from None
    lengths = np.bincount(rows["row"].to_numpy(), minlength=len(column)).astype(np.int64)
    return Lists(offsets_of(lengths), codes.astype(np.int32))


def _holds(condition: Condition, items: pl.DataFrame) -> Mask:
    return holds_for_items(condition.whole, items, {})


def mean_components(night: Night) -> Float32:
    """(N, D) the mean of each item's components, with norm 1. Raises InputError when there is no corpus."""
    storage, corpus = night.storage, night.corpus
    shards = [read_shard(storage, corpus, entry) for entry in shard_entries(open_corpus(storage, corpus))]
    vectors_ND = np.concatenate([shard.mean_ND.float().numpy() for shard in sorted(shards, key=lambda s: s.first_row)])
    norms_N1 = np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    return np.asarray(vectors_ND / np.maximum(norms_N1, 1e-12), dtype=np.float32)
