"""The job of prepare: the values that its tasks share, and the pieces that the log is cut into."""

from dataclasses import dataclass

import pyarrow as pa

from pipeline.data.catalog import index_catalogue, without_dictionaries
from pipeline.data.period import Period
from pipeline.data.seen import SeenRule
from pipeline.data.sources import IdType
from pipeline.errors import InputError
from pipeline.io.inputs import Files, Log
from pipeline.io.night import Night
from pipeline.io.parquet import read_bounded
from pipeline.io.rows import LogColumns
from pipeline.io.storage.base import Storage
from pipeline.settings import Settings
from pipeline.stages.prepare.parts import Part

TEXT_ROW_BYTES = 32  # bytes per row of a text file: a guess


@dataclass(frozen=True)
class Piece:
    """A piece of one log file: some row groups of a Parquet file, or a whole text file."""

    file: int  # index into the files of its part
    first_row: int
    row_groups: tuple[int, ...] | None  # None: a text file
    num_rows: int  # a guess for a text file


@dataclass(frozen=True)
class MapTask:
    """A task of the first pass; tasks of a part are numbered from 0."""

    part: Part
    number: int
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Job:
    """The values that every task needs: the night, the settings and the columns of the log's files."""

    night: Night
    settings: Settings
    columns: LogColumns
    parts: tuple[Part, ...]

    @property
    def period(self) -> Period:
        """What the night sees of the log, if the log does not go on after it."""
        prepare = self.settings.prepare
        return Period.until(
            self.night.ds,
            self.settings.log.time_zone,
            lookback=prepare.lookback_days,
            seen=SeenRule.of(prepare),
            is_partitioned=self.log.is_partitioned,
        )

    @property
    def storage(self) -> Storage:
        return self.night.storage

    @property
    def log(self) -> Log:
        return self.night.inputs.log


def read_catalogue(items: Files, item_type: pa.DataType, declared: IdType, max_gigabytes: float) -> pa.Table:
    """The catalogue in ascending order of `item_id`.

    Raises InputError when it takes more than `max_gigabytes` in memory, its files differ in their columns, or its
    `item_id` is not of `item_type`, the log's.
    """
    tables: list[pa.Table] = []
    max_bytes = int(max_gigabytes * 1e9)
    for file in items.files:
        with items.open(file) as source:
            table = read_bounded(source, items.origin(file), None, max_bytes - sum(t.nbytes for t in tables))
        tables.append(without_dictionaries(table))
    try:
        catalogue = pa.concat_tables(tables, promote_options="permissive")
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise InputError(f"{items.uri}: the files of the catalogue differ in their columns ({error})") from None
    return index_catalogue(catalogue, item_type, declared, items.name)


def cut_pieces(log: Log, columns: LogColumns, part: Part, rows_per_task: int) -> list[tuple[Piece, ...]]:
    """Cut a part, in its order, into tasks of about `rows_per_task` rows; row groups and text files stay whole."""
    pieces = []
    of_part = slice(part.first_file, part.first_file + part.num_files)
    for number, (file, group_rows) in enumerate(zip(log.files[of_part], columns.group_rows[of_part], strict=True)):
        if log.source.format == "csv":
            pieces.append(Piece(number, 0, None, file.size // TEXT_ROW_BYTES))
        first = 0
        for group, rows in enumerate(group_rows):
            pieces.append(Piece(number, first, (group,), rows))
            first += rows
    tasks: list[list[Piece]] = []
    room = 0
    for piece in pieces:
        if not tasks or piece.num_rows > room:
            tasks.append([])
            room = rows_per_task
        tasks[-1].append(piece)
        room -= piece.num_rows
    return [tuple(task) for task in tasks]


def event_table(columns: LogColumns) -> pa.Table:
    """An empty table with the columns of the first pass's segments."""
    return pa.schema(
        [
            ("user_id", columns.user_type),
            ("item_id", columns.item_type),
            ("event_ts", pa.int64()),
            ("weight", pa.float32()),
            ("event_type", pa.string()),
            ("event_id", pa.string()),
            ("file", pa.int32()),
            ("row", pa.int64()),
            ("is_learned", pa.bool_()),
        ]
    ).empty_table()
