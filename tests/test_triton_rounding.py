"""Stochastic rounding in Triton: the bits of the definition, in any tile, and unbiased."""

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from haste_kernels import stochastic_round
from haste_kernels import triton_tiles as tiles
from haste_kernels.rounding import FLOAT8

if torch.cuda.is_available():
    pytest.skip("the interpreter is for machines without a GPU: tests/gpu runs the kernels themselves", allow_module_level=True)

SEED, STEP = 2**63 + 12345, 2**32 - 2


@triton.jit
def _round(
    out,
    value,
    width,
    first_row: tl.int64,
    step: tl.uint32,
    low: tl.uint32,
    high: tl.uint32,
    STREAM: tl.constexpr,
    R: tl.constexpr,
    C: tl.constexpr,
    NEAREST: tl.constexpr,
):
    row = tl.program_id(0) * R + tl.arange(0, R)
    column = tl.program_id(1) * C + tl.arange(0, C)
    at = row[:, None] * width + column[None, :]
    mask = tl.broadcast_to(column[None, :] < width, (R, C))
    v = tl.load(value + at, mask=mask, other=0.0)
    tiles.store(out, at, mask, v, first_row + row, tl.program_id(1) * C, step, low, high, STREAM, NEAREST)


def rounded(value, first_row, stream, rows, columns, step=STEP, dtype=torch.bfloat16, nearest=False):
    out = torch.empty_like(value, dtype=dtype)
    grid = (len(value) // rows, triton.cdiv(value.shape[1], columns))
    words = (SEED & 0xFFFFFFFF, SEED >> 32)
    _round[grid](out, value, value.shape[1], first_row, step, *words, STREAM=stream, R=rows, C=columns, NEAREST=nearest)
    return out


def same_bits(a, b):
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize(("rows", "columns"), [(4, 16), (16, 64), (2, 32)])
@pytest.mark.parametrize("stream", [0, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, FLOAT8])
def test_bits_are_those_of_the_definition_in_any_tile(rows, columns, stream, dtype):
    torch.manual_seed(0)
    value = torch.randn(32, 45) * (torch.logspace(-30, 30, 45) if dtype == torch.bfloat16 else torch.logspace(-4, 3, 45))
    if dtype == FLOAT8:  # of bfloat16's NaN the bits are not given
        value[0, :4] = torch.tensor([float("inf"), -float("inf"), float("nan"), -0.0])
    first = 2**33 - 7
    expected = stochastic_round(value, SEED, STEP, torch.arange(first, first + 32), stream, dtype)
    assert same_bits(rounded(value, first, stream, rows, columns, dtype=dtype), expected)


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_shards_round_the_same_bits(shards):
    torch.manual_seed(1)
    value = torch.randn(32, 64)
    whole = rounded(value, 1000, 0, 4, 64)
    parts = [rounded(part.contiguous(), 1000 + i * (32 // shards), 0, 4, 64) for i, part in enumerate(value.chunk(shards))]
    assert same_bits(torch.cat(parts), whole)


def test_the_nearest_is_torchs():
    torch.manual_seed(2)
    value = torch.randn(32, 45) * torch.logspace(-30, 30, 45)
    value[0, :6] = torch.tensor([1.0 + 2**-8, 1.0 + 3 * 2**-8, 1.0 + 2**-8 + 2**-20, -1.0 - 2**-8, 3.4e38, 2.0**-140])  # ties and ends
    assert same_bits(rounded(value, 7, 0, 4, 16, nearest=True), value.bfloat16())


@pytest.mark.parametrize("nearest", [False, True])
def test_special_values_stay(nearest):
    value = torch.tensor([[float("inf"), -float("inf"), float("nan"), 0.0, -0.0, 1.5, -2.0, 2.0**-130] * 2] * 2)
    got = rounded(value, 0, 0, 2, 16, nearest=nearest)
    assert torch.equal(got.isnan(), value.isnan())
    assert torch.equal(got.float()[~value.isnan()], value[~value.isnan()])


def test_the_mean_of_ten_thousand_draws_is_the_value():
    value = torch.tensor([1.0 + 2**-9, -3.14159, 1e-3, 123.456]).repeat(640, 16)
    draws = rounded(value, 5, 0, 32, 64).double().view(-1, 4)[:10_000]
    exact = value[0, :4].double()
    assert len(draws) == 10_000
    error = (draws.mean(0) - exact).abs()
    assert bool((error <= 3 * draws.std(0) / len(draws) ** 0.5).all())
    assert bool((draws.std(0) > 0).all())
