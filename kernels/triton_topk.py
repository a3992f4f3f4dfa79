"""The k best rows of a shard for each batch row in Triton, exact; of all logits only the maxima of blocks go through memory.

(1) All logits are made, tile by tile; the largest of each block of 16 rows and of each span of 16 blocks is written: 1/16 of their number.
(2) For each batch row the k best spans are chosen, then the k best blocks in them, by (largest score, lower row); topk.py says why that
is exact. (3) The logits of those k blocks are made again, the same to the last bit. (4) The k best of them are chosen and ordered.

All sizes are known beforehand: no atomics, no overflow, nothing to wait for, the same bits each time. Spans, the head's before the
tail's, are processed in chunks of bounded memory; a chunk's result is merged with the best so far, below whose last score nothing is
looked at again.

Letters: N batch rows (NP padded), D embedding width.
"""

import torch
from torch import Tensor

from haste_kernels import triton_maxima as maxima
from haste_kernels import tuning
from haste_kernels.backend import takes_types
from haste_kernels.products import operand_dtype
from haste_kernels.rounding import FLOAT8
from haste_kernels.state import HeadState, TailState
from haste_kernels.triton_choose import LIST, choose, rank

CHUNK_BYTES = 128 << 20  # of block maxima: half a billion logits a chunk
CHUNK_SPANS = 4096  # a program holds one number for each span of a chunk
MOST_K = 128
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WEIGHT_DTYPES = (*DTYPES, FLOAT8)


def takes(x_head_ND: Tensor | None, x_tail_ND: Tensor | None, head: HeadState | None, tail: TailState | None, k: int) -> bool:
    """Whether these kernels know the shapes and types; else the torch path serves."""
    given = [x for x in (x_head_ND, x_tail_ND) if x is not None]
    weights = [part.weight for part in (head, tail) if part is not None]
    return (
        1 <= k <= MOST_K
        and all(x.dtype in DTYPES for x in given)
        and all(weight.dtype in WEIGHT_DTYPES and takes_types(given[0], weight) for weight in weights)
        and all(weight.is_contiguous() for weight in weights)
        and all(0 < x.numel() < 1 << 30 for x in given)
        and (tail is None or tail.weight.shape[1] in (16, 32, 64, 128))
    )


@torch.no_grad()
def topk(
    x_head_ND: Tensor | None,
    x_tail_ND: Tensor | None,
    head: HeadState | None,
    tail: TailState | None,
    k: int,
    tail_tiles: maxima.TailTiles | None = None,
    head_tiles: maxima.HeadTiles | None = None,
) -> tuple[Tensor, Tensor]:
    """``haste_kernels.topk`` by Triton: same arguments, same result. No tiles: what was tuned here, else the default."""
    given = [x for x in (x_head_ND, x_tail_ND) if x is not None]
    if not given or not takes(x_head_ND, x_tail_ND, head, tail, k):
        raise ValueError(f"top-{k} of these shapes or types has no Triton kernel")
    n, device = len(given[0]), given[0].device
    tail_tiles, head_tiles = tail_tiles or _tail_tiles(x_tail_ND, tail), head_tiles or _head_tiles(x_head_ND, head)
    most = max(tail_tiles.batch if tail else 16, head_tiles.batch if head else 16)
    padded = -(-n // most) * most
    in_head, in_tail = _part(x_head_ND, head, padded, head_tiles), _part(x_tail_ND, tail, padded, tail_tiles)
    head_spans = in_head.spans if in_head else 0
    total = head_spans + (in_tail.spans if in_tail else 0)
    length = max(1, min(total, CHUNK_SPANS, CHUNK_BYTES // (4 * LIST * padded)))
    # The tail's last program may write beyond the chunk.
    spans = torch.empty(length + tail_tiles.spans, padded, device=device)
    blocks = torch.empty(len(spans) * LIST, padded, device=device)
    scores = torch.empty(n, k * LIST, device=device)
    best: tuple[Tensor, Tensor] | None = None
    for start in range(0, total, length):
        count = min(length, total - start)
        of_head = min(max(head_spans - start, 0), count)
        border = of_head * LIST  # the chunk's first block of the tail
        head_first, tail_first = start * maxima.SPAN, max(start - head_spans, 0) * maxima.SPAN
        if in_head and of_head:
            maxima.head_maxima(in_head, head_tiles, head_first, of_head, blocks, spans)
        if in_tail and of_head < count:
            maxima.tail_maxima(in_tail, tail_tiles, tail_first, count - of_head, blocks[border:], spans[of_head:])
        floor = None if best is None else best[0]
        chosen = choose(blocks, k, n, floor, parents=choose(spans, k, n, floor, count=count))
        if in_head and of_head:
            maxima.chosen_logits(in_head, chosen, scores, head_first, 0, border)
        if in_tail and of_head < count:
            maxima.chosen_logits(in_tail, chosen, scores, tail_first, border, count * LIST)
        last = choose(scores, k, n, floor, parents=chosen, by_column=True)
        head_row, tail_row = head.first_row if head else 0, tail.first_row if tail else 0
        best = rank(scores, chosen, last, best, border, head_row + head_first, tail_row + tail_first)
    if best is None:
        return torch.full((n, k), -torch.inf, device=device), torch.full((n, k), -1, dtype=torch.int64, device=device)
    return best


def tail_key(x_ND: Tensor, tail: TailState) -> str:
    """What the tail's best tiles depend on; batch sizes share a choice up to the next power of two."""
    (n, width), (_, size, fan_in) = x_ND.shape, tail.weight.shape
    return f"D={width} G={size} F={fan_in} N={_power(n)} {operand_dtype(x_ND, tail.weight)}".replace("torch.", "")


def head_key(x_ND: Tensor, head: HeadState) -> str:
    """The same for the head."""
    n, width = x_ND.shape
    return f"D={width} N={_power(n)} {operand_dtype(x_ND, head.weight)}".replace("torch.", "")


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _tail_tiles(x_ND: Tensor | None, tail: TailState | None) -> maxima.TailTiles:
    if x_ND is None or tail is None:
        return maxima.default_tail(1, 16, torch.bfloat16)  # stands for nothing
    tuned = tuning.chosen("topk_tail", tail_key(x_ND, tail), maxima.TAIL_CANDIDATES)
    return tuned or maxima.default_tail(len(x_ND), tail.weight.shape[1], operand_dtype(x_ND, tail.weight))


def _head_tiles(x_ND: Tensor | None, head: HeadState | None) -> maxima.HeadTiles:
    if x_ND is None or head is None:
        return maxima.default_head(1, torch.bfloat16)
    tuned = tuning.chosen("topk_head", head_key(x_ND, head), maxima.HEAD_CANDIDATES)
    return tuned or maxima.default_head(len(x_ND), operand_dtype(x_ND, head.weight))


def _part(
    x_ND: Tensor | None, state: HeadState | TailState | None, padded: int, config: maxima.TailTiles | maxima.HeadTiles
) -> maxima.Part | None:
    if x_ND is None or state is None:
        return None
    dtype = operand_dtype(x_ND, state.weight)
    n = len(x_ND)
    x_ND = x_ND.to(dtype).contiguous()
    x_DN = x_ND.T.contiguous() if padded == n else torch.nn.functional.pad(x_ND.T, (0, padded - n)).contiguous()
    rows = state.rows if isinstance(state, TailState) else len(state.weight)
    return maxima.Part(state, rows, x_ND, x_DN, config.warps, config.batch)
