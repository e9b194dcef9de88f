"""The backend for CPUs: kernels in C++ for AVX-512 (bfloat16 and 8-bit dot products) or AVX2, chosen at run time.

B queries, N items, M candidates, Q/X query/item components, D width, P = Q·X pairs, H hidden, G groups, R columns.
"""

import ctypes
import math
from collections.abc import Mapping
from ctypes import c_double, c_float, c_int, c_int64, c_void_p

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from pipeline.model.mol import MixtureOfLogits, QuerySide
from pipeline.retrieval.backends.native.library import huge_pages
from pipeline.retrieval.filters import ShardMask
from pipeline.retrieval.index import FLOAT32_ERROR, Shortlist, Table
from pipeline.retrieval.shard import Shard
from pipeline.settings import SearchSettings, TableDtype

LINE = 32  # numbers of 16 bits in a cache line
ITEMS_AT_ONCE = 65_536
# Of an inner product of unit vectors. bfloat16 rounds a number by up to 2^-8 of itself, so a vector moves by up to
# 2^-8, and by Cauchy-Schwarz a product of two by up to 2 · 2^-8 + 2^-16; float32 sums add their own.
FLOAT32_PRODUCT_ERROR = 1e-6
BFLOAT16_PRODUCT_ERROR = 2.0**-7 + 2.0**-16 + FLOAT32_PRODUCT_ERROR
DTYPES = {"float32": 0, "bfloat16": 1, "int8": 2, "float64": 3}
PER_GROUP = {"float32": 1, "bfloat16": 2, "int8": 4}


class NativeModel(ctypes.Structure):
    """`Model` of mol.h."""

    _fields_ = (
        ("query_components", c_int),
        ("item_components", c_int),
        ("width", c_int),
        ("hidden", c_int),
        ("in_weight", c_void_p),
        ("in_bias", c_void_p),
        ("out_weight", c_void_p),
        ("out_bias", c_void_p),
        ("is_pair", c_void_p),
        ("scale", c_double),
    )


class NativeItems(ctypes.Structure):
    """`Items` of items.h."""

    _fields_ = (("high", c_void_p), ("low", c_void_p), ("stride", c_int64), ("width", c_int))


class NativeQueries(ctypes.Structure):
    """`Queries` of stage2.cpp."""

    _fields_ = (("components", c_void_p), ("gates", c_void_p), ("num_queries", c_int64))


