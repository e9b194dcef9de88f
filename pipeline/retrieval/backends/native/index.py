"""The backend for CPUs: kernels in C++ for AMX, AVX-512 (bfloat16 and 8-bit dot products) or AVX2.

B queries, N items, M candidates, Q/X query/item components, D width, P = Q·X pairs, R columns of a table of stage 1.
"""

import ctypes
import math
from collections.abc import Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pipeline.model.mol import MixtureOfLogits, QuerySide
from pipeline.native.interface import declare
from pipeline.retrieval.backends import planes
from pipeline.retrieval.backends.native.interface import FUNCTIONS, Best, Limits, Mask, Vectors
from pipeline.retrieval.backends.native.interface import Table as NativeTable
from pipeline.retrieval.backends.native.layout import ITEMS_AT_ONCE, ItemPlanes, Layout
from pipeline.retrieval.backends.native.memory import huge_pages
from pipeline.retrieval.filters import ShardMask
from pipeline.retrieval.index import FLOAT32_ERROR, Shortlist, Table
from pipeline.retrieval.shard import Shard
from pipeline.settings import SearchSettings, TableDtype

BLOCK = 16  # items of a packed table that lie together
# Largest errors of an inner product of unit vectors. bfloat16 rounds a number by up to 2^-8 of itself, so a vector
# moves by up to 2^-8, and by Cauchy-Schwarz a product of two by up to 2 · 2^-8 + 2^-16; float32 sums add more error.
FLOAT32_PRODUCT_ERROR = 1e-6
BFLOAT16_PRODUCT_ERROR = 2.0**-7 + 2.0**-16 + FLOAT32_PRODUCT_ERROR
DTYPES = {"float32": 0, "bfloat16": 1, "int8": 2, "float64": 3}  # as the C++ side numbers them
PER_GROUP = {"float32": 1, "bfloat16": 2, "int8": 4}  # numbers in the 32 bits of a group
LARGEST_INT8 = 127
LEAST_LARGEST = 1e-30  # replaces a largest number of 0 in a division


