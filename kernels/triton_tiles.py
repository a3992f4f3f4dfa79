"""What the Triton kernels share: random bits and rounding, the SGD update of a tile, the loss, the positives of a tile.

Each is the Triton twin of a definition in plain torch: ``rounding.py`` (the same counters, so the same bits), ``update.py``,
``losses.py``. Letters: R rows and C columns of a tile, N batch rows, P positives.
"""

import triton
import triton.language as tl

from haste_kernels import rounding

ROUNDS = tl.constexpr(rounding.ROUNDS)
WEIGHT = tl.constexpr(rounding.WEIGHT)
MOMENTUM = tl.constexpr(rounding.MOMENTUM)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)  # on a CPU, where inline assembly does not run
POSITIVES = tl.constexpr(16)  # of a group, that one small matrix product places in a tile: the least inner size of tl.dot
ROW_POSITIVES = tl.constexpr(4)  # of a row, looked at together


@triton.jit
def matrix_tile(matrix, first_row, first_column, rows, columns, R: tl.constexpr, C: tl.constexpr):
    """(R, C) of a (rows, columns) matrix without gaps, 0 beyond it."""
    row, column = first_row + tl.arange(0, R), first_column + tl.arange(0, C)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.load(matrix + row.to(tl.int64)[:, None] * columns + column[None, :], mask=mask, other=0.0)


@triton.jit
def random_halves(row, block, step, seed_low, seed_high, STREAM: tl.constexpr):
    """(R, C / 8, 2, 2, 2) uint32 of 16 random bits for global ``row`` (R, 1) int64 and each ``block`` (1, C / 8) of eight columns.

    The last axes are the column in its block, high bit first: one generator call serves 8 of them.
    """
    high = (row >> 32).to(tl.uint32) | (STREAM << 16)
    block, low = tl.broadcast(block.to(tl.uint32), row.to(tl.uint32))
    nothing = block & 0
    low_key, high_key = seed_low.to(tl.uint32), seed_high.to(tl.uint32)
    a, b, c, d = tl.philox_impl(block, low, nothing + high, nothing + step.to(tl.uint32), low_key, high_key, ROUNDS)
    words = tl.join(tl.join(a, c), tl.join(b, d))  # word 2 i + j at [..., i, j]
    return tl.join(words & 0xFFFF, words >> 16)


@triton.jit
def cut(value, half):
    """Float32 to bfloat16 after ``half``, 16 random bits, is added below what is kept; NaN stays."""
    bits = (value.to(tl.uint32, bitcast=True) + half) >> 16
    return tl.where(value == value, bits.to(tl.uint16).to(tl.bfloat16, bitcast=True), value.to(tl.bfloat16))


@triton.jit
def cut_to_float8(value, half):
    """Float32 to e4m3 in the same way: see ``rounding._cut_to_float8``."""
    bits = value.to(tl.uint32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + (half << 4)) >> 20) - 960
    small = ((tl.minimum(tl.abs(value), 0.015625) * 33554432.0).to(tl.uint32) + half) >> 16
    code = tl.minimum(tl.where(magnitude < 0x3C800000, small, normal), 0x7E)
    code = tl.where(magnitude < 0x7F800000, code, 0x7F) | ((bits >> 24) & 0x80)
    return code.to(tl.uint8).to(tl.float8e4nv, bitcast=True)


@triton.jit
def rounded(value, row, first_column, step, seed_low, seed_high, STREAM: tl.constexpr, FLOAT8: tl.constexpr):
    """Float32 (R, C) to bfloat16 or float8, up or down at random with the exact mean; what the type holds and NaN stay.

    ``row`` (R,) int64: global rows; ``first_column`` a multiple of 8.
    """
    block = first_column // 8 + tl.arange(0, value.shape[1] // 8)
    half = random_halves(row[:, None], block[None, :], step, seed_low, seed_high, STREAM)
    half = tl.reshape(half, value.shape)
    return cut_to_float8(value, half) if FLOAT8 else cut(value, half)


@triton.jit
def nearest(value):
    """Float32 to the nearest bfloat16, ties to the even one; NaN stays. The interpreter's own conversion cuts."""
    return cut(value, 0x7FFF + ((value.to(tl.uint32, bitcast=True) >> 16) & 1))


@triton.jit
def store(pointer, at, mask, value, row, first_column, step, seed_low, seed_high, STREAM: tl.constexpr, NEAREST: tl.constexpr):
    """Writes float32 (R, C) ``value`` to ``pointer + at``: rounded, by chance or to the nearest, where memory is shorter."""
    held: tl.constexpr = pointer.dtype.element_ty
    float8: tl.constexpr = held == tl.float8e4nv
    if held == tl.bfloat16 and NEAREST:
        tl.store(pointer + at, nearest(value), mask=mask)
    elif held == tl.bfloat16 or float8:
        tl.static_assert(not NEAREST, "float8 is rounded stochastically")
        tl.store(pointer + at, rounded(value, row, first_column, step, seed_low, seed_high, STREAM, float8), mask=mask)
    else:
        tl.store(pointer + at, value, mask=mask)