class NativeIndex:
    """Serves `ShardIndex`. Holds the shard's rows once, in two planes of 16 bits, and one packed table per stage 1."""

    scan_skips = True
    table_dtypes: tuple[TableDtype, ...] = ("float32", "bfloat16", "int8")

    def __init__(self, library: ctypes.CDLL, mol: MixtureOfLogits, shard: Shard, settings: SearchSettings) -> None:
        self.first_row, self._num_items = shard.first_row, len(shard)
        self.num_item_components, self.temperature = mol.settings.num_item_components, mol.temperature
        self._library, self._dtype = library, settings.table_dtype
        self._layout = _Layout(mol, int(library.nr_rows()))
        self._planes = _split(shard, self._layout)
        self._items = NativeItems(*(c_void_p(p.data_ptr()) for p in self._planes), *self._layout.item_sizes)
        self._tables: dict[Table, _Packed] = {
            name: self._pack(rows_NR, self._dtype)
            for name, rows_NR in _stage1_tables(shard).items()
            if rows_NR.shape[1]
        }
        self._all_items = _bits(torch.ones(len(shard), dtype=torch.bool), self._num_blocks)
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
        sizes = {"components and gate": sum(plane.nbytes for plane in self._planes)}
        return sizes | {str(name): table.nbytes for name, table in self._tables.items()}

    def preselect(self, table: Table, queries_BD: Tensor, num_kept: int, mask: ShardMask) -> Shortlist:
        packed = self._tables.get(table)
        if packed is None and isinstance(table, int):
            # Components are packed when a method asks for them, and never in 8 bits, whose error has no bound.
            dtype = "float32" if self._dtype == "float32" else "bfloat16"
            packed = self._tables[table] = self._pack(self._component(table), dtype)
        if packed is None:
            raise ValueError(f"the shard has no table {table!r}")
        num_queries, num_kept = len(queries_BD), min(num_kept, len(self))
        queries_BD = queries_BD.float().contiguous()
        scores_BM, at_BM = torch.empty(num_queries, num_kept), torch.empty(num_queries, num_kept, dtype=torch.int64)
        scales_B = 127 / queries_BD.abs().amax(dim=1).clamp_min(1e-30)
        factors_B = 1 / (scales_B * packed.scale)
        is_int8 = packed.dtype == "int8"
        (offsets, excluded), allowed = _lists(mask), self._allowed_by(mask)
        self._library.nr_stage1(
            _at(queries_BD), c_int64(num_queries), c_int(queries_BD.shape[1]),
            _at(packed.groups), _at(packed.starts), _at(allowed), c_int64(len(self)),
            c_int(packed.num_groups), c_int(DTYPES[packed.dtype]),
            _at(scales_B) if is_int8 else None, _at(factors_B) if is_int8 else None,
            c_int(num_kept), _at(offsets), _at(excluded), c_int(torch.get_num_threads()), _at(scores_BM), _at(at_BM),
        )  # fmt: skip
        return Shortlist(scores_BM, at_BM)

    def score(self, queries: QuerySide, at_BM: Tensor, is_quick: bool = False) -> Tensor:
        return self._score(queries, at_BM, "bfloat16" if is_quick else "float32")

    def rescore(self, queries: QuerySide, at_BM: Tensor) -> Tensor:
        return self._score(queries, at_BM, "float64")

    def scan(
        self, queries: QuerySide, num_kept: int, mask: ShardMask, floor_B: Tensor, max_scored: int
    ) -> tuple[Shortlist, Tensor]:
        num_queries, num_kept = len(floor_B), min(num_kept, len(self))
        scores_BM, at_BM = torch.empty(num_queries, num_kept), torch.empty(num_queries, num_kept, dtype=torch.int64)
        floor_B, bound_B = floor_B.float().contiguous(), torch.empty(num_queries)
        (offsets, excluded), allowed = _lists(mask), self._allowed_by(mask)
        sides, native = self._layout.queries(queries)
        margin_B = self._margins(sides[0])
        self._library.nr_scan(
            ctypes.byref(self._layout.model), ctypes.byref(self._items), ctypes.byref(native),
            _at(allowed), c_int64(len(self)), c_int(num_kept), _at(floor_B),
            c_int64(max_scored), _at(margin_B), _at(offsets), _at(excluded), c_int(torch.get_num_threads()),
            _at(scores_BM), _at(at_BM), _at(bound_B),
        )  # fmt: skip
        del sides
        return Shortlist(scores_BM, at_BM), bound_B

    def _margins(self, components_BQD: Tensor) -> Tensor:
        """(B,): by how much at most rounding to bfloat16 moves a logit, from how far it really moves the vectors.

        |<f, g> - <f', g'>| <= |f - f'| |g'| + |f| |g - g'| for rounded f', g'.
        """
        scaled_BQD = (components_BQD.double() / self.temperature).float()
        moved_B = (scaled_BQD - _rounded(scaled_BQD)).norm(dim=2).amax(dim=1)
        length_B = scaled_BQD.norm(dim=2).amax(dim=1)
        exact_B = moved_B * (self._longest + self._moved) + length_B * self._moved
        margin_B: Tensor = 1.001 * exact_B + 10 * FLOAT32_PRODUCT_ERROR / self.temperature
        return margin_B

    def _score(self, queries: QuerySide, at_BM: Tensor, precision: str) -> Tensor:
        at_BM, scores_BM = at_BM.contiguous(), torch.empty(at_BM.shape)
        sides, native = self._layout.queries(queries)
        self._library.nr_score_pairs(
            ctypes.byref(self._layout.model), ctypes.byref(self._items), ctypes.byref(native),
            _at(at_BM), c_int64(at_BM.shape[1]), c_int(DTYPES[precision]), c_int(torch.get_num_threads()),
            _at(scores_BM),
        )  # fmt: skip
        del sides  # what `native` points to lives until here
        return scores_BM

    @property
    def _num_blocks(self) -> int:
        return int(self._library.nr_num_blocks(c_int64(len(self))))

    def _allowed_by(self, mask: ShardMask) -> Tensor:
        if mask.is_eligible_N is None:
            return self._all_items
        return _bits(mask.is_eligible_N, self._num_blocks)

    def _component(self, component: int) -> Tensor:
        """(N, D) float32, put together from the two planes."""
        low = component * self._layout.width
        high, rest = (plane[:, low : low + self._layout.width].int() for plane in self._planes)
        return ((high << 16) + rest).view(torch.float32)

    def _pack(self, rows_NR: Tensor, dtype: str) -> "_Packed":
        rows_NR = rows_NR.float().contiguous()
        num_items, dim = rows_NR.shape
        num_groups = math.ceil(dim / PER_GROUP[dtype])
        scale = 127 / max(float(rows_NR.abs().amax()) if num_items else 1.0, 1e-30)
        groups = huge_pages(self._num_blocks * 16 * num_groups, torch.int32)
        starts = torch.zeros(self._num_blocks * 16, dtype=torch.int32) if dtype == "int8" else None
        self._library.nr_pack_table(
            _at(rows_NR), c_int64(num_items), c_int64(dim), c_int(dim), c_int(num_groups), c_int(DTYPES[dtype]),
            c_float(scale), _at(groups), _at(starts),
        )  # fmt: skip
        return _Packed(groups, starts, num_groups, dtype, scale)


