"""Counter-based random bits, and the unbiased rounding of float32 to bfloat16 or float8 that uses them.

A number depends only on what it is for: (seed, step, global row, column, stream). So results are the same for any number of
shards, any chunk size, and in any other implementation of the same counters (Triton's ``tl.philox`` gives the same words).

    key      seed, as two 32-bit words
    counter  (column // values a call, row's low word, row's high word | stream << 16, step)

One call makes 4 words of 32 bits, which serve 8 roundings: column 8 b + 2 w + h takes half h (low first) of word w of block b.
Seven rounds are the fewest that pass the statistical batteries (Salmon et al., SC 2011, the generator's paper).

Float8 is e4m3 without infinities (Micikevicius et al., arXiv 2209.05433): 4 bits of exponent, 3 of fraction, at most 448; below 2^-6 its
values lie 2^-9 apart.

Letters: R rows, C columns.
"""

from typing import Final

import torch
from torch import Tensor

ROUNDS: Final = 7
# Streams: independent random bits for one (seed, step, row, column).
WEIGHT: Final = 0
MOMENTUM: Final = 1
FEATURES: Final = 2
REGROW: Final = 3
DROPOUT: Final = 4

FLOAT8: Final = torch.float8_e4m3fn
ROUNDED: Final = (torch.bfloat16, FLOAT8)  # what is stored rounded at random

_MASK: Final = 0xFFFFFFFF
_MULTIPLY: Final = (0xD2511F53, 0xCD9E8D57)
_WEYL: Final = (0x9E3779B9, 0xBB67AE85)


def philox(
    key: tuple[int, int], counter: tuple[Tensor, Tensor, Tensor, Tensor], rounds: int = ROUNDS
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32: int64 tensors of any shapes that broadcast, values 0..2^32-1, to four of the same."""
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(rounds):
        # The 64-bit product wraps to a signed one; its two words are right all the same.
        a, b = c0 * _MULTIPLY[0], c2 * _MULTIPLY[1]
        c0, c2 = (b >> 32).bitwise_and_(_MASK) ^ c1 ^ k0, (a >> 32).bitwise_and_(_MASK) ^ c3 ^ k1
        c1, c3 = b.bitwise_and_(_MASK), a.bitwise_and_(_MASK)
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def random_words(seed: int, step: int, rows: Tensor, blocks: int, stream: int) -> Tensor:
    """(R,) int64 global rows to (R, blocks, 4) int64, each a word of 32 random bits."""
    if not (0 <= seed < 1 << 64 and 0 <= step < 1 << 32):
        raise ValueError(f"seed={seed} step={step}: the seed is below 2^64 and the step below 2^32, neither negative")
    device = rows.device
    high = rows >> 32 | stream << 16
    block = torch.arange(blocks, device=device)[None]
    counter = (block, (rows & _MASK)[:, None], high[:, None], torch.full((1, 1), step, dtype=torch.int64, device=device))
    words = philox((seed & _MASK, seed >> 32), counter)
    return torch.stack([word.expand(len(rows), blocks) for word in words], dim=-1)


def random_halves(seed: int, step: int, rows: Tensor, columns: int, stream: int) -> Tensor:
    """(R,) int64 global rows to (R, C) int32, each 16 random bits."""
    words = random_words(seed, step, rows, -(-columns // 8), stream)
    halves = words.to(torch.int32).view(torch.int16).flatten(1)[:, :columns]  # little-endian: low half first
    return halves.to(torch.int32) & 0xFFFF


def stochastic_round(values: Tensor, seed: int, step: int, rows: Tensor, stream: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Rounds (R, C) float32 ``values`` to bfloat16 or float8, up or down with a probability that makes the mean exact.

    ``rows`` (R,) int64: the global row of each. 16 random bits are added below the kept ones and the sum is cut: a value that
    the type holds stays as it is, as do infinity and NaN. Of float8, which has no infinity, that is NaN, and values over 448 are 448.
    """
    halves = random_halves(seed, step, rows, values.shape[1], stream)
    if dtype == FLOAT8:
        return _cut_to_float8(values.contiguous(), halves)
    bits = halves.add_(values.contiguous().view(torch.int32))
    rounded = (bits >> 16).to(torch.int16).view(torch.bfloat16)
    return torch.where(values.isnan(), values.to(torch.bfloat16), rounded)


def _cut_to_float8(values: Tensor, halves: Tensor) -> Tensor:
    """Float32 to e4m3 after ``halves``, 16 random bits, are added below what is kept.

    From 2^-6 on that is float32's exponent, less 120 of its bias, and the first 3 bits of its fraction. Below, a code counts
    steps of 2^-9.
    """
    bits = values.view(torch.int32)
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + (halves << 4)) >> 20) - (120 << 3)
    small = ((values.abs().clamp(max=2**-6) * 2.0**25).to(torch.int32) + halves) >> 16
    code = torch.where(magnitude < 0x3C800000, small, normal).clamp_(max=0x7E)  # 0x3C800000 is 2^-6, 0x7E is 448
    code = torch.where(magnitude < 0x7F800000, code, 0x7F)
    return (code | bits >> 24 & 0x80).to(torch.uint8).view(FLOAT8)
