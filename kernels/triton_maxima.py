"""Logits for top-k in Triton, which leave the multiprocessors only as maxima of blocks; and those of a few blocks, made again.

    z_BR = x_BD W_RD^T + b   (head)      z_BG = xg_BF W_GF^T + b, xg = x_DN[idx_F, tile]^T   (tail)

Rows are taken in blocks of 16, and blocks in spans of 16. A program goes through rows for one batch tile. In the tail, programs of one
tile follow each other, so that the tile's part of x, D features of B values (96 KiB at D = 768, B = 64, bfloat16), stays in the first
cache, from which then every gather is served. Logits start from the bias, so adding it costs nothing; rows that do not exist start from
-inf. NaN is never a maximum.

The second time, logits are made by the same instructions over the same features in the same order, so they are the same to the last bit.

Letters: N batch rows (NP padded), B of them a tile, D embedding width, T groups, G rows a group, F fan-in, H head rows, R of them a tile,
K chosen blocks a batch row.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from haste_kernels.state import HeadState, TailState
from haste_kernels.triton_choose import LIST

SPAN = LIST * LIST  # rows of a span
INNER = 64  # features of one product

_LIST = tl.constexpr(LIST)


@dataclass(frozen=True)
class TailTiles:
    """How the tail's logits are made: batch tile, warps, loads in flight; spans a program, programs before the next batch tile's turn."""

    batch: int
    warps: int
    stages: int
    spans: int = 1
    phase: int = 1 << 12


@dataclass(frozen=True)
class HeadTiles:
    """How the head's logits are made: batch tile, rows of a tile, warps, loads in flight, and programs as above."""

    batch: int
    rows: int
    warps: int
    stages: int
    phase: int = 8


