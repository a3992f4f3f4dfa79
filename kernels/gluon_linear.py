"""Half-precision kernels of the group-shared layer: what a thread loads is already what its tensor core multiplies.

Gathered features lie in memory as runs of batch values, of which a thread loads 16 bytes at a time. Which batch row, feature or label
stands at which place of a tensor core's tile is free, as long as both operands and the result agree. So the kernels number a tile's
rows and columns in the order in which the threads happen to hold them: the reshapes and permutations below move nothing, and
neither shared memory nor a barrier is needed. A warp works alone, on R labels of one group, called a unit:

    forward      z_BR  = x_FB^T W_RF^T + b           x's batch tile stays in the first-level cache while all groups pass by
    grad_weight  dW_RF = sum over tiles dz_BR^T x_FB^T, and the biases' gradient

Letters: N batch rows, B of them a tile, D embedding width, T groups, G labels a group, R of them a unit, U units a group, F fan-in
(here padded to a power of two), S units a program, L labels. Blocks have three axes, the first of which is S.
"""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

if triton.knobs.runtime.interpret:
    # The interpreter knows no layouts. They change no result: left out, the rest is plain Triton.
    class _Plain:
        def arange(self, start, end, layout):
            return tl.arange(start, end)

        def zeros(self, shape, dtype, layout):
            return tl.zeros(shape, dtype)

        def convert_layout(self, value, layout):
            return value

        def SliceLayout(self, axis, parent):
            return None

        def __getattr__(self, name):
            return getattr(tl, name, None) or getattr(gluon.language, name)

    gl = _Plain()
    jit = triton.jit

    def layout(function):
        return lambda *arguments: None

    def mma_v2(a, b, acc):
        return tl.dot(a, b, acc, input_precision="ieee")
else:
    from triton.experimental.gluon.language.nvidia.ampere import mma_v2  # type: ignore[no-redef]

    jit, layout = gluon.jit, gluon.constexpr_function