class NativeIndex:
    """Implements `ShardIndex`, which documents the operations, on the C++ kernels.

    Holds the shard's rows once, in two planes of 16 bits, and one packed table per stage 1.
    """

    scan_skips = True
    table_dtypes: tuple[TableDtype, ...] = ("float32", "bfloat16", "int8")

    def __init__(self, library: ctypes.CDLL, mol: MixtureOfLogits, shard: Shard, settings: SearchSettings) -> None:
        self.first_row, self._num_items = shard.first_row, len(shard)
        self.num_item_components, self.temperature = mol.settings.num_item_components, mol.temperature
        declare(library, FUNCTIONS)
        self._library, self._dtype = library, settings.table_dtype
        self._num_blocks = int(library.nr_num_blocks(len(shard)))
        self._layout = Layout(mol, int(library.nr_rows()))
        self._rows = ItemPlanes(shard, self._layout)
        stage1_tables: dict[Table, Tensor] = {"mean": shard.mean_ND, "low_rank": shard.low_rank_NR}
        self._tables = {name: self._pack(t, self._dtype) for name, t in stage1_tables.items() if t.shape[1]}
        self._all_items = self._bits(torch.ones(len(shard), dtype=torch.bool))
        self._longest, self._moved = _rounding(shard)

    def __len__(self) -> int:
        return self._num_items

    @property
    def scan_error(self) -> float:
        return FLOAT32_ERROR / self.temperature

    @property
    def product_error(self) -> float:
        return FLOAT32_PRODUCT_ERROR if self._dtype == "float32" else BFLOAT16_PRODUCT_ERROR

    @property
    def bytes_of(self) -> Mapping[str, int]:
        tables = {str(name): table.nbytes for name, table in self._tables.items()}
        return {"components and gate": self._rows.nbytes, **tables}

    def preselect(self, table: Table, queries_BD: Tensor, num_kept: int, mask: ShardMask) -> Shortlist:
        packed = self._table(table)
        queries_BD = queries_BD.float().contiguous()
        scales_B = factors_B = None
        if packed.dtype == "int8":
            scales_B = LARGEST_INT8 / queries_BD.abs().amax(dim=1).clamp_min(LEAST_LARGEST)
            factors_B = 1 / (scales_B * packed.scale)
        vectors = Vectors(queries_BD, *queries_BD.shape, scales_B, factors_B)
        shortlist = _empty_shortlist(len(queries_BD), min(num_kept, len(self)))
        self._library.nr_stage1(vectors, packed.native, self._mask(mask), torch.get_num_threads(), _best(shortlist))
        return shortlist

    def score(self, queries: QuerySide, at_BM: Tensor, is_quick: bool = False) -> Tensor:
        return self._score(queries, at_BM, "bfloat16" if is_quick else "float32")

    def rescore(self, queries: QuerySide, at_BM: Tensor) -> Tensor:
        return self._score(queries, at_BM, "float64")

    def scan(
        self, queries: QuerySide, num_kept: int, mask: ShardMask, floor_B: Tensor, max_scored: int
    ) -> tuple[Shortlist, Tensor]:
        components_BQD, native_queries = self._layout.queries(queries)
        limits = Limits(floor_B.float().contiguous(), self._margins(components_BQD), max_scored)
        shortlist, bound_B = _empty_shortlist(len(floor_B), min(num_kept, len(self))), torch.empty(len(floor_B))
        self._library.nr_scan(
            self._layout.model, self._rows.items, native_queries, self._mask(mask), limits,
            torch.get_num_threads(), _best(shortlist), bound_B.data_ptr(),
        )  # fmt: skip
        return shortlist, bound_B

    def _margins(self, components_BQD: Tensor) -> Tensor:
        """(B,): the most that rounding to bfloat16 can change a logit, from the measured change of the vectors.

        |<f, g> - <f', g'>| <= |f - f'| |g'| + |f| |g - g'| for rounded f', g'.
        """
        scaled_BQD = (components_BQD.double() / self.temperature).float()
        moved_B = (scaled_BQD - planes.round_to_high(scaled_BQD)).norm(dim=2).amax(dim=1)
        length_B = scaled_BQD.norm(dim=2).amax(dim=1)
        exact_B = moved_B * (self._longest + self._moved) + length_B * self._moved
        margin_B: Tensor = 1.001 * exact_B + 10 * FLOAT32_PRODUCT_ERROR / self.temperature
        return margin_B

    def _score(self, queries: QuerySide, at_BM: Tensor, precision: Literal["bfloat16", "float32", "float64"]) -> Tensor:
        at_BM, scores_BM = at_BM.contiguous(), torch.empty(at_BM.shape)
        _, native_queries = self._layout.queries(queries)
        self._library.nr_score_pairs(
            self._layout.model, self._rows.items, native_queries, at_BM.data_ptr(), at_BM.shape[1],
            DTYPES[precision], torch.get_num_threads(), scores_BM.data_ptr(),
        )  # fmt: skip
        return scores_BM

    def _mask(self, mask: ShardMask) -> Mask:
        """The mask for the kernels: the bits of the eligible items, then the exclusions."""
        allowed = self._all_items if mask.is_eligible_N is None else self._bits(mask.is_eligible_N)
        offsets = np.ascontiguousarray(mask.excluded.offsets, dtype=np.int64)
        excluded = np.ascontiguousarray(mask.excluded.values, dtype=np.int32)
        return Mask(allowed, torch.from_numpy(offsets), torch.from_numpy(excluded))

    def _bits(self, is_eligible_N: Tensor) -> Tensor:
        """Pack the flags into bits, one int16 for a block of sixteen items; padding is not eligible."""
        flags = np.zeros(self._num_blocks * BLOCK, dtype=bool)
        flags[: len(self)] = is_eligible_N.numpy()
        return torch.from_numpy(np.packbits(flags, bitorder="little").view(np.int16))

    def _table(self, table: Table) -> "_Packed":
        if table not in self._tables:
            if not isinstance(table, int):
                raise ValueError(f"the shard has no table {table!r}")
            # Components are packed when a method asks for them, and never in 8 bits, whose error has no bound.
            dtype = "float32" if self._dtype == "float32" else "bfloat16"
            self._tables[table] = self._pack(self._rows.component(table), dtype)
        return self._tables[table]

    def _pack(self, rows_NR: Tensor, dtype: str) -> "_Packed":
        rows_NR = rows_NR.float().contiguous()
        largest = float(rows_NR.abs().amax()) if len(rows_NR) else 1.0
        return _Packed(self._library, rows_NR, dtype, LARGEST_INT8 / max(largest, LEAST_LARGEST), self._num_blocks)


class _Packed:
    """A table of stage 1 in blocks of sixteen items (stage1.cpp); 8-bit numbers are the rows' numbers times `scale`."""

    def __init__(self, library: ctypes.CDLL, rows_NR: Tensor, dtype: str, scale: float, num_blocks: int) -> None:
        num_items, dim = rows_NR.shape
        num_groups = math.ceil(dim / PER_GROUP[dtype])
        groups = huge_pages(num_blocks * BLOCK * num_groups, torch.int32)
        starts = torch.zeros(num_blocks * BLOCK, dtype=torch.int32) if dtype == "int8" else None
        self.dtype, self.scale = dtype, scale
        self.nbytes = groups.nbytes + (starts.nbytes if starts is not None else 0)
        self.native = NativeTable(groups, starts, num_items, num_groups, DTYPES[dtype])
        library.nr_pack_table(
            rows_NR.data_ptr(),
            dim,
            scale,
            self.native,
            groups.data_ptr(),
            starts.data_ptr() if starts is not None else None,
        )


def _empty_shortlist(num_queries: int, num_kept: int) -> Shortlist:
    """A shortlist without values, for the kernels to fill."""
    return Shortlist(torch.empty(num_queries, num_kept), torch.empty(num_queries, num_kept, dtype=torch.int64))


def _best(shortlist: Shortlist) -> Best:
    return Best(shortlist.scores_BM, shortlist.at_BM, shortlist.at_BM.shape[1])


def _rounding(shard: Shard) -> tuple[float, float]:
    """The largest length of an item component, and the largest distance by which rounding moves one."""
    longest = moved = 0.0
    for low in range(0, len(shard), ITEMS_AT_ONCE):
        components_NXD = shard.items.components_NXD[low : low + ITEMS_AT_ONCE].float().contiguous()
        longest = max(longest, float(components_NXD.norm(dim=2).max()))
        moved = max(moved, float((components_NXD - planes.round_to_high(components_NXD)).norm(dim=2).max()))
    return longest, moved
