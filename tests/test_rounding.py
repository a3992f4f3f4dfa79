"""Stochastic rounding: the generator against its published answers, unbiased means, the same bits for any sharding."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from haste_kernels.rounding import FLOAT8, MOMENTUM, ROUNDS, WEIGHT, philox, random_words, stochastic_round
from haste_kernels.state import StepArgs
from haste_kernels.update import sgd_

WORD = st.integers(0, 2**32 - 1)
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)


def plain_philox(counter: tuple[int, ...], key: tuple[int, ...], rounds: int) -> tuple[int, ...]:
    """The generator in Python integers, from the paper."""
    c, k = list(counter), list(key)
    for _ in range(rounds):
        high0, low0 = divmod(0xD2511F53 * c[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 2**32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return tuple(c)


def torch_philox(counter: tuple[int, ...], key: tuple[int, ...], rounds: int) -> tuple[int, ...]:
    c0, c1, c2, c3 = (torch.tensor([c]) for c in counter)
    return tuple(int(word) for word in philox((key[0], key[1]), (c0, c1, c2, c3), rounds))


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # Random123's kat_vectors, philox4x32 with 10 rounds
        ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (*PI, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ],
)
def test_published_answers(counter, key, words):
    assert plain_philox(counter, key, 10) == words
    assert torch_philox(counter, key, 10) == words


@settings(max_examples=50, deadline=None)
@given(st.tuples(WORD, WORD, WORD, WORD), st.tuples(WORD, WORD))
def test_seven_rounds_equal_plain_integers(counter, key):
    assert ROUNDS == 7
    assert torch_philox(counter, key, ROUNDS) == plain_philox(counter, key, ROUNDS)


def test_counter_layout():
    """The layout is a contract with other implementations: key = seed, counter = (block, row low, row high | stream << 16, step)."""
    seed, step, row, stream = 0x1234567_89ABCDEF, 77, (0xAB << 32) + 0xCDEF0123, 3
    words = random_words(seed, step, torch.tensor([5, row]), 4, stream)
    assert words.shape == (2, 4, 4)
    assert tuple(words[1, 2].tolist()) == plain_philox((2, 0xCDEF0123, 0xAB | stream << 16, step), (0x89ABCDEF, 0x1234567), 7)


def test_value_uses_its_half_word():
    """Column 8 b + 2 w + h is rounded up exactly where half h of word w of block b carries into the kept bits."""
    rows, columns = torch.arange(90, 97), 21
    values = torch.randn(len(rows), columns)
    got = stochastic_round(values, 11, 4, rows, MOMENTUM).view(torch.int16).int() & 0xFFFF
    words = random_words(11, 4, rows, 3, MOMENTUM)
    for i in range(len(rows)):
        for j in range(columns):
            half = int(words[i, j // 8, j % 8 // 2]) >> 16 * (j % 2) & 0xFFFF
            bits = int(values.view(torch.int32)[i, j]) & 0xFFFFFFFF
            assert int(got[i, j]) == bits + half >> 16


def test_mean_is_exact_within_three_standard_errors():
    values = torch.tensor([1.001, -0.3333, 3.14159e-5, -1e4 / 3, 1e-39, 2.0**-126 * 1.37, 123.456, -7e20])
    draws, rows = 10_000, torch.arange(50)
    total = torch.zeros(len(values), dtype=torch.float64)
    for step in range(draws // len(rows)):
        total += stochastic_round(values.expand(len(rows), -1).contiguous(), 3, step, rows, WEIGHT).double().sum(0)
    low = (values.view(torch.int32) & -65536).view(torch.float32).double()
    high = ((values.view(torch.int32) & -65536) + 65536).view(torch.float32).double()
    p = (values.double() - low) / (high - low)
    error = (high - low).abs() * (p * (1 - p) / draws).sqrt()
    assert (p > 0).all()
    assert ((total / draws - values.double()).abs() <= 3 * error).all()


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_same_bits_for_any_sharding(shards):
    rows = torch.arange(2**40 - 20, 2**40 - 3)
    values = torch.randn(len(rows), 13, generator=torch.Generator().manual_seed(0))
    whole = stochastic_round(values, 1, 2, rows, WEIGHT)
    parts = [stochastic_round(v, 1, 2, r, WEIGHT) for v, r in zip(values.tensor_split(shards), rows.tensor_split(shards), strict=True)]
    assert torch.equal(whole, torch.cat(parts))


def test_every_part_of_the_key_counts():
    values = torch.full((4, 64), 1.00390625 / 1.5)
    rows = torch.arange(4)
    base = stochastic_round(values, 1, 2, rows, WEIGHT)
    others = [
        (9, 2, rows, WEIGHT),
        (1 + 2**32, 2, rows, WEIGHT),
        (1, 3, rows, WEIGHT),
        (1, 2, rows + 4, WEIGHT),
        (1, 2, rows + 2**32, WEIGHT),
        (1, 2, rows, MOMENTUM),
    ]
    for key in others:
        assert not torch.equal(base, stochastic_round(values, *key))
    assert len({tuple(line.tolist()) for line in base}) == 4


def test_bfloat16_values_and_special_ones_stay():
    exact = torch.randn(6, 40).bfloat16().float()
    special = torch.tensor([[0.0, -0.0, torch.inf, -torch.inf, 1.0]])
    assert torch.equal(stochastic_round(exact, 0, 0, torch.arange(6), WEIGHT).float(), exact)
    got = stochastic_round(special, 0, 0, torch.arange(1), WEIGHT)
    assert torch.equal(got.view(torch.int16), special.bfloat16().view(torch.int16))
    nans = torch.tensor([[0x7FFFFFFF, 0x7F800001, -1, 0x7FC00000]], dtype=torch.int32).view(torch.float32)
    for step in range(50):
        assert stochastic_round(nans, 0, step, torch.arange(1), WEIGHT).isnan().all()


@pytest.mark.parametrize(("seed", "step"), [(-1, 0), (2**64, 0), (0, -1), (0, 2**32)])
def test_key_out_of_range(seed, step):
    with pytest.raises(ValueError, match="seed is below"):
        stochastic_round(torch.zeros(1, 1), seed, step, torch.zeros(1, dtype=torch.int64), WEIGHT)


def test_weight_and_momentum_are_rounded_by_their_own_streams():
    """w = 0, lr = -1, momentum 0.9 of 0: both would store dW, so equal bits would mean one stream."""
    dw = torch.randn(5, 48)
    weight, momentum = torch.zeros(5, 48).bfloat16(), torch.zeros(5, 48).bfloat16()
    sgd_(weight, momentum, dw.clone(), StepArgs(lr=-1.0, scale=1.0, seed=8, step=6), first_row=1000)
    rows = torch.arange(1000, 1005)
    assert torch.equal(weight, stochastic_round(dw, 8, 6, rows, WEIGHT))
    assert torch.equal(momentum, stochastic_round(dw, 8, 6, rows, MOMENTUM))
    assert not torch.equal(weight, momentum)


EIGHTS = torch.arange(256, dtype=torch.uint8).view(FLOAT8)  # every value that float8 has


def test_every_value_of_float8_stays():
    real = EIGHTS.float()[~EIGHTS.float().isnan()]
    for step in range(20):
        got = stochastic_round(real.expand(4, -1).contiguous(), 5, step, torch.arange(4), WEIGHT, FLOAT8)
        assert torch.equal(got.float(), real.expand(4, -1))


def test_float8_has_neither_infinity_nor_more_than_448():
    values = torch.tensor([[float("inf"), -float("inf"), float("nan"), 449.0, -1e30, 448.0, -0.0]])
    got = stochastic_round(values, 0, 0, torch.tensor([0]), WEIGHT, FLOAT8)[0].float()
    assert got.isnan().tolist() == [True, True, True, False, False, False, False]
    assert got[3:].tolist() == [448.0, -448.0, 448.0, 0.0]
    assert bool(got[-1].signbit())


@settings(max_examples=100, deadline=None)
@given(st.floats(-447.0, 447.0, width=32), st.integers(0, 1000))
def test_float8_is_one_of_the_two_neighbours(value, step):
    """And so are its neighbours found here: in the sorted list of all values."""
    real = EIGHTS.float()[~EIGHTS.float().isnan()].unique()
    got = stochastic_round(torch.full((64, 8), value), 1, step, torch.arange(64), MOMENTUM, FLOAT8).float()
    low, high = real[real <= value].max(), real[real >= value].min()
    assert bool(((got == low) | (got == high)).all())


def test_the_mean_of_float8_is_exact_within_three_standard_errors():
    values = torch.tensor([1.001, -0.3333, 0.0071, -0.0001, 0.0149, 3.3, -123.456, 2e-7])  # steps from 2^-9 to 2^3
    draws, rows = 10_000, torch.arange(50)
    made = [
        stochastic_round(values.expand(50, -1).contiguous(), 3, step, rows, WEIGHT, FLOAT8).double() for step in range(draws // len(rows))
    ]
    drawn = torch.cat(made)
    real = EIGHTS.double()[~EIGHTS.double().isnan()].unique()
    for i, value in enumerate(values.double()):
        low, high = real[real <= value].max(), real[real >= value].min()
        exact = ((value - low) * (high - value) / draws).sqrt()  # of a draw that is one of two values with the right mean
        assert (drawn[:, i].mean() - value).abs() <= 3 * exact + (high - low) * 2.0**-16


def test_a_float8_row_is_stored_the_same_by_any_shard():
    values = 0.1 * torch.randn(40, 33)
    whole = stochastic_round(values, 9, 2, torch.arange(100, 140), WEIGHT, FLOAT8)
    parts = [stochastic_round(values[i : i + 10], 9, 2, torch.arange(100 + i, 110 + i), WEIGHT, FLOAT8) for i in range(0, 40, 10)]
    assert torch.equal(torch.cat(parts).view(torch.uint8), whole.view(torch.uint8))
