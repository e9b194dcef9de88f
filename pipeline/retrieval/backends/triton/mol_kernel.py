"""Triton kernel of stage 2: Mixture-of-Logits scores of candidates, from gathered rows to the score in one kernel.

M candidates, Q/X query/item components, D width, H gate width, P = Q·X pairs of components. Q, X, D and H are padded to
powers of two (QP, XP, …) and pair (i, j) has number j·QP + i: the item's component is the slow index here, so that the
products of a block of items need no transposition. Variables are blocks and carry no shape.
"""

import triton
import triton.language as tl

from pipeline.retrieval.backends.triton.product_kernels import INTERPRETED, matrix_product


@triton.jit
def _silu(x, IS_FAST: tl.constexpr):
    if IS_FAST and not INTERPRETED:
        # One special function instead of two; its error, 2^-11, is below that of the bfloat16 products around it.
        half = x * 0.5
        tanh = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [half], tl.float32, is_pure=True, pack=1)
        return half * tanh + half
    else:  # noqa: RET505 (a branch that is compiled away may not be left out)
        return x / (1.0 + tl.exp(-x))


@triton.jit
def _load_values(high_ptr, low_ptr, offset, mask, IS_FLOAT32: tl.constexpr):
    """Table values in bfloat16, or in float32 from both halves of their bits (`ItemRows`)."""
    if IS_FLOAT32:
        high = tl.load(high_ptr + offset, mask=mask, other=0).to(tl.int32)
        low = tl.load(low_ptr + offset, mask=mask, other=0).to(tl.int32)
        return ((high << 16) + low).to(tl.float32, bitcast=True)
    else:  # noqa: RET505
        return tl.load(high_ptr + offset, mask=mask, other=0.0)


@triton.jit
def _logits(
    components_ptr, query, high_ptr, low_ptr, row, is_item,
    X: tl.constexpr, D: tl.constexpr, QP: tl.constexpr, XP: tl.constexpr, BLOCK_D: tl.constexpr, NUM_D: tl.constexpr,
    BLOCK_M: tl.constexpr, IS_FLOAT32: tl.constexpr,
):  # fmt: skip
    """(BLOCK_M, XP·QP): one product of all the block's components, (BLOCK_M·XP, D), with the query's."""
    i, j = tl.arange(0, QP), tl.arange(0, XP)
    logits = tl.zeros((BLOCK_M * XP, QP), dtype=tl.float32)
    for k in range(NUM_D):
        d = k * BLOCK_D + tl.arange(0, BLOCK_D)
        offset = row[:, None, None] + (j * D)[None, :, None] + d[None, None, :]
        is_valid = is_item[:, None, None] & (j < X)[None, :, None] & (d < D)[None, None, :]
        items = tl.reshape(_load_values(high_ptr, low_ptr, offset, is_valid, IS_FLOAT32), (BLOCK_M * XP, BLOCK_D))
        queries = tl.load(components_ptr + ((query * QP + i) * (NUM_D * BLOCK_D))[:, None] + d[None, :])
        logits += matrix_product(items, tl.trans(queries))
    return tl.reshape(logits, (BLOCK_M, XP * QP))


@triton.jit
def _load_weights(hidden_ptr, out_ptr, first, PP: tl.constexpr, HP: tl.constexpr, BLOCK_H: tl.constexpr):
    """Both matrices of the gate's cross network for some hidden units, (BLOCK_H, PP) and (PP, BLOCK_H)."""
    p = tl.arange(0, PP)
    h = first + tl.arange(0, BLOCK_H)
    return tl.load(hidden_ptr + h[:, None] * PP + p[None, :]), tl.load(out_ptr + p[:, None] * HP + h[None, :])


@triton.jit
def _cross_network(
    logits, hidden_ptr, hidden_bias_ptr, out_ptr, out_bias, resident_hidden, resident_out,
    PP: tl.constexpr, HP: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_M: tl.constexpr, IS_FLOAT32: tl.constexpr,
):  # fmt: skip
    """W2 silu(W1 l + b1) + b2 of (BLOCK_M, PP) logits, a block of hidden units at a time."""
    inputs = logits.to(resident_hidden.dtype)
    total = tl.zeros((BLOCK_M, PP), dtype=tl.float32) + out_bias[None, :]
    for first in range(0, HP, BLOCK_H):
        bias = tl.load(hidden_bias_ptr + first + tl.arange(0, BLOCK_H))
        if BLOCK_H == HP:
            to_hidden, to_out = resident_hidden, resident_out
        else:
            to_hidden, to_out = _load_weights(hidden_ptr, out_ptr, first, PP, HP, BLOCK_H)
        hidden = _silu(matrix_product(inputs, tl.trans(to_hidden)) + bias[None, :], not IS_FLOAT32)
        total += matrix_product(hidden.to(inputs.dtype), tl.trans(to_out))
    return total


