"""Find the values in which a stray quote has hidden rows.

A value that begins with a quote runs on to the next quote, over the ends of lines. A text of several lines is meant so;
a quote that is a part of the text swallows the rows up to the next quote, and no parser can tell the two apart. What
tells is a line of the value that has the columns of a row and, in the place of the time, a text that is written as the
time of the record is.
"""

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.data.columns import Mask, mask_of

END_OF_LINE = r"\r\n|\r|\n"


def rows_with_hidden_rows(table: pa.Table, time: int, delimiter: str) -> Mask:
    """For each row of a table of all the columns of a file, as bytes, whether a value of it holds another row.

    `time` is the number of the column with the time.
    """
    hides = np.zeros(table.num_rows, dtype=np.bool_)
    for number, column in enumerate(table.columns):
        values = column.combine_chunks()
        if not _has_end_of_line(values):
            continue
        rows = np.flatnonzero(mask_of(pc.match_substring_regex(values, "[\r\n]")))
        if number == time:
            hides[rows] = True
            continue
        chosen = pa.array(rows)
        times = table.column(time).combine_chunks().take(chosen)
        lines = _Lines(values.take(chosen), delimiter)
        hides[rows[lines.rows_among(number, time, table.num_columns, times)]] = True
    return hides


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

    def rows_among(self, number: int, time: int, num_columns: int, times: pa.Array) -> npt.NDArray[np.int64]:
        """The values with a line that looks like a row.

        The values are those of column `number`: before the first line stand the columns before it, and behind the last
        line those after it. `times` is the time of each value's record.
        """
        first_column = np.where(self.is_first, number, 0)
        num_after = np.where(self.is_last, num_columns - 1 - number, 0)
        num_cells = np.diff(self.first_cell)
        has_time = (first_column <= time) & (time - first_column < num_cells)
        lines = np.flatnonzero(has_time & (first_column + num_cells + num_after >= num_columns))
        cells = self.cells.take(pa.array(self.first_cell[lines] + time - first_column[lines]))
        own = times.take(pa.array(self.value[lines]))
        return np.unique(self.value[lines[_written_alike(cells, own)]])


def _starts(lists: pa.ListArray) -> npt.NDArray[np.int64]:
    """Where each list begins among the values of all, and where the last ends."""
    return np.concatenate([[0], np.cumsum(pc.list_value_length(lists).to_numpy())]).astype(np.int64)


def _written_alike(cells: pa.Array, times: pa.Array) -> Mask:
    """Whether a cell has the marks of a time, with digits in the same places; a time without digits says nothing."""
    is_alike = mask_of(pc.equal(_marks(cells), _marks(times)))
    is_long = mask_of(pc.greater_equal(pc.multiply(pc.binary_length(cells), 2), pc.binary_length(times)))
    has_digits = mask_of(pc.match_substring_regex(times, "[0-9]"))
    is_time: Mask = (is_alike & is_long) | ~has_digits
    return is_time


def _marks(texts: pa.Array) -> pa.Array:
    return pc.replace_substring_regex(texts, "[0-9]+", "0")
