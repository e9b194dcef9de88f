"""Settings of `conf/sources/`: how a log of any shape is read as ours."""

from datetime import date
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from pipeline.config import Config, TimeZone

IdType = Literal["as_is", "string", "int64"]
TimeUnit = Literal["timestamp", "s", "ms", "us", "ns", "relative_s"]
NAMED_TIME_FORMATS = {
    "rfc2822": "%a, %d %b %Y %H:%M:%S %z",  # of mails and HTTP
    "apache": "%d/%b/%Y:%H:%M:%S %z",  # of access logs
    "ctime": "%a %b %d %H:%M:%S %Y",  # of C
}
OptionalColumn = Literal["event_type", "event_value", "event_id"]


def _with_text_keys(weights: Any) -> Any:
    for key in weights if isinstance(weights, dict) else ():
        if isinstance(key, bool):
            raise ValueError(f"YAML reads a key as {key} (yes, no, on and off too); put it in quotes, as in 'yes': 1.0")
        if not isinstance(key, str):
            raise ValueError(f"the key {key} is a number for YAML; put it in quotes, as in '{key}': 1.0")
    return weights


class ColumnMap(Config):
    """Our names on the left, the log's on the right. An empty optional name: the log has no such column."""

    user_id: str = Field(default="user_id", min_length=1)
    item_id: str = Field(default="item_id", min_length=1)
    event_ts: str = Field(default="event_ts", min_length=1)
    event_type: str = ""
    event_value: str = ""
    event_id: str = ""

    @property
    def named(self) -> dict[str, str]:
        """Our name to the log's, for the columns that the map names."""
        return {ours: theirs for ours, theirs in self.model_dump().items() if theirs}


class CsvFormat(Config):
    """How delimited text is decoded and cut into columns. Compression is seen by the content of a file."""

    delimiter: str = Field(default=",", min_length=1)  # more than one character is fine: '::'
    quote: str = Field(default='"', max_length=1)  # empty: quotes mean nothing
    escape: str = Field(default="", max_length=1)  # the next character means nothing: '\\' as MySQL writes \"
    encoding: str = "utf-8"  # a name that Python knows: latin-1, cp1252; a byte order mark of UTF-16 needs no name
    skip_rows: int = Field(default=0, ge=0)  # lines before the header, or before the first row
    comment: str = ""  # after these lines, lines that begin with this text are skipped, up to the header
    column_names: tuple[str, ...] = Field(default=(), strict=False)  # in order, when the files have no header

    @model_validator(mode="after")
    def _characters_differ(self) -> Self:
        if not (len(self.delimiter) == 1 and self.delimiter.isascii()) and (self.quote or self.escape):
            raise ValueError(
                f"a delimiter of several characters, or outside ASCII, ({self.delimiter!r}) works only with quote: '' "
                "and escape: ''"
            )
        if not (self.quote + self.escape).isascii():
            raise ValueError(f"quote ({self.quote!r}) and escape ({self.escape!r}) must be ASCII characters")
        used = [text for text in (self.delimiter, self.quote, self.escape) if text]
        if len(set(used)) < len(used) or any("\n" in text or "\r" in text for text in used):
            raise ValueError("delimiter, quote and escape must differ and must not hold an end of line")
        return self

    @field_validator("encoding")
    @classmethod
    def _is_known(cls, encoding: str) -> str:
        try:
            b"a".decode(encoding, "replace")
        except (LookupError, UnicodeError):
            raise ValueError(
                f"no encoding of text is called {encoding!r}; utf-8, latin-1, cp1252 and utf-16 are"
            ) from None
        return encoding


class SourceSpec(Config):
    """One file of `conf/sources/`."""

    format: Literal["parquet", "csv"] = "parquet"
    files: str = "*"  # pattern: in a folder, the files whose name matches are the log
    csv: CsvFormat = CsvFormat()
    columns: ColumnMap = ColumnMap()
    time_unit: TimeUnit = "timestamp"  # timestamp: typed in Parquet, ISO 8601 in text, UTC where no zone is given
    # How the text (or the digits) of a time is written, as Python's strptime has it, or a name of NAMED_TIME_FORMATS.
    time_format: str = ""
    time_zone: TimeZone = "UTC"  # of times that name none; where clocks go back, the first of two equal times
    time_origin: date = Field(default=date(2000, 1, 1), strict=False)  # the day of second 0, for relative_s
    user_id_type: IdType = "as_is"  # as_is: string or int64 by the Parquet type, string for text
    item_id_type: IdType = "as_is"
    event_type: str = ""  # the type of every event, for a log without a column for it
    # By event type; none given: every type is known.
    event_weights: Annotated[dict[str, float], BeforeValidator(_with_text_keys)] = Field(default_factory=dict)
    default_weight: float = Field(default=1.0, ge=0.0)  # weight of the types that event_weights lacks
    unknown_event_types: Literal["error", "ignore", "weight"] = "error"  # types that event_weights lacks
    value_is_weight: bool = False  # multiply the type's weight by event_value (a rating, a share watched)
    # Words in the id columns that mean nobody: their rows are left out. None: not decided; the common ones (nan, None,
    # null, …) are read as ids and counted, and many of them are refused. (): every word is an id.
    null_words: tuple[str, ...] | None = Field(default=None, strict=False)
    optional_columns: tuple[OptionalColumn, ...] = Field(default=(), strict=False)  # the log may lack these

    @model_validator(mode="after")
    def _one_way_to_read_times(self) -> Self:
        if self.time_format and self.time_unit != "timestamp":
            raise ValueError("give time_format (of text) or time_unit (of numbers), not both")
        return self

    @model_validator(mode="after")
    def _one_event_type(self) -> Self:
        if self.event_type and self.columns.event_type:
            raise ValueError("give event_type (one for all events) or columns.event_type, not both")
        if any(weight < 0 for weight in self.event_weights.values()):
            raise ValueError("event_weights must not be negative")
        if self.value_is_weight and not self.columns.event_value:
            raise ValueError("value_is_weight needs columns.event_value")
        return self
