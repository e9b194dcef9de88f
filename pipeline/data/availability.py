"""The items that may be shown at the end of a day, by the catalogue's columns `status` and `available_from/until`."""

from collections.abc import Iterator
from datetime import date

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.columns import DAY_US, EPOCH, Mask, decode_text, mask_of, numpy_of
from pipeline.errors import InputError
from pipeline.settings import ItemsSettings

STATUS, FROM, UNTIL = "status", "available_from", "available_until"
MAX_EXAMPLES = 5


def is_eligible(catalogue: pa.Table, settings: ItemsSettings, ds: date, origin: str) -> Mask:
    """(N,): which items may be shown in the last moment of `ds`, UTC. A null hides none, nor does a missing column.

    An item may be shown from `available_from` on and before `available_until`; a date there means its whole day. Raises
    InputError for a status that the settings do not know, a time that is none, and when no item is left.
    """
    eligible = np.ones(catalogue.num_rows, dtype=bool)
    if STATUS in catalogue.column_names:
        eligible &= ~_is_hidden(catalogue[STATUS], settings, origin)
    if FROM in catalogue.column_names:
        begins, is_known = _times(catalogue[FROM], FROM, origin, end_of_day=False)
        eligible &= ~is_known | (begins <= _last_moment(ds))
    if UNTIL in catalogue.column_names:
        eligible &= is_before_end(catalogue[UNTIL], UNTIL, ds, origin)
    if len(eligible) and not eligible.any():
        used = ", ".join(name for name in (STATUS, FROM, UNTIL) if name in catalogue.column_names)
        raise InputError(f"{origin}: by the columns {used} none of its {len(eligible)} items may be shown on {ds}")
    return eligible


def is_before_end(column: pa.ChunkedArray, name: str, ds: date, origin: str) -> Mask:
    """Whether the last moment of `ds`, UTC, is before each end; a date ends with its day, and a null never ends.

    Raises InputError for a column that holds neither times nor dates.
    """
    ends, is_known = _times(column, name, origin, end_of_day=True)
    return ~is_known | (ends > _last_moment(ds))


def _last_moment(ds: date) -> int:
    return ((ds - EPOCH).days + 1) * DAY_US - 1


def _is_hidden(column: pa.ChunkedArray, settings: ItemsSettings, origin: str) -> Mask:
    """Whether each status is one of `hidden_statuses`; case and spaces around it do not matter."""
    text = _text(column, STATUS, origin)
    words = pc.utf8_lower(pc.utf8_trim_whitespace(text))
    known = pa.array([*settings.live_statuses, *settings.hidden_statuses], pa.string())
    unknown = text.filter(pc.and_(pc.is_valid(words), pc.invert(pc.is_in(words, known))))
    if len(unknown):
        raise InputError(
            f"{origin}, column {STATUS!r}: {', '.join(_most_frequent(unknown))} are in neither items.live_statuses nor "
            "items.hidden_statuses; add each to one of the two lists"
        )
    return mask_of(pc.is_in(words, pa.array(settings.hidden_statuses, pa.string())))


def _text(column: pa.ChunkedArray, name: str, origin: str) -> pa.Array:
    values, _ = decode_text(column.combine_chunks())
    try:
        return values.cast(pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise InputError(f"{origin}, column {name!r}: {values.type} is no text; write it as text") from None


def _most_frequent(values: pa.Array) -> Iterator[str]:
    counted = sorted(pc.value_counts(values).to_pylist(), key=lambda entry: -entry["counts"])
    for entry in counted[:MAX_EXAMPLES]:
        yield f"{entry['values']!r} ({entry['counts']} items)"


def _times(column: pa.ChunkedArray, name: str, origin: str, *, end_of_day: bool) -> tuple[np.ndarray, Mask]:
    """The times in µs since 1970, and whether each is known; a date is the beginning or the end of its day."""
    values = column.combine_chunks()
    is_date = pa.types.is_date(values.type)
    if not is_date and not pa.types.is_timestamp(values.type):
        raise InputError(
            f"{origin}, column {name!r}: {values.type} is neither a time nor a date; write it as one of them"
        )
    micros = values.cast(pa.timestamp("us", getattr(values.type, "tz", None)), safe=False).cast(pa.int64())
    shift = DAY_US if is_date and end_of_day else 0
    return numpy_of(pc.fill_null(micros, 0)) + shift, mask_of(pc.is_valid(micros))