@triton.jit
def by_eights(value):
    """The same (R, C) values, eight neighbours in one thread, as memory and the generator have them.

    A product leaves them scattered, and the compiler would bring all else to it: weights, momentum and random bits, both ways.
    """
    R: tl.constexpr = value.shape[0]
    C: tl.constexpr = value.shape[1]
    even, odd = tl.split(tl.reshape(value, (R, C // 8, 2, 2, 2)))
    v0, v2 = tl.split(even)
    v1, v3 = tl.split(odd)
    v0, v4 = tl.split(v0)
    v1, v5 = tl.split(v1)
    v2, v6 = tl.split(v2)
    v3, v7 = tl.split(v3)
    even = tl.join(tl.join(v0, v4), tl.join(v2, v6))
    odd = tl.join(tl.join(v1, v5), tl.join(v3, v7))
    return tl.reshape(tl.join(even, odd), (R, C))


@triton.jit
def sgd(
    weight,
    momentum,
    at,
    mask,
    gradient,
    row,
    first_column,
    lr,
    scale,
    decay,
    inertia,
    step,
    seed_low,
    seed_high,
    NEAREST: tl.constexpr,
):
    """SGD on a tile (R, C): the unscaled gradient in float32; ``momentum`` may be None. See update.py.

    ``row`` (R,) global rows; ``first_column`` a multiple of 8.
    """
    old = tl.load(weight + at, mask=mask, other=0.0).to(tl.float32)
    m = by_eights(gradient) * scale + old * decay
    if momentum is not None:
        m += tl.load(momentum + at, mask=mask, other=0.0).to(tl.float32) * inertia
        store(momentum, at, mask, m, row, first_column, step, seed_low, seed_high, MOMENTUM, NEAREST)
    store(weight, at, mask, old - lr * m, row, first_column, step, seed_low, seed_high, WEIGHT, NEAREST)


@triton.jit
def sgd_bias(bias, momentum, at, mask, gradient, lr, scale, inertia):
    """The same for float32 biases (R,): without weight decay."""
    m = gradient * scale
    if momentum is not None:
        m += tl.load(momentum + at, mask=mask, other=0.0) * inertia
        tl.store(momentum + at, m, mask=mask)
    tl.store(bias + at, tl.load(bias + at, mask=mask) - lr * m, mask=mask)


@triton.jit
def first_places(sorted_row, first, last, row):
    """(R,) int32: the first of the places ``first``..``last``-1 of ``sorted_row`` that holds ``row`` (R,) or more; ``last`` if none."""
    low = row.to(tl.int32) * 0 + first
    high = low * 0 + last
    left = last - first
    while left > 0:
        middle = (low + high) // 2
        less = tl.load(sorted_row + middle, mask=low < high, other=0) < row
        high = tl.where((low < high) & ~less, middle, high)
        low = tl.where((low < high) & less, middle + 1, low)
        left //= 2
    return low


@triton.jit
def next_targets(positive_batch, place, end, start, N: tl.constexpr):
    """(R, N) float32, 1 at the positives of R rows in the N batch rows from ``start`` on, and the places after them.

    ``place`` (R,) of the first of each row that is not in an earlier tile, up to ``end`` (R,): each is looked at once or twice in all.
    """
    batch = start + tl.arange(0, N)
    y = tl.zeros((place.shape[0], N), tl.float32)
    more = True
    while more:
        taken = place * 0
        for i in tl.static_range(ROW_POSITIVES):
            at = place + i
            one = tl.load(positive_batch + at, mask=at < end, other=2**31 - 1).to(tl.int32)
            y = tl.where(one[:, None] == batch[None, :], 1.0, y)
            taken += (one < start + N).to(tl.int32)
        place += taken
        more = tl.max(taken) == ROW_POSITIVES
    return y, place


@triton.jit
def sigmoid(z):
    """1 / (1 + e^-z) to a few parts in 10^7, small values too (which the chip's tanh would lose), but none below 2^-62.

    Special functions are few: two values take three, for 1 / a and 1 / b are b / ab and a / ab.
    """
    if INTERPRETED:
        p = 1.0 / (1.0 + tl.exp(-z))
    else:
        p = tl.inline_asm_elementwise(
            """{
            .reg .f32 a, b, r;
            mul.f32 a, $2, 0fBFB8AA3B;
            mul.f32 b, $3, 0fBFB8AA3B;
            min.NaN.f32 a, a, 0f42780000;
            min.NaN.f32 b, b, 0f42780000;
            ex2.approx.ftz.f32 a, a;
            ex2.approx.ftz.f32 b, b;
            add.f32 a, a, 0f3F800000;
            add.f32 b, b, 0f3F800000;
            mul.f32 r, a, b;
            rcp.approx.ftz.f32 r, r;
            mul.f32 $0, r, b;
            mul.f32 $1, r, a;
            }""",
            "=f,=f,f,f",
            [z],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    return p


@triton.jit
def gradient_of(z, y, BCE: tl.constexpr):
    """dloss/dz, unscaled; ``y`` is above 0 at positives, or None: there are none."""
    if BCE:
        g = sigmoid(z)
        if y is not None:
            g = tl.where(y > 0, g - 1.0, g)
    else:
        g = 2.0 * tl.maximum(1.0 + z, 0.0)
        if y is not None:
            g = tl.where(y > 0, -2.0 * tl.maximum(1.0 - z, 0.0), g)
    return g


@triton.jit
def loss_of(z, y, BCE: tl.constexpr):
    """The loss of each pair, unscaled; ``y`` as above. softplus(z) - z is softplus(-z)."""
    grows = z  # what the loss grows with
    if y is not None:
        grows = tl.where(y > 0, -z, z)
    if BCE:
        value = tl.maximum(grows, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(grows)))
    else:
        value = tl.maximum(1.0 + grows, 0.0)
        value *= value
    return value


@triton.jit
def prefetch(pointer, LINES: tl.constexpr):
    """Asks the cache for LINES times 128 bytes from ``pointer`` on, and waits for nothing."""
    if not INTERPRETED:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [pointer.to(tl.int64) + tl.arange(0, LINES) * 128],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
