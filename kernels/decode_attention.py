"""Attention of a decoding step: the newest tokens of every beam against a prefix, the beam's words, and themselves.

All beams of a sample read its prefix (the image) from one place, so their queries, two a beam when captioning, share
tiles of 16 and its keys are loaded once. Words lie where they were written, ``words[t, slot]``; which slot holds the
t-th word of a beam stands in `history`: re-ordering beams moves indices, no key.

Rows are few and the prefix is long: SPLITS programs take a part of its keys each (Flash-Decoding, Dao et al. 2023), the
last of them the words and the new tokens too; a second launch weighs the parts by their log-sum-exp. One split needs
none.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention import MAX_HEAD_DIM, _key_tile, _load, _rows_of, head_dim_parts
from .launch import check_contiguous, launch

BLOCK_M = 16  # queries of a tile: the fewest of a tensor-core product
PROGRAMS = 512  # wanted at least: some four for each multiprocessor of a large GPU


@triton.jit
def _step(
    q, q_rest, acc, acc_rest, highest, total, keys, rows, seen, scale, STRIDE: tl.constexpr, NUM_HEADS: tl.constexpr,
    DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A tile of keys at `rows`, values beside them NUM_HEADS * DIM columns on."""
    return _key_tile(
        q, q_rest, acc, acc_rest, highest, total, keys, keys + NUM_HEADS * DIM, rows.to(tl.int64), seen, scale,
        STRIDE, DIM, MAIN, REST, MASKED, PRECISION,
    )  # fmt: skip


