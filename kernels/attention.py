"""Attention over two-part sequences: each sample's two row ranges read where they lie, forward and backward.

Position i of a sample's virtual sequence is row ``vision_start + i`` while ``i < vision_len``, and
``text_start + i - vision_len`` after that.

Forward (online softmax, Milakov and Gimelshein 2018; FlashAttention, arXiv 2205.14135): one program takes up to 128
queries of one head of one sample, a sample's last 64 or fewer a tile of 64. Tiles of 64 keys that lie wholly in the
vision part and that no mask touches have plain addresses; the rest comes in tiles of 16 with the row map and the mask.
The first of these starts the sums. A warp's 32 queries share what it reads from shared memory: at 197 + 13 tokens 6.9
warp instructions a matrix instruction, where 16 queries take 8.2, and 1.30x the useful products (577 + 13: 5.7, 1.09x).

Backward: probabilities again from the saved log-sum-exp, once for tiles of keys (dK, dV) and once for tiles of queries
(dQ), so that every sum has one owner and a fixed order: two more products a pair than with atomics, and no atomics.

Scores and probabilities never leave the registers; exponentials are powers of two, scores carry log2(e).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import check_contiguous, launch

MAX_HEAD_DIM = 128
MASKS = {"full": 0, "captioning": 1, "causal": 2}


@triton.jit
def _rows_of(position, vision_start, vision_len, text_start):
    """Row of each virtual position, int64."""
    return tl.where(position < vision_len, vision_start + position, text_start + position - vision_len).to(tl.int64)


@triton.jit
def _locate(segments, NUM_HEADS: tl.constexpr):
    """(head, vision_start, vision_len, text_start, length) of this program's head and sample."""
    segment = segments + 4 * (tl.program_id(0) // NUM_HEADS)
    vision_len = tl.load(segment + 1)
    length = vision_len + tl.load(segment + 3)
    return tl.program_id(0) % NUM_HEADS, tl.load(segment), vision_len, tl.load(segment + 2), length


@triton.jit
def _clear_unused(
    target, segments, num_rows, NUM_HEADS: tl.constexpr, DIM: tl.constexpr, STRIDE: tl.constexpr, PADDED: tl.constexpr
):
    """Zeros in DIM columns of the rows behind the last sample, which nobody owns; the head's programs take turns.

    Where the host knows all lengths there are none. A fill of the whole buffer would write every row twice.
    """
    samples = tl.num_programs(0) // NUM_HEADS
    last = segments + 4 * (samples - 1)
    used = tl.load(last + 2) + tl.load(last + 3)
    turn = tl.program_id(0) // NUM_HEADS * tl.num_programs(1) + tl.program_id(1)
    columns = tl.arange(0, PADDED)
    for first in range(used + 16 * turn, num_rows, 16 * samples * tl.num_programs(1)):
        rows = first + tl.arange(0, 16)
        place = target + rows.to(tl.int64)[:, None] * STRIDE + columns[None, :]  # [16, PADDED]
        zeros = tl.zeros((16, PADDED), target.dtype.element_ty)
        tl.store(place, zeros, mask=(rows < num_rows)[:, None] & (columns < DIM)[None, :])


@triton.jit
def _end_of_keys(first, length, vision_len, MASK: tl.constexpr, BLOCK_M: tl.constexpr):
    """No query of the tile that begins at `first` sees a key from here on."""
    end = length
    if MASK == 1:
        end = tl.where(first + BLOCK_M <= vision_len, vision_len, tl.minimum(length, first + BLOCK_M))
    if MASK == 2:
        end = tl.minimum(length, first + BLOCK_M)
    return end


@triton.jit
def _seen(query, key, length, vision_len, MASK: tl.constexpr):
    """[queries or 1, keys]: which keys count, for queries that exist."""
    seen = (key < length)[None, :]
    if MASK == 1:
        seen = seen & ((key < vision_len)[None, :] | (key[None, :] <= query[:, None]))
    if MASK == 2:
        seen = seen & (key[None, :] <= query[:, None])
    return seen


@triton.jit
def _load(base, rows, columns, DIM: tl.constexpr, STRIDE: tl.constexpr, WHOLE: tl.constexpr):
    """[rows, columns] of one of q, k, v; WHOLE says that all columns are below DIM."""
    place = base + rows[:, None] * STRIDE + columns[None, :]
    if WHOLE:
        return tl.load(place)
    return tl.load(place, mask=(columns < DIM)[None, :], other=0.0)


@triton.jit
def _edge(query, first, vision_start, vision_len, text_start, length, MASK: tl.constexpr, COUNT: tl.constexpr):
    """COUNT keys from position `first` on, whatever they are: their rows, and which pairs count [queries or 1, keys].
    Keys beyond the end repeat the last: no load needs a mask."""
    key = first + tl.arange(0, COUNT)
    rows = _rows_of(tl.minimum(key, length - 1), vision_start, vision_len, text_start)
    return rows, _seen(query, key, length, vision_len, MASK)


@triton.jit
def _key_tile(
    q, q_rest, acc, acc_rest, highest, total, keys, values, rows, seen, scale,
    STRIDE: tl.constexpr, DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, FIRST: tl.constexpr = False,
):  # fmt: skip
    """One step of the online softmax: BN more keys. `seen` [BM or 1, BN] says which pairs count, if MASKED; FIRST: no
    keys came before, what is given as `acc` is not looked at.

    `total` may be [BM], or [BM, 8]: by column mod 8, which a lane adds up without asking its neighbours.
    """
    columns = tl.arange(0, MAIN)
    rest = MAIN + tl.arange(0, REST if REST else 16)
    start = None  # what scores begin at: a mask costs one selection a key where all queries see the same
    if MASKED:
        start = tl.broadcast_to(tl.where(seen, 0.0, float("-inf")), (q.shape[0], rows.shape[0]))
    k = _load(keys, rows, columns, DIM, STRIDE, MAIN <= DIM)  # [BN, MAIN]
    scores = tl.dot(q, tl.trans(k), start, input_precision=PRECISION)  # [BM, BN]
    if REST:
        k = _load(keys, rows, rest, DIM, STRIDE, MAIN + REST <= DIM)
        scores = tl.dot(q_rest, tl.trans(k), scores, input_precision=PRECISION)
    now = tl.maximum(highest, tl.max(scores, axis=1) * scale)
    if MASKED:  # finite: a row that has seen no key yet subtracts no -inf from -inf
        now = tl.maximum(now, -1e38)
    p = tl.exp2(scores * scale - now[:, None])
    decay = tl.exp2(highest - now)
    if len(total.shape) == 2:
        total = total * decay[:, None] + tl.sum(tl.reshape(p, (p.shape[0], p.shape[1] // 8, 8)), axis=1)
    else:
        total = total * decay + tl.sum(p, axis=1)
    v = _load(values, rows, columns, DIM, STRIDE, MAIN <= DIM)  # [BN, MAIN]
    p = p.to(v.dtype)
    acc = tl.dot(p, v, None if FIRST else acc * decay[:, None], input_precision=PRECISION)
    if REST:
        v = _load(values, rows, rest, DIM, STRIDE, MAIN + REST <= DIM)
        acc_rest = tl.dot(p, v, None if FIRST else acc_rest * decay[:, None], input_precision=PRECISION)
    return acc, acc_rest, now, total


@triton.jit
def _queries(
    qkv, out, lse, first, vision_start, vision_len, text_start, length, head, scale, num_rows,
    MASK: tl.constexpr, NUM_HEADS: tl.constexpr, DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, REST_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_M queries from position `first` on, against all keys that the mask lets them see."""
    stride: tl.constexpr = 3 * NUM_HEADS * DIM
    query = first + tl.arange(0, BLOCK_M)
    exists = query < length
    rows = _rows_of(tl.minimum(query, length - 1), vision_start, vision_len, text_start)
    columns = tl.arange(0, MAIN)
    rest = MAIN + tl.arange(0, REST if REST else 16)
    queries = qkv + head * DIM
    keys = queries + NUM_HEADS * DIM
    values = keys + NUM_HEADS * DIM
    vision = keys + vision_start.to(tl.int64) * stride
    q = _load(queries, rows, columns, DIM, stride, MAIN <= DIM)  # [BM, MAIN]
    q_rest = q
    if REST:
        q_rest = _load(queries, rows, rest, DIM, stride, MAIN + REST <= DIM)

    open_keys = vision_len  # every query of the tile sees these
    if MASK == 2:
        open_keys = tl.minimum(vision_len, first)
    open_keys = open_keys // BLOCK_N * BLOCK_N
    end = _end_of_keys(first, length, vision_len, MASK, BLOCK_M)

    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M, 8), tl.float32)
    edge_rows, seen = _edge(query, open_keys, vision_start, vision_len, text_start, length, MASK, REST_N)
    acc, acc_rest, highest, total = _key_tile(
        q, q_rest, q, q_rest, highest, total, keys, values, edge_rows, seen, scale,
        stride, DIM, MAIN, REST, True, PRECISION, True,
    )  # fmt: skip
    for _ in range(0, open_keys, BLOCK_N):
        acc, acc_rest, highest, total = _key_tile(
            q, q_rest, acc, acc_rest, highest, total, vision, vision + NUM_HEADS * DIM, tl.arange(0, BLOCK_N), None,
            scale, stride, DIM, MAIN, REST, False, PRECISION,
        )  # fmt: skip
        vision += BLOCK_N * stride
    for key in tl.range(open_keys + REST_N, end, REST_N, num_stages=1):
        edge_rows, seen = _edge(query, key, vision_start, vision_len, text_start, length, MASK, REST_N)
        acc, acc_rest, highest, total = _key_tile(
            q, q_rest, acc, acc_rest, highest, total, keys, values, edge_rows, seen, scale,
            stride, DIM, MAIN, REST, True, PRECISION,
        )  # fmt: skip

    total = tl.sum(total, axis=1)
    inverse = 1.0 / total
    place = out + rows * (NUM_HEADS * DIM) + head * DIM
    mask = exists[:, None] & (columns < DIM)[None, :]
    tl.store(place[:, None] + columns[None, :], (acc * inverse[:, None]).to(out.dtype.element_ty), mask=mask)
    if REST:
        mask = exists[:, None] & (rest < DIM)[None, :]
        tl.store(place[:, None] + rest[None, :], (acc_rest * inverse[:, None]).to(out.dtype.element_ty), mask=mask)
    if lse is not None:
        # gathered, a lane has one query and takes one logarithm, not the four that its part of `acc` belongs to
        each = tl.arange(0, BLOCK_M)
        log_sum = tl.gather(highest, each, 0) + tl.log2(tl.gather(total, each, 0))
        tl.store(lse + head.to(tl.int64) * num_rows + rows, log_sum * 0.6931471805599453, mask=exists)


@triton.jit(do_not_specialize=["num_rows"])
def _attention_kernel(
    qkv, segments, out, lse, num_rows, scale, MASK: tl.constexpr, NUM_HEADS: tl.constexpr, DIM: tl.constexpr,
    MAIN: tl.constexpr, REST: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    REST_M: tl.constexpr, REST_N: tl.constexpr,
):  # fmt: skip
    """One head's tile of queries of one sample. Tiles are the slowest index: programs past a sample's end, at most
    the difference to the longest sample, come last and leave at once."""
    head, vision_start, vision_len, text_start, length = _locate(segments, NUM_HEADS)
    columns: tl.constexpr = NUM_HEADS * DIM
    _clear_unused(out + head * DIM, segments, num_rows, NUM_HEADS, DIM, columns, 2 * MAIN if REST else MAIN)
    first = tl.program_id(1) * BLOCK_M
    if first >= length:
        return
    if length - first > REST_M or BLOCK_M == REST_M:
        _queries(
            qkv, out, lse, first, vision_start, vision_len, text_start, length, head, scale, num_rows, MASK, NUM_HEADS,
            DIM, MAIN, REST, PRECISION, BLOCK_M, BLOCK_N, REST_N,
        )  # fmt: skip
    else:
        _queries(
            qkv, out, lse, first, vision_start, vision_len, text_start, length, head, scale, num_rows, MASK, NUM_HEADS,
            DIM, MAIN, REST, PRECISION, REST_M, BLOCK_N, REST_N,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows"])
def _delta_kernel(
    dout, out, delta, num_rows, NUM_HEADS: tl.constexpr, DIM: tl.constexpr, PADDED: tl.constexpr, BLOCK_M: tl.constexpr
):
    """delta[h, r] = dout[r, h] . out[r, h] of BLOCK_M rows."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(1)
    columns = tl.arange(0, PADDED)
    place = (rows.to(tl.int64) * NUM_HEADS + head)[:, None] * DIM + columns[None, :]  # [BM, PADDED]
    mask = (rows < num_rows)[:, None] & (columns < DIM)[None, :]
    upstream = tl.load(dout + place, mask=mask, other=0.0).to(tl.float32)
    result = tl.load(out + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(delta + head.to(tl.int64) * num_rows + rows, tl.sum(upstream * result, axis=1), mask=rows < num_rows)


@triton.jit
def _pair(
    q, q_rest, k, k_rest, v, v_rest, dy, dy_rest, lse, delta, seen, scale, REST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(probabilities, gradient of the scores over scale) [queries, keys] of two tiles."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    upstream = tl.dot(dy, tl.trans(v), input_precision=PRECISION)
    if REST:
        scores = tl.dot(q_rest, tl.trans(k_rest), scores, input_precision=PRECISION)
        upstream = tl.dot(dy_rest, tl.trans(v_rest), upstream, input_precision=PRECISION)
    p = tl.where(seen, tl.exp2(scores * scale - lse[:, None]), 0.0)
    return p, p * (upstream - delta[:, None])


@triton.jit(do_not_specialize=["num_rows"])
def _query_gradient_kernel(
    qkv, dout, lse, delta, segments, dqkv, num_rows, scale, MASK: tl.constexpr, NUM_HEADS: tl.constexpr,
    DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dQ of one tile of queries: over the keys it sees."""
    head, vision_start, vision_len, text_start, length = _locate(segments, NUM_HEADS)
    stride: tl.constexpr = 3 * NUM_HEADS * DIM
    _clear_unused(dqkv + head * DIM, segments, num_rows, NUM_HEADS, DIM, stride, 2 * MAIN if REST else MAIN)
    first = tl.program_id(1) * BLOCK_M
    if first >= length:
        return
    columns = tl.arange(0, MAIN)
    rest = MAIN + tl.arange(0, REST if REST else 16)
    query = first + tl.arange(0, BLOCK_M)
    rows = _rows_of(tl.minimum(query, length - 1), vision_start, vision_len, text_start)
    queries = qkv + head * DIM
    q = _load(queries, rows, columns, DIM, stride, MAIN <= DIM)  # [BM, MAIN]
    dy = _load(dout + head * DIM, rows, columns, DIM, NUM_HEADS * DIM, MAIN <= DIM)
    q_rest = q
    dy_rest = dy
    if REST:
        q_rest = _load(queries, rows, rest, DIM, stride, MAIN + REST <= DIM)
        dy_rest = _load(dout + head * DIM, rows, rest, DIM, NUM_HEADS * DIM, MAIN + REST <= DIM)
    place = head.to(tl.int64) * num_rows + rows
    log_sum = tl.load(lse + place) * 1.4426950408889634
    row_delta = tl.load(delta + place)
    dq = tl.zeros((BLOCK_M, MAIN), tl.float32)
    dq_rest = tl.zeros((BLOCK_M, REST if REST else 16), tl.float32)

    end = _end_of_keys(first, length, vision_len, MASK, BLOCK_M)
    for start in range(0, end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        key_rows = _rows_of(tl.minimum(key, length - 1), vision_start, vision_len, text_start)
        k = _load(queries + NUM_HEADS * DIM, key_rows, columns, DIM, stride, MAIN <= DIM)  # [BN, MAIN]
        v = _load(queries + 2 * NUM_HEADS * DIM, key_rows, columns, DIM, stride, MAIN <= DIM)
        k_rest = k
        v_rest = v
        if REST:
            k_rest = _load(queries + NUM_HEADS * DIM, key_rows, rest, DIM, stride, MAIN + REST <= DIM)
            v_rest = _load(queries + 2 * NUM_HEADS * DIM, key_rows, rest, DIM, stride, MAIN + REST <= DIM)
        seen = (query < length)[:, None] & _seen(query, key, length, vision_len, MASK)
        _, ds = _pair(q, q_rest, k, k_rest, v, v_rest, dy, dy_rest, log_sum, row_delta, seen, scale, REST, PRECISION)
        ds = ds.to(k.dtype)
        dq = tl.dot(ds, k, dq, input_precision=PRECISION)
        if REST:
            dq_rest = tl.dot(ds, k_rest, dq_rest, input_precision=PRECISION)

    factor = scale * 0.6931471805599453
    target = dqkv + rows * stride + head * DIM
    mask = (query < length)[:, None] & (columns < DIM)[None, :]
    tl.store(target[:, None] + columns[None, :], (dq * factor).to(dqkv.dtype.element_ty), mask=mask)
    if REST:
        mask = (query < length)[:, None] & (rest < DIM)[None, :]
        tl.store(target[:, None] + rest[None, :], (dq_rest * factor).to(dqkv.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _key_gradient_kernel(
    qkv, dout, lse, delta, segments, dqkv, num_rows, scale, MASK: tl.constexpr, NUM_HEADS: tl.constexpr,
    DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dK and dV of one tile of keys: over the queries that see it."""
    head, vision_start, vision_len, text_start, length = _locate(segments, NUM_HEADS)
    stride: tl.constexpr = 3 * NUM_HEADS * DIM
    for part in tl.static_range(1, 3):
        keys_or_values = dqkv + (part * NUM_HEADS + head) * DIM
        _clear_unused(keys_or_values, segments, num_rows, NUM_HEADS, DIM, stride, 2 * MAIN if REST else MAIN)
    first = tl.program_id(1) * BLOCK_N
    if first >= length:
        return
    columns = tl.arange(0, MAIN)
    rest = MAIN + tl.arange(0, REST if REST else 16)
    key = first + tl.arange(0, BLOCK_N)
    rows = _rows_of(tl.minimum(key, length - 1), vision_start, vision_len, text_start)
    queries = qkv + head * DIM
    k = _load(queries + NUM_HEADS * DIM, rows, columns, DIM, stride, MAIN <= DIM)  # [BN, MAIN]
    v = _load(queries + 2 * NUM_HEADS * DIM, rows, columns, DIM, stride, MAIN <= DIM)
    k_rest = k
    v_rest = v
    if REST:
        k_rest = _load(queries + NUM_HEADS * DIM, rows, rest, DIM, stride, MAIN + REST <= DIM)
        v_rest = _load(queries + 2 * NUM_HEADS * DIM, rows, rest, DIM, stride, MAIN + REST <= DIM)
    dk = tl.zeros((BLOCK_N, MAIN), tl.float32)
    dv = tl.zeros((BLOCK_N, MAIN), tl.float32)
    dk_rest = tl.zeros((BLOCK_N, REST if REST else 16), tl.float32)
    dv_rest = tl.zeros((BLOCK_N, REST if REST else 16), tl.float32)

    begin = 0
    if MASK == 1:
        begin = tl.where(first >= vision_len, first // BLOCK_M * BLOCK_M, 0)
    if MASK == 2:
        begin = first // BLOCK_M * BLOCK_M
    for start in range(begin, length, BLOCK_M):
        query = start + tl.arange(0, BLOCK_M)
        query_rows = _rows_of(tl.minimum(query, length - 1), vision_start, vision_len, text_start)
        q = _load(queries, query_rows, columns, DIM, stride, MAIN <= DIM)  # [BM, MAIN]
        dy = _load(dout + head * DIM, query_rows, columns, DIM, NUM_HEADS * DIM, MAIN <= DIM)
        q_rest = q
        dy_rest = dy
        if REST:
            q_rest = _load(queries, query_rows, rest, DIM, stride, MAIN + REST <= DIM)
            dy_rest = _load(dout + head * DIM, query_rows, rest, DIM, NUM_HEADS * DIM, MAIN + REST <= DIM)
        place = head.to(tl.int64) * num_rows + query_rows
        log_sum = tl.load(lse + place) * 1.4426950408889634
        row_delta = tl.load(delta + place)
        seen = (query < length)[:, None] & _seen(query, key, length, vision_len, MASK)
        p, ds = _pair(q, q_rest, k, k_rest, v, v_rest, dy, dy_rest, log_sum, row_delta, seen, scale, REST, PRECISION)
        p = tl.trans(p.to(q.dtype))
        ds = tl.trans(ds.to(q.dtype))
        dv = tl.dot(p, dy, dv, input_precision=PRECISION)
        dk = tl.dot(ds, q, dk, input_precision=PRECISION)
        if REST:
            dv_rest = tl.dot(p, dy_rest, dv_rest, input_precision=PRECISION)
            dk_rest = tl.dot(ds, q_rest, dk_rest, input_precision=PRECISION)

    factor = scale * 0.6931471805599453
    target = dqkv + rows * stride + (NUM_HEADS + head) * DIM
    mask = (key < length)[:, None] & (columns < DIM)[None, :]
    tl.store(target[:, None] + columns[None, :], (dk * factor).to(dqkv.dtype.element_ty), mask=mask)
    tl.store(target[:, None] + NUM_HEADS * DIM + columns[None, :], dv.to(dqkv.dtype.element_ty), mask=mask)
    if REST:
        mask = (key < length)[:, None] & (rest < DIM)[None, :]
        tl.store(target[:, None] + rest[None, :], (dk_rest * factor).to(dqkv.dtype.element_ty), mask=mask)
        tl.store(target[:, None] + NUM_HEADS * DIM + rest[None, :], dv_rest.to(dqkv.dtype.element_ty), mask=mask)


def tiles(dtype: torch.dtype, head_dim: int, precision: str) -> dict[str, int]:
    """Queries and keys of a tile, and of the smaller ones at a sample's end; in full fp32 more would spill."""
    if dtype == torch.float32:
        block_m = 32 if precision == "ieee" else 64
        return {"BLOCK_M": block_m, "BLOCK_N": 32, "REST_M": block_m, "REST_N": 16}
    return {"BLOCK_M": 128, "BLOCK_N": 64, "REST_M": 16 * warps(head_dim), "REST_N": 16}


def warps(head_dim: int) -> int:
    """Four, so that two blocks share a multiprocessor; eight where wide heads would spill."""
    return 8 if head_dim > 64 else 4


def head_dim_parts(head_dim: int) -> tuple[int, int]:
    """(largest power of two within head_dim, the power of two that holds the rest, or 0): 88 is 64 + 32, not 128."""
    main = max(16, 1 << (head_dim.bit_length() - 1))
    rest = head_dim - main
    return main, max(16, triton.next_power_of_2(rest)) if rest > 0 else 0


def forward(
    qkv: Tensor,
    segments: Tensor,
    mask: str,
    scale: float,
    max_length: int,
    save: bool = False,
    *,
    precision: str = "ieee",
) -> tuple[Tensor, Tensor]:
    """``ops.attention`` with a named mask: one launch.

    Args:
        qkv: (N, 3, H, d) contiguous; fp32, bf16 or fp16; d at most 128.
        segments: int32 (B, 4), per sample vision_start, vision_len, text_start, text_len; read on the device.
        mask: "full", "captioning" or "causal".
        scale: of the scores.
        max_length: no sample is longer.
        save: keep the log-sum-exp for backward.
        precision: of fp32 products: "ieee" or "tf32".

    Returns:
        out (N, H * d), rows of no sample zeros; and with `save` the natural log-sum-exp of the scores (H, N) in fp32,
        unspecified there, otherwise an empty tensor.

    Raises:
        ValueError: a tensor that is not contiguous, a head dimension above 128.
    """
    check_contiguous(qkv=qkv, segments=segments)
    num_rows, _, num_heads, head_dim = qkv.shape
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"qkv must have a head dimension of at most {MAX_HEAD_DIM}, got {head_dim}")
    out = qkv.new_empty(num_rows, num_heads * head_dim)
    lse = qkv.new_empty((num_heads, num_rows) if save else 0, dtype=torch.float32)
    main, rest = head_dim_parts(head_dim)
    shape = tiles(qkv.dtype, head_dim, precision)
    if max_length == 0 or segments.shape[0] == 0:  # no program would clear the rows
        out.zero_()
    elif num_rows:
        launch(
            _attention_kernel,
            (segments.shape[0] * num_heads, triton.cdiv(max_length, shape["BLOCK_M"])),
            qkv,
            segments,
            out,
            lse if save else None,
            num_rows,
            scale * 1.4426950408889634,  # exponentials are powers of two
            MASK=MASKS[mask],
            NUM_HEADS=num_heads,
            DIM=head_dim,
            MAIN=main,
            REST=rest,
            PRECISION=precision,
            **shape,
            num_warps=warps(head_dim),
            num_stages=2,
        )
    return out, lse


def backward(
    dout: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    segments: Tensor,
    mask: str,
    scale: float,
    max_length: int,
    *,
    precision: str = "ieee",
) -> Tensor:
    """Gradient of qkv (N, 3, H, d) in its dtype: three launches, no atomics, rows of no sample zeros.

    Args:
        dout: (N, H * d) contiguous, in qkv's dtype.
        out, lse: what :func:`forward` returned with `save`.

    Raises:
        ValueError: a tensor that is not contiguous.
    """
    check_contiguous(dout=dout, qkv=qkv, out=out, lse=lse, segments=segments)
    num_rows, _, num_heads, head_dim = qkv.shape
    dqkv = torch.empty_like(qkv)
    main, rest = head_dim_parts(head_dim)
    if num_rows == 0 or max_length == 0 or segments.shape[0] == 0:
        return dqkv.zero_()
    delta = torch.empty_like(lse)
    launch(
        _delta_kernel,
        (triton.cdiv(num_rows, 32), num_heads),
        dout,
        out,
        delta,
        num_rows,
        NUM_HEADS=num_heads,
        DIM=head_dim,
        PADDED=triton.next_power_of_2(head_dim),
        BLOCK_M=32,
        num_warps=4,
    )
    block = 32
    for kernel in (_key_gradient_kernel, _query_gradient_kernel):
        launch(
            kernel,
            (segments.shape[0] * num_heads, triton.cdiv(max_length, block)),
            qkv,
            dout,
            lse,
            delta,
            segments,
            dqkv,
            num_rows,
            scale * 1.4426950408889634,
            MASK=MASKS[mask],
            NUM_HEADS=num_heads,
            DIM=head_dim,
            MAIN=main,
            REST=rest,
            PRECISION=precision,
            BLOCK_M=block,
            BLOCK_N=block,
            num_warps=warps(head_dim),
            num_stages=2,
        )
    return dqkv