@layout
def _bits(axis, first, end):
    """Basis vectors of the bits from ``first`` to below ``end``, powers of two, of an index along ``axis``."""
    return [[first << i if a == axis else 0 for a in range(3)] for i in range((end // first).bit_length() - 1)]


@layout
def _layout(shape, registers, lanes, warps):
    """Which register, lane and warp holds each element: by the bits of its place. Warps share the units out."""
    return gluon.language.DistributedLinearLayout(registers + _bits(0, warps, shape[0]), lanes, _bits(0, 1, warps), [], shape)


@layout
def along(layout, axis):
    """The layout of an index along ``axis`` of blocks of ``layout``."""
    inner, outer = [(1, 2), (0, 2), (0, 1)][axis]
    return gluon.language.SliceLayout(inner, gluon.language.SliceLayout(outer, layout))


@layout
def mma_layout(warps):
    return gluon.language.NVMMADistributedLayout([2, 0], [warps, 1, 1], [1, 16, 8])


@layout
def operand(number, warps):
    layout = gluon.language.NVMMADistributedLayout([2, 0], [warps, 1, 1], [1, 16, 8])
    return gluon.language.DotOperandLayout(number, layout, 2)


# A lane is 4 r + q: r = 0..7 counts rows of a tile (or columns of the second operand), q = 0..3 pairs along the inner axis. So the
# lanes' bits below are two for q, then three for r.


@layout
def forward_x(S, F, B, warps):
    """x_SFB: q counts features in eights, r batch rows in eights."""
    registers = _bits(2, 1, 8) + _bits(1, 1, 8) + _bits(1, 32, F) + _bits(2, 64, B)
    return _layout([S, F, B], registers, _bits(1, 8, 32) + _bits(2, 8, 64), warps)


@layout
def forward_w(S, R, F, warps):
    """w_SRF: q counts features as in x; r labels in pairs of every four."""
    registers = _bits(2, 1, 8) + _bits(1, 2, 4) + _bits(2, 32, F) + _bits(1, 16, R)
    return _layout([S, R, F], registers, _bits(2, 8, 32) + _bits(1, 1, 2) + _bits(1, 4, 16), warps)


@layout
def forward_z(S, B, R, warps):
    """z_SBR as the product leaves it: four neighbouring labels a thread."""
    registers = _bits(2, 1, 4) + _bits(1, 1, 8) + _bits(2, 16, R) + _bits(1, 64, B)
    return _layout([S, B, R], registers, _bits(2, 4, 16) + _bits(1, 8, 64), warps)


@jit(do_not_specialize=["n", "units", "tiles", "processors", "share"])
def forward(
    x,  # (D, NP) half, in: x transposed, NP a multiple of B
    weight,  # (T, G, F) half or float32, in
    index,  # (T, F) int16 or int32, in
    bias,  # (L,) any float type or None, in
    out,  # (N, L) half, out
    n,
    stride,  # NP
    rows,  # L
    units,  # T * U
    tiles,  # NP / B
    processors,  # programs are numbered so that those of one multiprocessor share a tile
    share,  # multiprocessors a tile
    G: tl.constexpr,
    F: tl.constexpr,
    F_PADDED: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    B: tl.constexpr,
    WARPS: tl.constexpr,
):
    U: tl.constexpr = (G + R - 1) // R
    LX: tl.constexpr = forward_x(S, F_PADDED, B, WARPS)
    LW: tl.constexpr = forward_w(S, R, F_PADDED, WARPS)
    LZ: tl.constexpr = forward_z(S, B, R, WARPS)
    s_x = gl.expand_dims(gl.expand_dims(gl.arange(0, S, along(LX, 0)), 1), 2)
    f_x = gl.expand_dims(gl.expand_dims(gl.arange(0, F_PADDED, along(LX, 1)), 0), 2)
    b_x = gl.expand_dims(gl.expand_dims(gl.arange(0, B, along(LX, 2)), 0), 1)
    s_w = gl.expand_dims(gl.expand_dims(gl.arange(0, S, along(LW, 0)), 1), 2)
    r_w = gl.expand_dims(gl.expand_dims(gl.arange(0, R, along(LW, 1)), 0), 2)
    f_w = gl.expand_dims(gl.expand_dims(gl.arange(0, F_PADDED, along(LW, 2)), 0), 1)
    s_z = gl.expand_dims(gl.expand_dims(gl.arange(0, S, along(LZ, 0)), 1), 2)
    b_z = gl.expand_dims(gl.expand_dims(gl.arange(0, B, along(LZ, 1)), 0), 2)
    r_z = gl.expand_dims(gl.expand_dims(gl.arange(0, R, along(LZ, 2)), 0), 1)
    processor = gl.program_id(0) % processors
    turn = processor % share + gl.program_id(0) // processors * share
    turns = gl.num_programs(0) // processors * share
    for tile in range(processor // share, tiles, processors // share):
        for block in range(turn, (units + S - 1) // S, turns):
            unit = gl.minimum(block * S + s_x, units - 1).to(gl.int64)
            idx = gl.load(index + unit // U * F + f_x, mask=f_x < F, other=0).to(gl.int32)
            x_SFB = gl.load(x + tile * B + idx * stride + b_x)
            if F_PADDED > F:
                x_SFB = gl.where(f_x < F, x_SFB, 0.0)  # a padded weight is zero, but feature 0 may be infinite
            unit = gl.minimum(block * S + s_w, units - 1).to(gl.int64)
            r = unit % U * R + r_w
            at = (unit // U * G + r) * F + f_w
            w_SRF = gl.load(weight + at, mask=(r < G) & (f_w < F), other=0.0).to(x.dtype.element_ty)
            # Bits of a feature, high first: rest, 1 (pair's place in a tile), q, 1, 1, 1; as inner index: rest, 1, q, 1, 1.
            a = gl.permute(gl.reshape(x_SFB, (S, F_PADDED // 32, 4, 2, 2, 2, B // 64, 8, 8)), (0, 6, 8, 7, 1, 3, 4, 2, 5))
            a = gl.convert_layout(gl.reshape(a, (S, B, F_PADDED)), operand(0, WARPS))
            b = gl.permute(gl.reshape(w_SRF, (S, R // 16, 4, 2, 2, F_PADDED // 32, 4, 2, 2, 2)), (0, 5, 7, 8, 6, 9, 1, 3, 2, 4))
            b = gl.convert_layout(gl.reshape(b, (S, F_PADDED, R)), operand(1, WARPS))
            z = mma_v2(a, b, gl.zeros((S, B, R), gl.float32, mma_layout(WARPS)))
            z = gl.permute(gl.reshape(z, (S, B // 64, 8, 8, R // 16, 2, 4, 2)), (0, 1, 3, 2, 4, 6, 5, 7))
            z_SBR = gl.convert_layout(gl.reshape(z, (S, B, R)), LZ)
            unit = (block * S + s_z).to(gl.int64)
            r = unit % U * R + r_z
            row = unit // U * G + r
            real = (r < G) & (row < rows)
            if bias is not None:
                z_SBR += gl.load(bias + row, mask=real, other=0.0).to(gl.float32)
            batch = tile * B + b_z
            gl.store(out + batch.to(gl.int64) * rows + row, z_SBR.to(out.dtype.element_ty), mask=real & (batch < n))


@layout
def grad_weight_x(S, F, B, warps):
    """x_SFB: q counts batch rows in eights, r features: the low bit and the two high ones."""
    registers = _bits(2, 1, 8) + _bits(2, 32, B) + _bits(1, 2, F // 4)
    return _layout([S, F, B], registers, _bits(2, 8, 32) + _bits(1, 1, 2) + _bits(1, F // 4, F), warps)


@layout
def grad_weight_dz(S, B, R, warps):
    """dz_SBR: q counts batch rows as in x, r eighths of the labels."""
    registers = _bits(2, 1, R // 8) + _bits(1, 1, 8) + _bits(1, 32, B)
    return _layout([S, B, R], registers, _bits(1, 8, 32) + _bits(2, R // 8, R), warps)


@layout
def grad_weight_dw(S, R, F, warps):
    """dw_SRF as the product leaves it: a quarter of the features a thread."""
    registers = _bits(2, 1, F // 4) + _bits(1, 1, R // 8)
    return _layout([S, R, F], registers, _bits(2, F // 4, F) + _bits(1, R // 8, R), warps)


@jit(do_not_specialize=["n", "units"])
def grad_weight(
    dz,  # (N, L) half, in
    x,  # (D, NP) half, in: x transposed, NP a multiple of B
    index,  # (T, F) int16 or int32, in
    dw,  # (T, G, F) any float type, out
    db,  # (L,) float32, out
    n,
    stride,  # NP
    rows,  # L
    units,  # T * U
    stride_dz,
    G: tl.constexpr,
    F: tl.constexpr,
    F_PADDED: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    B: tl.constexpr,
    WARPS: tl.constexpr,
):
    U: tl.constexpr = (G + R - 1) // R
    LX: tl.constexpr = grad_weight_x(S, F_PADDED, B, WARPS)
    LZ: tl.constexpr = grad_weight_dz(S, B, R, WARPS)
    LW: tl.constexpr = grad_weight_dw(S, R, F_PADDED, WARPS)
    first = gl.program_id(0) * S
    f_x = gl.expand_dims(gl.expand_dims(gl.arange(0, F_PADDED, along(LX, 1)), 0), 2)
    b_x = gl.expand_dims(gl.expand_dims(gl.arange(0, B, along(LX, 2)), 0), 1)
    unit = first + gl.expand_dims(gl.expand_dims(gl.arange(0, S, along(LX, 0)), 1), 2)
    unit = gl.minimum(unit, units - 1).to(gl.int64)
    idx = gl.load(index + unit // U * F + f_x, mask=f_x < F, other=0).to(gl.int32)
    read = x + idx * stride + b_x
    b_z = gl.expand_dims(gl.expand_dims(gl.arange(0, B, along(LZ, 1)), 0), 2)
    r_z = gl.expand_dims(gl.expand_dims(gl.arange(0, R, along(LZ, 2)), 0), 1)
    unit = (first + gl.expand_dims(gl.expand_dims(gl.arange(0, S, along(LZ, 0)), 1), 2)).to(gl.int64)
    r = unit % U * R + r_z
    row = unit // U * G + r
    real = (r < G) & (row < rows)
    dw_SRF = gl.zeros((S, R, F_PADDED), gl.float32, mma_layout(WARPS))
    db_SR = gl.zeros((S, R), gl.float32, gl.SliceLayout(1, LZ))
    for start in range(0, n, B):
        batch = start + b_z
        dz_SBR = gl.load(dz + batch.to(gl.int64) * stride_dz + row, mask=real & (batch < n), other=0.0)
        x_SFB = gl.load(read + start)
        db_SR += gl.sum(dz_SBR.to(gl.float32), 1)
        a = gl.permute(gl.reshape(dz_SBR, (S, B // 32, 4, 2, 2, 2, 8, R // 8)), (0, 7, 6, 1, 3, 4, 2, 5))
        a = gl.convert_layout(gl.reshape(a, (S, R, B)), operand(0, WARPS))
        b = gl.permute(gl.reshape(x_SFB, (S, 4, F_PADDED // 8, 2, B // 32, 4, 2, 2, 2)), (0, 4, 6, 7, 5, 8, 2, 1, 3))
        b = gl.convert_layout(gl.reshape(b, (S, B, F_PADDED)), operand(1, WARPS))
        dw_SRF = mma_v2(a, b, dw_SRF)
    dw_SRF = gl.permute(gl.reshape(dw_SRF, (S, R // 8, 8, F_PADDED // 8, 4, 2)), (0, 2, 1, 4, 3, 5))
    dw_SRF = gl.convert_layout(gl.reshape(dw_SRF, (S, R, F_PADDED)), LW)
    r_w = gl.expand_dims(gl.expand_dims(gl.arange(0, R, along(LW, 1)), 0), 2)
    f_w = gl.expand_dims(gl.expand_dims(gl.arange(0, F_PADDED, along(LW, 2)), 0), 1)
    unit = (first + gl.expand_dims(gl.expand_dims(gl.arange(0, S, along(LW, 0)), 1), 2)).to(gl.int64)
    r = unit % U * R + r_w
    inside = (r < G) & (unit < units) & (f_w < F)
    gl.store(dw + (unit // U * G + r) * F + f_w, dw_SRF.to(dw.dtype.element_ty), mask=inside)
    gl.store(db + row, gl.expand_dims(db_SR, 1), mask=real)