@triton.jit(do_not_specialize=["length", "num_rows"])
def _decode_kernel(
    qkv, prefix, segments, words, history, out, lse, length, num_rows, scale, NUM_HEADS: tl.constexpr,
    DIM: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, BEAMS: tl.constexpr, TOKENS: tl.constexpr,
    SPLITS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_M of a sample's BEAMS * TOKENS queries, one head, one split of the keys."""
    sample = tl.program_id(0) // NUM_HEADS
    head = tl.program_id(0) % NUM_HEADS
    split = tl.program_id(2)
    width: tl.constexpr = NUM_HEADS * DIM
    columns = tl.arange(0, MAIN)
    query = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)  # of the sample; beam after beam
    beam = query // TOKENS
    first = sample * (BEAMS * TOKENS)
    rows = (first + tl.minimum(query, BEAMS * TOKENS - 1)).to(tl.int64)
    new = qkv + head * DIM
    q = _load(new, rows, columns, DIM, 3 * width, MAIN <= DIM)  # [BM, MAIN]
    q_rest = q
    acc = tl.zeros((BLOCK_M, MAIN), tl.float32)
    acc_rest = acc
    if REST:
        q_rest = _load(new, rows, MAIN + tl.arange(0, REST), DIM, 3 * width, MAIN + REST <= DIM)
        acc_rest = tl.zeros((BLOCK_M, REST), tl.float32)
    highest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)

    # the prefix: whole tiles a split, so that only the last has an end to look for
    segment = segments + 4 * sample
    vision_start = tl.load(segment)
    vision_len = tl.load(segment + 1)
    text_start = tl.load(segment + 2)
    prefix_len = vision_len + tl.load(segment + 3)
    part = tl.cdiv(prefix_len, BLOCK_N * SPLITS) * BLOCK_N
    end = tl.minimum(prefix_len, (split + 1) * part)
    for start in range(split * part, end, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        key_rows = _rows_of(tl.minimum(key, prefix_len - 1), vision_start, vision_len, text_start)
        acc, acc_rest, highest, total = _step(
            q, q_rest, acc, acc_rest, highest, total, prefix + head * DIM, key_rows, (key < prefix_len)[None, :], scale,
            2 * width, NUM_HEADS, DIM, MAIN, REST, True, PRECISION,
        )  # fmt: skip

    if split == SPLITS - 1:
        slots = num_rows // TOKENS
        # words, all first ones before all second ones: key t * BEAMS + b is the t-th word of beam b
        for start in range(0, length * BEAMS, BLOCK_N):
            key = start + tl.arange(0, BLOCK_N)
            time = tl.minimum(key // BEAMS, length - 1)
            slot = tl.load(history + time * slots + sample * BEAMS + key % BEAMS)
            seen = (key < length * BEAMS)[None, :] & ((key % BEAMS)[None, :] == beam[:, None])
            acc, acc_rest, highest, total = _step(
                q, q_rest, acc, acc_rest, highest, total, words + head * DIM, time * slots + slot, seen, scale,
                2 * width, NUM_HEADS, DIM, MAIN, REST, True, PRECISION,
            )  # fmt: skip
        # the new tokens, each seen by itself and its beam's later ones: from the first beam of the tile to its end
        begin = tl.program_id(1) * BLOCK_M
        for start in range(begin // TOKENS * TOKENS, tl.minimum(begin + BLOCK_M, BEAMS * TOKENS), BLOCK_M):
            key = start + tl.arange(0, BLOCK_M)
            seen = ((key // TOKENS)[None, :] == beam[:, None]) & (key[None, :] <= query[:, None])
            acc, acc_rest, highest, total = _step(
                q, q_rest, acc, acc_rest, highest, total, new + width, first + tl.minimum(key, BEAMS * TOKENS - 1),
                seen, scale, 3 * width, NUM_HEADS, DIM, MAIN, REST, True, PRECISION,
            )  # fmt: skip

    total = tl.where(total == 0.0, 1.0, total)  # a split without keys: zeros, of weight 2 ** -inf
    inverse = 1.0 / total
    exists = query < BEAMS * TOKENS
    row = split.to(tl.int64) * num_rows + rows
    target = out + row * width + head * DIM
    mask = exists[:, None] & (columns < DIM)[None, :]
    tl.store(target[:, None] + columns[None, :], (acc * inverse[:, None]).to(out.dtype.element_ty), mask=mask)
    if REST:
        rest = MAIN + tl.arange(0, REST)
        mask = exists[:, None] & (rest < DIM)[None, :]
        tl.store(target[:, None] + rest[None, :], (acc_rest * inverse[:, None]).to(out.dtype.element_ty), mask=mask)
    if SPLITS > 1:
        tl.store(lse + row * NUM_HEADS + head, highest + tl.log2(total), mask=exists)


@triton.jit(do_not_specialize=["num_rows"])
def _merge_kernel(
    parts, lse, out, num_rows, DIM: tl.constexpr, PADDED: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr
):
    """out[i] = sum over splits of parts[split, i], weighed by 2 ** lse[split, i]; i counts rows times heads."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = index < num_rows
    # four of a thread, not the eight that a 16-byte store of `out` would take: loads of `parts` are then whole sectors
    columns = tl.max_contiguous(tl.arange(0, PADDED), 4)
    mask = exists[:, None] & (columns < DIM)[None, :]
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    for split in tl.static_range(SPLITS):
        highest = tl.maximum(highest, tl.load(lse + split * num_rows + index, mask=exists, other=0.0))
    total = tl.zeros((BLOCK,), tl.float32)
    acc = tl.zeros((BLOCK, PADDED), tl.float32)
    for split in tl.static_range(SPLITS):
        row = split * num_rows + index
        weight = tl.exp2(tl.load(lse + row, mask=exists, other=0.0) - highest)
        total += weight
        place = parts + row.to(tl.int64)[:, None] * DIM + columns[None, :]  # [BLOCK, PADDED]
        acc += weight[:, None] * tl.load(place, mask=mask, other=0.0)
    place = out + index.to(tl.int64)[:, None] * DIM + columns[None, :]
    tl.store(place, (acc / total[:, None]).to(out.dtype.element_ty), mask=mask)


def tile(dtype: torch.dtype) -> dict[str, int]:
    """Keys of a tile, and the warps that share it: one, because maxima and sums of its 16 rows then stay in registers
    (175 k warp instructions for 3 beams on 901 + 7 keys in bf16, 329 k with four). In fp32 that would spill."""
    return {"BLOCK_N": 32, "num_warps": 4} if dtype == torch.float32 else {"BLOCK_N": 64, "num_warps": 1}


def splits(programs: int, key_tiles: int) -> int:
    """Parts of the prefix: a power of two, so that few kernels are compiled, with a tile of keys each at least."""
    wanted = min(PROGRAMS // max(programs, 1), key_tiles)
    return 1 << max(wanted, 1).bit_length() - 1


def forward(
    qkv: Tensor,
    prefix: Tensor,
    segments: Tensor,
    words: Tensor,
    history: Tensor,
    length: int,
    scale: float,
    max_prefix: int,
    *,
    precision: str = "ieee",
) -> Tensor:
    """``ops.decode_attention``: one launch, two where keys are split.

    Args:
        qkv: (R * T, 3, H, d) contiguous, T new tokens of each of R beams; fp32, bf16 or fp16; d at most 128.
        prefix: (N, 2, H, d) contiguous keys and values, qkv's dtype.
        segments: int32 (B, 4), where each sample's prefix lies; read on the device. R is a multiple of B.
        words: (C, R, 2, H, d) contiguous, keys and values by place and slot.
        history: int32 (C, R) contiguous, the slot of each beam's t-th word.
        length: words that count, at most C.
        scale: of the scores.
        max_prefix: no prefix is longer.
        precision: of fp32 products: "ieee" or "tf32".

    Returns:
        (R * T, H * d).

    Raises:
        ValueError: a tensor that is not contiguous, a head dimension above 128.
    """
    check_contiguous(qkv=qkv, prefix=prefix, segments=segments, words=words, history=history)
    num_rows, _, num_heads, head_dim = qkv.shape
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"qkv must have a head dimension of at most {MAX_HEAD_DIM}, got {head_dim}")
    out = qkv.new_empty(num_rows, num_heads * head_dim)
    if num_rows == 0:
        return out
    batch_size, num_beams = segments.shape[0], words.shape[1] // segments.shape[0]
    tokens = num_rows // words.shape[1]
    tiles = triton.cdiv(num_beams * tokens, BLOCK_M)
    shape = tile(qkv.dtype)
    num_splits = splits(batch_size * num_heads * tiles, max_prefix // shape["BLOCK_N"])
    parts, lse = out, None
    if num_splits > 1:
        parts = qkv.new_empty(num_splits, num_rows, num_heads * head_dim, dtype=torch.float32)
        lse = qkv.new_empty(num_splits, num_rows, num_heads, dtype=torch.float32)
    main, rest = head_dim_parts(head_dim)
    launch(
        _decode_kernel,
        (batch_size * num_heads, tiles, num_splits),
        qkv,
        prefix,
        segments,
        words,
        history,
        parts,
        lse,
        length,
        num_rows,
        scale * 1.4426950408889634,  # exponentials are powers of two
        NUM_HEADS=num_heads,
        DIM=head_dim,
        MAIN=main,
        REST=rest,
        BEAMS=num_beams,
        TOKENS=tokens,
        SPLITS=num_splits,
        PRECISION=precision,
        BLOCK_M=BLOCK_M,
        **shape,
        num_stages=2,
    )
    if num_splits > 1:
        launch(
            _merge_kernel,
            (triton.cdiv(num_rows * num_heads, 16),),
            parts,
            lse,
            out,
            num_rows * num_heads,
            DIM=head_dim,
            PADDED=triton.next_power_of_2(head_dim),
            SPLITS=num_splits,
            BLOCK=16,
            num_warps=4,
        )
    return out
