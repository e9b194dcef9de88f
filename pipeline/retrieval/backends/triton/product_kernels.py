"""Triton kernels of stage 1 and of the scan's bounds: the largest inner products of queries and items.

B queries, N items, M candidates, Q/X query/item components, D width. Variables are blocks and carry no shape; the
launchers (launch.py) choose the blocks. Scores never leave the chip: one bit per pair does.
"""

import triton
import triton.language as tl

# Without a GPU the kernels run in Triton's interpreter (TRITON_INTERPRET=1, read when this module is imported).
IS_INTERPRETED = bool(triton.knobs.runtime.interpret)
INTERPRETED = tl.constexpr(IS_INTERPRETED)
# float32 products: three tf32 products that together keep the precision, at six times the price of bfloat16.
FLOAT32_PRODUCT = tl.constexpr("tf32x3")


@triton.jit
def matrix_product(left, right):
    """Multiply left @ right in float32; exact for 8-bit integers."""
    if INTERPRETED:  # tl.dot would multiply the bit patterns of bfloat16 (triton issue 11584), and integers would wrap
        return tl.dot(left.to(tl.float32), right.to(tl.float32))
    elif left.dtype == tl.int8:  # noqa: RET505 (a branch that is compiled away may not be left out)
        return tl.dot(left, right, out_dtype=tl.int32).to(tl.float32)
    else:
        return tl.dot(left, right, input_precision=FLOAT32_PRODUCT)


@triton.jit
def _load_queries(queries_ptr, query, num_queries, i, k, Q: tl.constexpr, BLOCK_D: tl.constexpr, NUM_D: tl.constexpr):
    """(BLOCK_B, BLOCK_D): query component i from column k·BLOCK_D on; queries come padded with zeros."""
    d = tl.arange(0, BLOCK_D)
    offset = (query.to(tl.int64) * Q + i) * (NUM_D * BLOCK_D) + k * BLOCK_D
    return tl.load(queries_ptr + offset[:, None] + d[None, :], mask=(query < num_queries)[:, None], other=0)