TAIL_CANDIDATES = (
    *(TailTiles(64, 4, 1, spans, phase) for spans in (1, 4) for phase in (1, 640 // spans, 1 << 12)),  # x from the first cache
    *(TailTiles(128, 4, 1, 1, phase) for phase in (1, 640, 1 << 12)),
    *(TailTiles(batch, warps, stages, spans, 1) for batch, warps in ((64, 4), (128, 4), (256, 4), (256, 8)) for stages in (2, 3)
      for spans in (1, 4)),  # x from the second cache, copied while others are multiplied
)  # fmt: skip
HEAD_CANDIDATES = tuple(
    HeadTiles(batch, rows, warps, stages, phase)
    for batch, rows, warps in ((128, 128, 8), (128, 256, 8), (64, 256, 4), (128, 64, 4))
    for stages in (3, 4)
    for phase in (4, 16)
)


# Fastest on an H100 (Triton 3.6, D = 768, F = 64, N = 512, bfloat16), by G; the head's for any.
TAIL_TABLE = {16: TailTiles(128, 4, 2, 1, 1), 32: TailTiles(128, 4, 1, 1, 1), 64: TailTiles(128, 4, 1, 1, 640)}
HEAD_BEST = HeadTiles(128, 64, 4, 4, 16)


def default_tail(n: int, size: int, dtype: torch.dtype) -> TailTiles:
    """The table's choice, and a sound one where nothing was measured; in float32, without tensor cores, registers limit the tile."""
    if dtype != torch.float32 and n > 64 and size in TAIL_TABLE:
        return TAIL_TABLE[size]
    most = 2048 // size if dtype == torch.float32 else 64
    return TailTiles(max(16, min(most, 64, triton.next_power_of_2(n))), 4, 1)


def default_head(n: int, dtype: torch.dtype) -> HeadTiles:
    """The same for the head."""
    batch = max(16, min(64, triton.next_power_of_2(n)))
    if dtype == torch.float32:
        return HeadTiles(batch, 64, 4, 1)
    return HEAD_BEST if n > 64 else HeadTiles(batch, 128, 4, 3)


@triton.jit
def _turn(programs, tiles, phase):
    """Program and batch tile of this instance: ``phase`` programs of one tile, the same of the next tile, and so on."""
    place = tl.program_id(0)
    begin = place // (phase * tiles) * phase
    place -= begin * tiles
    width = tl.minimum(phase, programs - begin)
    return begin + place % width, place // width


@triton.jit
def _limit(count):
    """An int64 count as an int32 that serves as a bound for what a chunk can hold."""
    return tl.minimum(tl.maximum(count, 0), 1 << 30).to(tl.int32)


@triton.jit
def _start(bias, row, real):
    """What a tile's logits start from: the bias of each ``row``, or 0; -inf where it is not ``real``."""
    if bias is None:
        return tl.where(real, 0.0, float("-inf"))
    else:
        return tl.load(bias + row, mask=real, other=float("-inf"))


@triton.jit
def _block_maxima(z, at, stride, batch, blocks):
    """Stores the largest logit of each 16 columns of ``z`` (B, R) from block ``at`` on; returns the largest of each batch row."""
    COUNT: tl.constexpr = z.shape[1] // _LIST
    largest = tl.max(tl.reshape(z, (z.shape[0], COUNT, _LIST)), 2)
    largest = tl.where(largest == largest, largest, float("-inf"))  # the maximum passes over NaN, unless there is nothing else
    place = (at + tl.arange(0, COUNT)) * stride
    tl.store(blocks + place[None, :] + batch[:, None], largest)
    return tl.max(largest, 1)


@triton.jit(do_not_specialize=["first_group", "rows", "groups", "programs", "tiles", "phase"])
def _tail_maxima(
    x,  # (D, NP) operand type, in: x transposed, zero beyond N
    index,  # (T, F) int16 or int32, in
    weight,  # (T, G, F), in
    bias,  # (T, G) float32 or None, in
    blocks,  # (blocks of the chunk, NP) float32, out
    spans,  # (spans of the chunk, NP) float32, out
    stride,  # NP
    first_group: tl.int64,  # of the chunk
    rows: tl.int64,  # real rows of the shard
    groups: tl.int64,  # T
    programs,
    tiles,
    phase,
    G: tl.constexpr,
    F: tl.constexpr,
    F_TILE: tl.constexpr,
    B: tl.constexpr,
    EACH: tl.constexpr,  # groups of a span
    SPANS: tl.constexpr,
    STAGES: tl.constexpr,
):
    program, tile = _turn(programs, tiles, phase)
    batch = tile * B + tl.arange(0, B)
    r = tl.arange(0, G)
    best = tl.full((B,), float("-inf"), tl.float32)
    first_row = first_group * G
    real_rows, last_group = _limit(rows - first_row), _limit(groups - 1 - first_group)
    for i in tl.range(0, SPANS * EACH, num_stages=STAGES):
        place = program * (SPANS * EACH) + i  # of the chunk's groups
        group = tl.minimum(place, last_group)  # a group that does not exist has no real row
        row = place * G + r
        z = tl.broadcast_to(_start(bias, first_row + row, row < real_rows)[None, :], (B, G))
        for start in tl.static_range(0, F, F_TILE):
            f = start + tl.arange(0, F_TILE)
            at_i = index + first_group * F + group * F + f
            at_w = weight + first_row * F + group * (G * F) + r[:, None] * F + f[None, :]
            if F % F_TILE == 0:
                feature = tl.load(at_i).to(tl.int32)
                xg = tl.load(x + feature[:, None] * stride + batch[None, :])
                w = tl.load(at_w, cache_modifier=".cg")
            else:
                feature = tl.load(at_i, mask=f < F, other=0).to(tl.int32)
                xg = tl.load(x + feature[:, None] * stride + batch[None, :], mask=f[:, None] < F, other=0.0)
                w = tl.load(at_w, mask=f[None, :] < F, other=0.0, cache_modifier=".cg")
            z = tl.dot(tl.trans(xg), tl.trans(w.to(xg.dtype)), z, input_precision="ieee")
        best = tl.maximum(best, _block_maxima(z, place * (G // _LIST), stride, batch, blocks))
        if i % EACH == EACH - 1:
            tl.store(spans + place // EACH * stride + batch, best)
            best = tl.full((B,), float("-inf"), tl.float32)


@triton.jit(do_not_specialize=["first", "rows", "programs", "tiles", "phase"])
def _head_maxima(
    x,  # (D, NP) operand type, in: x transposed, zero beyond N
    weight,  # (H, D), in
    bias,  # (H,) float32 or None, in
    blocks,  # (blocks of the chunk, NP) float32, out
    spans,  # (spans of the chunk, NP) float32, out
    stride,  # NP
    first: tl.int64,  # row of the chunk
    rows: tl.int64,  # H
    programs,
    tiles,
    phase,
    D: tl.constexpr,
    D_TILE: tl.constexpr,
    B: tl.constexpr,
    R: tl.constexpr,
    EACH: tl.constexpr,  # tiles of a span
    STAGES: tl.constexpr,
):
    program, tile = _turn(programs, tiles, phase)
    batch = tile * B + tl.arange(0, B)
    r = tl.arange(0, R)
    best = tl.full((B,), float("-inf"), tl.float32)
    real_rows = _limit(rows - first)
    for i in range(EACH):
        place = program * EACH + i
        row = place * R + r
        at_row = weight + first * D + tl.minimum(row, real_rows - 1).to(tl.int64)[:, None] * D
        z = tl.broadcast_to(_start(bias, first + row, row < real_rows)[None, :], (B, R))
        for start in tl.range(0, D, D_TILE, num_stages=STAGES):
            d = start + tl.arange(0, D_TILE)
            at_x, at_w = x + d[:, None] * stride + batch[None, :], at_row + d[None, :]
            if D % D_TILE == 0:
                x_DB, w = tl.load(at_x), tl.load(at_w)
            else:
                x_DB, w = tl.load(at_x, mask=d[:, None] < D, other=0.0), tl.load(at_w, mask=d[None, :] < D, other=0.0)
            z = tl.dot(tl.trans(x_DB), tl.trans(w.to(x_DB.dtype)), z, input_precision="ieee")
        best = tl.maximum(best, _block_maxima(z, place * (R // _LIST), stride, batch, blocks))
    tl.store(spans + program * stride + batch, best)


@triton.jit(do_not_specialize=["first", "rows", "begin", "end"])
def _chosen_logits(
    x,  # (N, D) operand type, in
    index,  # (T, F) int16 or int32, in; None: the head
    weight,  # (T, G, F) or (H, D), in
    bias,  # (T, G) or (H,) float32 or None, in
    chosen,  # (N, K) int32, in: blocks of the chunk, -1 none
    scores,  # (N, K * 16) float32, out: only what is chosen of this part
    first: tl.int64,  # row of the part where block ``begin`` starts
    rows: tl.int64,  # real rows of the part
    begin,  # this part's blocks in the chunk
    end,
    D: tl.constexpr,
    G: tl.constexpr,  # rows that share an index
    F: tl.constexpr,  # D in the head
    F_TILE: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    B: tl.constexpr,  # rows of the product: the fewest that take the same instructions as the first pass
    STAGES: tl.constexpr,
):
    """The logits of P chosen blocks of one batch row: product row m reads x for block m % P, and row m < P keeps block m's columns."""
    n = tl.program_id(0).to(tl.int64)
    pair = tl.program_id(1) * P + tl.arange(0, P)
    block = tl.load(chosen + n * K + pair, mask=pair < K, other=-1)
    mine = (block >= begin) & (block < end)
    if tl.sum(mine.to(tl.int32)) > 0:
        c = tl.arange(0, P * _LIST)
        pair_C = tl.program_id(1) * P + c // _LIST
        block_C = tl.load(chosen + n * K + pair_C, mask=pair_C < K, other=-1)
        mine_C = (block_C >= begin) & (block_C < end)
        row_C = first + (block_C - begin).to(tl.int64) * _LIST + c % _LIST
        real_C = mine_C & (row_C < rows)
        z = tl.broadcast_to(_start(bias, row_C, real_C)[None, :], (B, P * _LIST))
        at_w = weight + row_C[:, None] * F
        for start in tl.range(0, F, F_TILE, num_stages=STAGES):
            f = start + tl.arange(0, F_TILE)
            real_f = f < F
            if index is None:
                xg = tl.broadcast_to(tl.load(x + n * D + f, mask=real_f, other=0.0)[None, :], (P, F_TILE))
            else:
                group = (first + tl.where(mine, block - begin, 0).to(tl.int64) * _LIST) // G
                feature = tl.load(index + group[:, None] * F + f[None, :], mask=real_f[None, :], other=0).to(tl.int32)
                xg = tl.load(x + n * D + feature, mask=real_f[None, :], other=0.0)
            xg = tl.reshape(tl.broadcast_to(xg[None], (B // P, P, F_TILE)), (B, F_TILE))
            w = tl.load(at_w + f[None, :], mask=real_C[:, None] & real_f[None, :], other=0.0)
            z = tl.dot(xg, tl.trans(w.to(xg.dtype)), z, input_precision="ieee")
        out = scores + (n * K + tl.program_id(1) * P) * _LIST + c
        own = tl.arange(0, B)[:, None] == c[None, :] // _LIST
        tl.store(tl.broadcast_to(out[None, :], (B, P * _LIST)), z, mask=own & mine_C[None, :])


@dataclass
class Part:
    """The head or the tail as the kernels want it."""

    state: HeadState | TailState
    rows: int  # real ones
    x_ND: Tensor  # of the operand type
    x_DN: Tensor  # the same, transposed, padded with zeros to NP batch rows
    warps: int
    batch: int

    @property
    def spans(self) -> int:
        return -(-self.rows // SPAN)

    @property
    def tiles(self) -> int:
        return self.x_DN.shape[1] // self.batch


def tail_maxima(part: Part, config: TailTiles, first_row: int, count: int, blocks: Tensor, spans: Tensor) -> None:
    """Block and span maxima of ``count`` spans of the tail."""
    tail = part.state
    assert isinstance(tail, TailState)
    groups, size, fan_in = tail.weight.shape
    programs = triton.cdiv(count, config.spans)
    _tail_maxima[(programs * part.tiles,)](
        part.x_DN, tail.index, tail.weight, tail.bias, blocks, spans, part.x_DN.shape[1], first_row // size, part.rows, groups,
        programs, part.tiles, config.phase, G=size, F=fan_in, F_TILE=_tile(fan_in), B=config.batch, EACH=SPAN // size, SPANS=config.spans,
        STAGES=config.stages, num_warps=config.warps,
    )  # fmt: skip


def head_maxima(part: Part, config: HeadTiles, first_row: int, count: int, blocks: Tensor, spans: Tensor) -> None:
    """The same of the head."""
    width = part.x_ND.shape[1]
    _head_maxima[(count * part.tiles,)](
        part.x_DN, part.state.weight, part.state.bias, blocks, spans, part.x_DN.shape[1], first_row, part.rows, count, part.tiles,
        config.phase, D=width, D_TILE=_tile(width), B=config.batch, R=config.rows, EACH=SPAN // config.rows,
        STAGES=config.stages, num_warps=config.warps,
    )  # fmt: skip


def chosen_logits(part: Part, chosen: Tensor, scores: Tensor, first_row: int, begin: int, end: int) -> None:
    """The logits of the chosen blocks that are ``begin``..``end`` - 1, which start at the part's row ``first_row``."""
    n, k = chosen.shape
    index, size = (part.state.index, part.state.weight.shape[1]) if isinstance(part.state, TailState) else (None, 1)
    fan_in = part.state.weight.shape[-1]
    exact = part.x_ND.dtype == torch.float32  # no tensor cores: any tile gives the same bits
    pairs = 4 if exact else 8
    _chosen_logits[(n, triton.cdiv(k, pairs))](
        part.x_ND, index, part.state.weight, part.state.bias, chosen, scores, first_row, part.rows, begin, end,
        D=part.x_ND.shape[1], G=size, F=fan_in, F_TILE=_tile(fan_in), K=k, P=pairs, num_warps=part.warps,
        B=16 if exact or part.batch % 64 or part.warps % 4 else 64, STAGES=1 if fan_in <= INNER else 3,
    )  # fmt: skip


def _tile(features: int) -> int:
    """Features of one product: the same in both passes."""
    return min(INNER, max(16, triton.next_power_of_2(features)))