@triton.jit
def _append(scores, item, is_kept, query, scores_ptr, at_ptr, counts_ptr, capacity):
    """Append the kept candidates to the query's list, in no particular order."""
    counts = counts_ptr + tl.zeros_like(item)
    slot = tl.atomic_add(counts + query, 1, mask=is_kept, sem="relaxed")
    tl.store(scores_ptr + query * capacity + slot, scores, mask=is_kept)
    tl.store(at_ptr + query * capacity + slot, item, mask=is_kept)


@triton.jit
def mol_kernel(
    high_ptr, low_ptr, row_stride, components_ptr, gate_ptr, hidden_ptr, hidden_bias_ptr, out_ptr, out_bias_ptr,
    candidates_ptr, lengths_ptr, num_candidates, blocks, floor_ptr, scores_ptr, at_ptr, counts_ptr,
    Q: tl.constexpr, X: tl.constexpr, D: tl.constexpr, QP: tl.constexpr, XP: tl.constexpr, BLOCK_D: tl.constexpr,
    NUM_D: tl.constexpr, HP: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_M: tl.constexpr, IS_FLOAT32: tl.constexpr,
    HAS_FLOOR: tl.constexpr,
):  # fmt: skip
    """Score one query's candidates: all of them in place, or in a new list the candidates that reach the floor."""
    PP: tl.constexpr = XP * QP
    query = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths_ptr + query)
    first_block = tl.program_id(1) * blocks
    p = tl.arange(0, PP)
    i, j = p % QP, p // QP
    is_pair = ((i < Q) & (j < X))[None, :]
    gate = tl.load(gate_ptr + query * PP + p)[None, :]
    out_bias = tl.load(out_bias_ptr + p)
    resident_hidden, resident_out = _load_weights(hidden_ptr, out_ptr, 0, PP, HP, BLOCK_H)
    for block in range(first_block, tl.minimum(first_block + blocks, tl.cdiv(length, BLOCK_M))):
        m = block * BLOCK_M + tl.arange(0, BLOCK_M)
        item = tl.load(candidates_ptr + query * num_candidates + m, mask=m < length, other=-1)
        is_item = item >= 0
        row = item.to(tl.int64) * row_stride
        logits = _logits(
            components_ptr, query, high_ptr, low_ptr, row, is_item, X, D, QP, XP, BLOCK_D, NUM_D, BLOCK_M, IS_FLOAT32
        )
        cross = _cross_network(
            logits, hidden_ptr, hidden_bias_ptr, out_ptr, out_bias, resident_hidden, resident_out,
            PP, HP, BLOCK_H, BLOCK_M, IS_FLOAT32,
        )  # fmt: skip
        if Q == QP and X == XP:  # then the row's gate is contiguous, and is read in wide loads
            gate_offset, has_gate = row[:, None] + (X * D + p)[None, :], is_item[:, None]
        else:
            gate_offset, has_gate = row[:, None] + (X * D + j * Q + i)[None, :], is_item[:, None] & is_pair
        item_gate = _load_values(high_ptr, low_ptr, gate_offset, has_gate, IS_FLOAT32)
        gate_inputs = _silu(cross + gate * item_gate.to(tl.float32), not IS_FLOAT32)
        if Q != QP or X != XP:
            gate_inputs = tl.where(is_pair, gate_inputs, float("-inf"))
        weights = tl.exp(gate_inputs - tl.max(gate_inputs, axis=1)[:, None])
        scores = tl.sum(weights * logits, axis=1) / tl.sum(weights, axis=1)
        if HAS_FLOOR:
            is_kept = is_item & (scores >= tl.load(floor_ptr + query))
            _append(scores, item, is_kept, query, scores_ptr, at_ptr, counts_ptr, num_candidates)
        else:
            offset = query * num_candidates + m
            tl.store(scores_ptr + offset, tl.where(is_item, scores, float("-inf")), mask=m < length)