@triton.jit
def _largest_products(
    queries_ptr, resident, query, num_queries, items_ptr, item, num_items, item_stride,
    Q: tl.constexpr, X: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, NUM_D: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """(BLOCK_B, BLOCK_N): the largest of the Q·X inner products of each query with each item."""
    largest = tl.full((BLOCK_B, BLOCK_N), float("-inf"), dtype=tl.float32)
    row = item.to(tl.int64) * item_stride
    for j in range(X):
        for i in range(Q):
            products = tl.zeros((BLOCK_B, BLOCK_N), dtype=tl.float32)
            for k in range(NUM_D):
                d = k * BLOCK_D + tl.arange(0, BLOCK_D)
                is_valid = (item < num_items)[:, None] & (d < D)[None, :]
                items = tl.load(items_ptr + row[:, None] + j * D + d[None, :], mask=is_valid, other=0)
                if Q * NUM_D == 1:
                    queries = resident
                else:
                    queries = _load_queries(queries_ptr, query, num_queries, i, k, Q, BLOCK_D, NUM_D)
                products += matrix_product(queries, tl.trans(items))
            largest = tl.maximum(largest, products)
    return largest


@triton.jit
def bin_maxima_kernel(
    queries_ptr, items_ptr, maxima_ptr, num_queries, num_items, item_stride, tiles,
    D: tl.constexpr, BLOCK_D: tl.constexpr, NUM_D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Largest product of each bin, a column of a tile: its maximum over a program's tiles stays in a register."""
    query = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    first_tile = tl.program_id(1) * tiles
    resident = _load_queries(queries_ptr, query, num_queries, 0, 0, 1, BLOCK_D, NUM_D)
    maxima = tl.full((BLOCK_B, BLOCK_N), float("-inf"), dtype=tl.float32)
    for tile in range(first_tile, first_tile + tiles):
        item = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        largest = _largest_products(
            queries_ptr, resident, query, num_queries, items_ptr, item, num_items, item_stride,
            1, 1, D, BLOCK_D, NUM_D, BLOCK_B, BLOCK_N,
        )  # fmt: skip
        maxima = tl.maximum(maxima, tl.where((item < num_items)[None, :], largest, float("-inf")))
    offset = query.to(tl.int64)[:, None] * (tl.num_programs(1) * BLOCK_N) + tl.program_id(1) * BLOCK_N
    tl.store(maxima_ptr + offset + tl.arange(0, BLOCK_N)[None, :], maxima, mask=(query < num_queries)[:, None])


@triton.jit
def mark_kernel(
    queries_ptr, items_ptr, floor_ptr, words_ptr, allowed_ptr, passed_ptr,
    num_queries, num_items, num_words, item_stride, tiles,
    Q: tl.constexpr, X: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, NUM_D: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, WANTS_PASSED: tl.constexpr,
):  # fmt: skip
    """Set a bit for each pair whose largest product reaches the query's floor: item 32·w + b is bit b of word w.

    `passed` receives, for each program, the largest product of its allowed items that does not reach the floor.
    """
    query = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    first_tile = tl.program_id(1) * tiles
    is_query = query < num_queries
    floor = tl.load(floor_ptr + query, mask=is_query, other=float("inf"))[:, None]
    resident = _load_queries(queries_ptr, query, num_queries, 0, 0, Q, BLOCK_D, NUM_D)
    passed = tl.full((BLOCK_B,), float("-inf"), dtype=tl.float32)
    for tile in range(first_tile, first_tile + tiles):
        item = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        largest = _largest_products(
            queries_ptr, resident, query, num_queries, items_ptr, item, num_items, item_stride,
            Q, X, D, BLOCK_D, NUM_D, BLOCK_B, BLOCK_N,
        )  # fmt: skip
        bits = (largest >= floor).to(tl.int32) << (item % 32)[None, :]
        words = tl.sum(tl.reshape(bits, (BLOCK_B, BLOCK_N // 32, 32)), axis=2)
        w = tile * (BLOCK_N // 32) + tl.arange(0, BLOCK_N // 32)
        offset = query.to(tl.int64)[:, None] * num_words + w[None, :]
        tl.store(words_ptr + offset, words, mask=is_query[:, None] & (w < num_words)[None, :])
        if WANTS_PASSED:
            allowed = tl.load(allowed_ptr + item // 32, mask=item < num_items, other=0) >> (item % 32) & 1
            beaten = (allowed != 0)[None, :] & (largest < floor)
            passed = tl.maximum(passed, tl.max(tl.where(beaten, largest, float("-inf")), axis=1))
    if WANTS_PASSED:
        tl.store(passed_ptr + tl.program_id(1) * num_queries + query, passed, mask=is_query)


@triton.jit
def clear_kernel(words_ptr, num_words, query_ptr, item_ptr, num_pairs, first_item, num_items, BLOCK: tl.constexpr):
    """Clear the bits of excluded pairs."""
    pair = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    query = tl.load(query_ptr + pair, mask=pair < num_pairs, other=0)
    item = tl.load(item_ptr + pair, mask=pair < num_pairs, other=-1) - first_item
    is_here = (item >= 0) & (item < num_items)
    offset = query.to(tl.int64) * num_words + item // 32
    tl.atomic_and(words_ptr + offset, ~(1 << (item & 31)), mask=is_here, sem="relaxed")


@triton.jit
def _count_bits(word):
    """Count the ones of 32-bit integers: add neighbouring bits, then pairs of bits, and so on."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24) & 0x3F


@triton.jit
def list_kernel(
    words_ptr, allowed_ptr, at_ptr, counts_ptr, num_words, first_item, capacity, BLOCK_W: tl.constexpr
):  # fmt: skip
    """Append a query's marked, allowed items to its list, ascending; beyond the capacity only the count goes on."""
    query = tl.program_id(0).to(tl.int64)
    count = tl.load(counts_ptr + query)
    for first in range(0, num_words, BLOCK_W):
        w = first + tl.arange(0, BLOCK_W)
        word = tl.load(words_ptr + query * num_words + w, mask=w < num_words, other=0)
        word &= tl.load(allowed_ptr + w, mask=w < num_words, other=0)
        num_bits = _count_bits(word)
        slot = count + tl.cumsum(num_bits) - num_bits
        count += tl.sum(num_bits)
        for _ in range(tl.max(num_bits)):
            lowest = word & (0 - word)
            bit = ((lowest.to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 0xFF) - 127  # the exponent of 2^bit
            offset = query * capacity + slot
            tl.store(at_ptr + offset, first_item + w * 32 + bit, mask=(word != 0) & (slot < capacity))
            word ^= lowest
            slot += 1
    tl.store(counts_ptr + query, count)


@triton.jit
def gathered_products_kernel(
    queries_ptr, items_ptr, at_ptr, counts_ptr, scores_ptr, capacity, item_stride,
    Q: tl.constexpr, X: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, NUM_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The largest products of the items in each query's list, in plain float32; -inf beyond the list."""
    blocks = tl.cdiv(capacity, BLOCK_M)
    query = (tl.program_id(0) // blocks).to(tl.int64)
    m = tl.program_id(0) % blocks * BLOCK_M + tl.arange(0, BLOCK_M)
    is_listed = m < tl.load(counts_ptr + query)
    item = tl.load(at_ptr + query * capacity + m, mask=is_listed & (m < capacity), other=0)
    row = item.to(tl.int64) * item_stride
    largest = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    for j in range(X):
        for i in range(Q):
            products = tl.zeros((BLOCK_M,), dtype=tl.float32)
            for k in range(NUM_D):
                d = k * BLOCK_D + tl.arange(0, BLOCK_D)
                is_valid = is_listed[:, None] & (d < D)[None, :]
                items = tl.load(items_ptr + row[:, None] + j * D + d[None, :], mask=is_valid, other=0)
                queries = tl.load(queries_ptr + (query * Q + i) * (NUM_D * BLOCK_D) + d)
                products += tl.sum(items.to(tl.float32) * queries.to(tl.float32)[None, :], axis=1)
            largest = tl.maximum(largest, products)
    tl.store(scores_ptr + query * capacity + m, tl.where(is_listed, largest, float("-inf")), mask=m < capacity)
