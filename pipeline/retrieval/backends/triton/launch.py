"""Launchers of the Triton kernels: block sizes, grids and the lists that come back.

B queries, N items, M candidates or bins, C capacity, Q/X query/item components, D width, DP padded width.

Block sizes follow from widths alone, never from the number of queries or items, and a product is computed
from its own row and column alone: a pair's score has the same bits whatever else is in the batch.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from torch.nn.functional import pad

from pipeline.retrieval.backends.triton import mol_kernel as triton_mol
from pipeline.retrieval.backends.triton import product_kernels as triton_kernels
from pipeline.retrieval.backends.triton.layout import ItemRows, MolQueries, MolWeights, block_of, padded_size
from pipeline.retrieval.filters import ShardMask

NUM_PROGRAMS = 1_024  # several for each multiprocessor of a large GPU
MAX_WORDS = 1 << 26  # words of 32 marks each: 256 MB
MAX_WORDS_PER_BLOCK = 1_024
PAIRS_PER_BLOCK = 256
CANDIDATES_PER_BLOCK = 32


@dataclass(frozen=True)
class Allowed:
    """The items that may be shown, as the kernels read them."""

    num_items: int
    words: Tensor  # int32, one bit for each item
    queries: Tensor  # int64, the query of each excluded pair
    items: Tensor  # int32, the item of each excluded pair


@dataclass(frozen=True)
class ItemLists:
    """Lists of items, one per query. A count above C: the list overflowed. Entries past the count are uninitialised."""

    at_BC: Tensor  # int32
    counts_B: Tensor  # int32


@dataclass(frozen=True)
class Blocks:
    """Tile sizes of the query × item product kernels; `max_registers` lets two programs share a multiprocessor."""

    queries: int
    items: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


def allow(mask: ShardMask, device: torch.device) -> Allowed:
    """Convert the mask for the kernels, on their device."""
    eligible_N = mask.is_eligible_N
    if eligible_N is None:
        eligible_N = torch.ones(mask.num_items, dtype=torch.bool, device=device)
    bits = pad(eligible_N, (0, -len(eligible_N) % 32)).view(-1, 32).to(torch.int32)
    words = (bits << torch.arange(32, device=bits.device, dtype=torch.int32)).sum(dim=1, dtype=torch.int32)
    queries, items = torch.from_numpy(mask.excluded.owners), torch.from_numpy(mask.excluded.values)
    return Allowed(len(eligible_N), words, queries.to(device), items.to(device))


def product_blocks(row_bytes: int, num_bytes: int, num_products: int) -> Blocks:
    """Choose blocks for rows of `row_bytes`, values of `num_bytes`, and the largest of `num_products` per pair.

    No register spills, and up to 128 bytes a row two programs fit (jobs/studies/kernels/gpu_compile.py).
    """
    if num_bytes == 4:
        return Blocks(64, 64, 4, 2)
    if num_products > 1:
        return Blocks(128, 64, 8, 3)
    if row_bytes <= 128:
        return Blocks(128, 128, 8, 3, 128)
    if row_bytes <= 256:
        return Blocks(128, 128, 8, 2)
    return Blocks(128, 64, 8, 2)


def bin_maxima(queries_BD: Tensor, items_ND: Tensor, min_bins: int) -> Tensor:
    """(B, M): the largest inner product in each of `min_bins` bins of items or more, -inf in an empty one.

    Queries are (B, DP), padded with zeros.
    """
    num_queries = len(queries_BD)
    sizes, blocks, options = _product_options(items_ND)
    num_splits, num_tiles = _splits(num_queries, len(items_ND), blocks, triton.cdiv(min_bins, blocks.items))
    maxima_BM = torch.empty(num_queries, num_splits * blocks.items, device=items_ND.device)
    triton_kernels.bin_maxima_kernel[(triton.cdiv(num_queries, blocks.queries), num_splits)](
        queries_BD, items_ND, maxima_BM, num_queries, len(items_ND), items_ND.stride(0), num_tiles, **sizes, **options
    )
    return maxima_BM


def collect(
    queries_BQD: Tensor, items_NXD: Tensor, allowed: Allowed, floor_B: Tensor, capacity: int,
    low: int = 0, high: int | None = None,
) -> ItemLists:  # fmt: skip
    """The allowed items from `low` to `high` whose largest product of components reaches the floor, ascending.

    Queries are (B, Q, DP), padded with zeros; `low` is a multiple of 32.
    """
    high = len(items_NXD) if high is None else high
    num_queries = len(queries_BQD)
    at_BC = torch.empty(num_queries, capacity, dtype=torch.int32, device=floor_B.device)
    lists = ItemLists(at_BC, torch.zeros(num_queries, dtype=torch.int32, device=floor_B.device))
    step = max(32, MAX_WORDS // num_queries * 32)
    for first in range(low, high, step):
        _mark_and_list(queries_BQD, items_NXD, allowed, floor_B, lists, first, min(first + step, high), False)
    return lists


def collect_bounded(
    queries_BQD: Tensor, items_NXD: Tensor, allowed: Allowed, floor_B: Tensor, low: int, high: int
) -> tuple[ItemLists, Tensor]:
    """Run `collect` with room for all; also returns (B,) the largest product of an eligible item below the floor."""
    at_BC = torch.empty(len(queries_BQD), high - low, dtype=torch.int32, device=floor_B.device)
    lists = ItemLists(at_BC, torch.zeros(len(queries_BQD), dtype=torch.int32, device=floor_B.device))
    return lists, _mark_and_list(queries_BQD, items_NXD, allowed, floor_B, lists, low, high, True).amax(dim=0)


def _mark_and_list(
    queries_BQD: Tensor, items_NXD: Tensor, allowed: Allowed, floor_B: Tensor, lists: ItemLists,
    low: int, high: int, wants_passed: bool,
) -> Tensor:  # fmt: skip
    """Append to `lists`; returns the largest products below the floor (programs that share the items, B)."""
    num_queries, num_items, num_words = len(queries_BQD), high - low, triton.cdiv(high - low, 32)
    sizes, blocks, options = _product_options(items_NXD[:, 0], queries_BQD.shape[1] * items_NXD.shape[1])
    num_splits, num_tiles = _splits(num_queries, num_items, blocks)
    words = torch.empty(num_queries, num_words, dtype=torch.int32, device=floor_B.device)
    words_allowed = allowed.words[low // 32 :]
    passed = floor_B.new_empty(num_splits, num_queries if wants_passed else 0)
    triton_kernels.mark_kernel[(triton.cdiv(num_queries, blocks.queries), num_splits)](
        queries_BQD, items_NXD[low:high], floor_B, words, words_allowed, passed,
        num_queries, num_items, num_words, items_NXD.stride(0), num_tiles,
        Q=queries_BQD.shape[1], X=items_NXD.shape[1], WANTS_PASSED=wants_passed, **sizes, **options,
    )  # fmt: skip
    num_pairs = len(allowed.items)
    if num_pairs:
        triton_kernels.clear_kernel[(triton.cdiv(num_pairs, PAIRS_PER_BLOCK),)](
            words, num_words, allowed.queries, allowed.items, num_pairs, low, num_items, BLOCK=PAIRS_PER_BLOCK
        )
    triton_kernels.list_kernel[(num_queries,)](
        words, words_allowed, lists.at_BC, lists.counts_B, num_words, low, lists.at_BC.shape[1],
        BLOCK_W=min(MAX_WORDS_PER_BLOCK, padded_size(num_words)),
    )  # fmt: skip
    return passed


def gathered_products(queries_BQD: Tensor, items_NXD: Tensor, lists: ItemLists) -> Tensor:
    """(B, C): the largest product of components of each listed item; -inf past the end of a list."""
    num_queries, capacity = lists.at_BC.shape
    scores_BC = torch.empty(num_queries, capacity, device=lists.at_BC.device)
    sizes, _, _ = _product_options(items_NXD[:, 0])
    widths = {name: sizes[name] for name in ("D", "BLOCK_D", "NUM_D")}
    if scores_BC.numel():
        triton_kernels.gathered_products_kernel[(num_queries * triton.cdiv(capacity, CANDIDATES_PER_BLOCK),)](
            queries_BQD, items_NXD, lists.at_BC, lists.counts_B, scores_BC, capacity, items_NXD.stride(0),
            Q=queries_BQD.shape[1], X=items_NXD.shape[1], BLOCK_M=CANDIDATES_PER_BLOCK, **widths,
        )  # fmt: skip
    return scores_BC


def score_pairs(items: ItemRows, weights: MolWeights, queries: MolQueries, at_BM: Tensor) -> Tensor:
    """(B, M) MoL scores of int32 candidates, -inf where there is no candidate."""
    scores_BM = torch.empty(at_BM.shape, device=at_BM.device)
    lengths_B = torch.full((len(at_BM),), at_BM.shape[1], dtype=torch.int32, device=at_BM.device)
    _launch_mol(items, weights, queries, ItemLists(at_BM, lengths_B), None, scores_BM, ItemLists(at_BM, lengths_B))
    return scores_BM


def score_above(
    items: ItemRows, weights: MolWeights, queries: MolQueries, candidates: ItemLists, floor_B: Tensor
) -> tuple[Tensor, ItemLists]:
    """(B, C) MoL scores of the candidates that reach the floor, and lists of them, in no particular order."""
    scores_BC = torch.empty(candidates.at_BC.shape, device=floor_B.device)
    lists = ItemLists(torch.empty_like(candidates.at_BC), torch.zeros_like(candidates.counts_B))
    _launch_mol(items, weights, queries, candidates, floor_B, scores_BC, lists)
    return scores_BC, lists


def _launch_mol(
    items: ItemRows, weights: MolWeights, queries: MolQueries, candidates: ItemLists, floor_B: Tensor | None,
    scores_BC: Tensor, lists: ItemLists,
) -> None:  # fmt: skip
    shape, is_float32 = weights.shape, weights.hidden.dtype == torch.float32
    num_queries, num_candidates = candidates.at_BC.shape
    if not candidates.at_BC.numel():
        return
    block_d, num_blocks_d = block_of(shape.dim)
    block_m, block_h, num_warps = mol_blocks(shape.num_padded_pairs, shape.padded_hidden_dim, is_float32)
    num_blocks = triton.cdiv(num_candidates, block_m)
    num_splits = min(num_blocks, triton.cdiv(NUM_PROGRAMS, num_queries))
    triton_mol.mol_kernel[(num_queries, num_splits)](
        items.high_NW if is_float32 else items.high_NW.view(torch.bfloat16), items.low_NW, items.high_NW.stride(0),
        queries.components, queries.gate, weights.hidden, weights.hidden_bias, weights.out, weights.out_bias,
        candidates.at_BC, candidates.counts_B, num_candidates, triton.cdiv(num_blocks, num_splits),
        scores_BC if floor_B is None else floor_B, scores_BC, lists.at_BC, lists.counts_B,
        Q=shape.num_query_components, X=shape.num_item_components, D=shape.dim, QP=shape.padded_query_components,
        XP=shape.padded_item_components, BLOCK_D=block_d, NUM_D=num_blocks_d, HP=shape.padded_hidden_dim,
        BLOCK_H=block_h, BLOCK_M=block_m, IS_FLOAT32=is_float32, HAS_FLOOR=floor_B is not None,
        num_warps=num_warps, num_stages=2,
    )  # fmt: skip


def mol_blocks(num_pairs: int, hidden_dim: int, is_float32: bool) -> tuple[int, int, int]:
    """Number of candidates and of hidden units in a block, and of warps.

    In bfloat16 the cross network stays in shared memory (80 KB at P = 64 and H = 128, so that two programs fit). In
    float32 there is no room for both halves of its tf32 values; it is read again for each block of candidates.
    """
    block_h = min(hidden_dim, 64) if is_float32 else hidden_dim
    while block_h > 16 and block_h * num_pairs > (4_096 if is_float32 else 16_384):
        block_h //= 2
    return max(16, min(64, 4_096 // num_pairs)), block_h, 4


def _product_options(items_ND: Tensor, num_products: int = 1) -> tuple[dict[str, int], Blocks, dict[str, int]]:
    """Constants, blocks and compiler options of the kernels that multiply queries by items."""
    block_d, num_blocks = block_of(items_ND.shape[1], 32 if items_ND.dtype == torch.int8 else 16)
    blocks = product_blocks(block_d * items_ND.element_size(), items_ND.element_size(), num_products)
    sizes = {"D": items_ND.shape[1], "BLOCK_D": block_d, "NUM_D": num_blocks}
    sizes |= {"BLOCK_B": blocks.queries, "BLOCK_N": blocks.items}
    options = {"num_warps": blocks.num_warps, "num_stages": blocks.num_stages}
    return sizes, blocks, options | ({"maxnreg": blocks.max_registers} if blocks.max_registers else {})


def _splits(num_queries: int, num_items: int, blocks: Blocks, least: int = 1) -> tuple[int, int]:
    """Number of programs that share the items, and of tiles for each program."""
    num_tiles = max(1, triton.cdiv(num_items, blocks.items))
    wanted = max(least, triton.cdiv(NUM_PROGRAMS, max(1, triton.cdiv(num_queries, blocks.queries))))
    tiles_each = triton.cdiv(num_tiles, min(num_tiles, wanted))
    return triton.cdiv(num_tiles, tiles_each), tiles_each