class _Packed:
    """A stage-1 table in blocks of sixteen items (stage1.cpp)."""

    def __init__(self, groups: Tensor, starts: Tensor | None, num_groups: int, dtype: str, scale: float) -> None:
        self.groups, self.starts, self.num_groups, self.dtype, self.scale = groups, starts, num_groups, dtype, scale
        self.nbytes = groups.nbytes + (starts.nbytes if starts is not None else 0)


class _Layout:
    """How the kernels want a model: pairs numbered p = j·Q + i with Q even, widths even, weights of whole `rows`."""

    def __init__(self, mol: MixtureOfLogits, rows: int) -> None:
        queries, items, width = (
            mol.settings.num_query_components,
            mol.settings.num_item_components,
            mol.settings.component_dim,
        )
        self.num_queries, self.num_items, self.width = queries + queries % 2, items, width + width % 2
        i, j = torch.arange(self.num_queries).repeat(items), torch.arange(items).repeat_interleave(self.num_queries)
        self.is_pair_P = (i < queries).float()
        self.pair_of_P = torch.where(i < queries, i * items + j, 0)  # the model's number; anything where it has none
        num_pairs, hidden = len(i), mol.cross_hidden.out_features
        weights = [mol.cross_hidden.weight, mol.cross_hidden.bias, mol.cross_out.weight, mol.cross_out.bias]
        in_HP, in_H, out_PH, out_P = (weight.detach().float().cpu() for weight in weights)
        more_H, more_P = -hidden % rows, -num_pairs % rows
        self._kept = (
            pad(in_HP[:, self.pair_of_P] * self.is_pair_P, (0, 0, 0, more_H)).contiguous(),
            pad(in_H, (0, more_H)).contiguous(),
            pad(out_PH[self.pair_of_P] * self.is_pair_P[:, None], (0, more_H, 0, more_P)).contiguous(),
            pad(out_P[self.pair_of_P] * self.is_pair_P, (0, more_P)).contiguous(),
            self.is_pair_P,
        )
        self.model = NativeModel(
            self.num_queries, items, self.width, hidden + more_H, *(_at(t) for t in self._kept), 1 / mol.temperature
        )

    @property
    def item_sizes(self) -> tuple[int, int]:
        """Numbers from one item's row to the next, and numbers in it."""
        width = self.num_items * self.width + len(self.is_pair_P)
        return -(-width // LINE) * LINE, width

    def queries(self, queries: QuerySide) -> tuple[tuple[Tensor, Tensor], NativeQueries]:
        """The query side as the kernels want it; the pointers are into the tensors that come with them."""
        components_BQD = queries.components_BQD.float()
        more = (0, self.width - components_BQD.shape[2], 0, self.num_queries - components_BQD.shape[1])
        components_BQD = pad(components_BQD, more).contiguous()
        gate_BP = (queries.gate_BP.float()[:, self.pair_of_P] * self.is_pair_P).contiguous()
        return (components_BQD, gate_BP), NativeQueries(_at(components_BQD), _at(gate_BP), len(gate_BP))

    def item_rows(self, components_NXD: Tensor, gate_NP: Tensor) -> Tensor:
        """(N, width) float32 rows."""
        components_NXD = pad(components_NXD.float(), (0, self.width - components_NXD.shape[2]))
        return torch.cat([components_NXD.flatten(1), gate_NP.float()[:, self.pair_of_P] * self.is_pair_P], dim=1)


def _split(shard: Shard, layout: _Layout) -> tuple[Tensor, Tensor]:
    """The item rows as two planes (N, stride): rounded to bfloat16, half up, and the difference of the bits."""
    stride, width = layout.item_sizes
    high, low = (huge_pages(len(shard) * stride, torch.int16).view(-1, stride) for _ in range(2))
    for first in range(0, len(shard), ITEMS_AT_ONCE):
        part = slice(first, first + ITEMS_AT_ONCE)
        items = shard.items.take(part)
        bits = layout.item_rows(items.components_NXD, items.gate_NP).view(torch.int32)
        rounded = (bits + 0x8000) >> 16
        high[part, :width] = rounded.to(torch.int16)
        low[part, :width] = (bits - (rounded << 16)).to(torch.int16)
    return high, low


def _stage1_tables(shard: Shard) -> dict[Table, Tensor]:
    return {"mean": shard.mean_ND, "low_rank": shard.low_rank_NR}


def _rounded(values: Tensor) -> Tensor:
    """To bfloat16, half up, as float32."""
    return ((values.view(torch.int32) + 0x8000) >> 16 << 16).view(torch.float32)


def _rounding(shard: Shard) -> tuple[float, float]:
    """The largest length of an item component, and the largest distance that rounding moves one."""
    longest = moved = 0.0
    for low in range(0, len(shard), ITEMS_AT_ONCE):
        components_NXD = shard.items.components_NXD[low : low + ITEMS_AT_ONCE].float()
        longest = max(longest, float(components_NXD.norm(dim=2).max()))
        moved = max(moved, float((components_NXD - _rounded(components_NXD.contiguous())).norm(dim=2).max()))
    return longest, moved


def _bits(is_eligible_N: Tensor, num_blocks: int) -> Tensor:
    """A bit per item, sixteen to a block; padding is not eligible."""
    flags = np.zeros(num_blocks * 16, dtype=bool)
    flags[: len(is_eligible_N)] = is_eligible_N.numpy()
    return torch.from_numpy(np.packbits(flags, bitorder="little").view(np.int16))


def _lists(mask: ShardMask) -> tuple[Tensor, Tensor]:
    """Offsets and items of what each query may not be shown."""
    lists = mask.excluded
    items = lists.values if len(lists.values) else np.zeros(1, dtype=np.int32)
    offsets, items = np.ascontiguousarray(lists.offsets, dtype=np.int64), np.ascontiguousarray(items, dtype=np.int32)
    return torch.from_numpy(offsets), torch.from_numpy(items)


def _at(tensor: Tensor | None) -> c_void_p:
    """Where a tensor lies. The caller must hold the tensor until the call is over."""
    return c_void_p(tensor.data_ptr() if tensor is not None else None)
