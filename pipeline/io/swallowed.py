"""Find the values in which a stray quote has hidden rows.

A value that begins with a quote runs on to the next quote, over the ends of lines. A text of several lines is meant so;
a quote that is a part of the text swallows the rows up to the next quote, and no parser can tell the two apart. What
tells is a text between two delimiters that is written as times are in this file; where times are short numbers, it must
also stand in the place of the time, in a line with the columns of a row.
"""

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.columns import Mask, mask_of

LONG = 8  # characters: no text has such a number between two delimiters by chance
END_OF_LINE = r"\r\n|\r|\n"


def rows_with_hidden_rows(table: pa.Table, time: int, delimiter: str) -> Mask:
    """For each row of a table of all the columns of a file, as bytes, whether a value of it holds another row.

    `time` is the number of the column with the time.
    """
    several = {n: rows for n in range(table.num_columns) if len(rows := _rows_of_several_lines(table.column(n)))}
    hides = np.zeros(table.num_rows, dtype=np.bool_)
    if not several:
        return hides
    has_several = hides.copy()
    has_several[np.concatenate(list(several.values()))] = True
    times = _Times(table.column(time).filter(pa.array(~has_several | has_several.all())))
    for number, rows in several.items():
        if number == time:
            hides[rows] = True
            continue
        lines = _Lines(table.column(number).combine_chunks().take(pa.array(rows)), delimiter)
        hides[rows[lines.with_rows(number, time, table.num_columns, times)]] = True
    return hides


def _rows_of_several_lines(column: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    values = column.combine_chunks()
    if not _has_end_of_line(values):
        return np.zeros(0, dtype=np.int64)
    return np.flatnonzero(mask_of(pc.match_substring_regex(values, "[\r\n]")))


def _has_end_of_line(values: pa.Array) -> bool:
    data = values.buffers()[2]
    text = data.to_pybytes() if data else b""
    return b"\n" in text or b"\r" in text


class _Lines:
    """The lines of values of several lines, cut into cells."""

    def __init__(self, values: pa.Array, delimiter: str) -> None:
        lines = pc.split_pattern_regex(values, END_OF_LINE)
        starts, self.value = _starts(lines), pc.list_parent_indices(lines).to_numpy()
        self.is_first = np.zeros(len(self.value), dtype=np.bool_)
        self.is_last = self.is_first.copy()
        self.is_first[starts[:-1]] = True
        self.is_last[starts[1:] - 1] = True
        cells = pc.split_pattern(lines.flatten(), delimiter)
        self.first_cell, self.cells = _starts(cells), cells.flatten()

    def with_rows(self, number: int, time: int, num_columns: int, times: "_Times") -> npt.NDArray[np.int64]:
        """The values with a line that looks like a row.

        The values are those of column `number`: before the first line stand the columns before it, and behind the last
        line those after it.
        """
        num_cells = np.diff(self.first_cell)
        if times.are_long:  # a time in any place will do: a line with a stray quote may lack columns
            return np.unique(np.repeat(self.value, num_cells)[times.include(self.cells)])
        first_column = np.where(self.is_first, number, 0)
        num_after = np.where(self.is_last, num_columns - 1 - number, 0)
        has_time = (first_column <= time) & (time - first_column < num_cells)
        lines = np.flatnonzero(has_time & (first_column + num_cells + num_after >= num_columns))
        cells = self.cells.take(pa.array(self.first_cell[lines] + time - first_column[lines]))
        return np.unique(self.value[lines[times.include(cells)]])


def _starts(lists: pa.ListArray) -> npt.NDArray[np.int64]:
    """Where each list begins among the values of all, and where the last ends."""
    return np.concatenate([[0], np.cumsum(pc.list_value_length(lists).to_numpy())]).astype(np.int64)


class _Times:
    """How times are written in a file: their marks and lengths. Without digits among them, all texts pass."""

    def __init__(self, times: pa.ChunkedArray) -> None:
        with_digits = times.filter(pc.match_substring_regex(times, "[0-9]"))
        self.marks = pc.unique(_marks(with_digits))
        self.lengths = pc.min_max(pc.binary_length(with_digits)).as_py()
        self.are_long = len(self.marks) > 0 and self.lengths["min"] >= LONG

    def include(self, texts: pa.Array) -> Mask:
        """Whether a text may be a time: the marks of one, and at least half and at most twice as long as some."""
        if not len(self.marks):
            return np.ones(len(texts), dtype=np.bool_)
        lengths = pc.binary_length(texts).to_numpy()
        is_time: Mask = (2 * lengths >= self.lengths["min"]) & (lengths <= 2 * self.lengths["max"])
        is_time[is_time] = mask_of(pc.is_in(_marks(texts.filter(pa.array(is_time))), self.marks))
        return is_time


def _marks(texts: pa.Array | pa.ChunkedArray) -> pa.Array | pa.ChunkedArray:
    """The texts with one 0 for each number in them."""
    return pc.replace_substring_regex(texts, "[0-9]+", "0")
