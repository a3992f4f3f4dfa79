"""Launches every kernel on small ragged shapes, for compute-sanitizer: see test_sanitizer_gpu.py. Says which."""

import itertools
from dataclasses import replace

import torch
import triton
from torch import Tensor

from haste_kernels import (
    HeadState,
    Positives,
    StepArgs,
    TailState,
    encoder_ops,
    head_step,
    random_features,
    slab_linear,
    slab_tail,
    slabs,
    tail_step,
    topk,
    triton_head,
    triton_linear,
    triton_tail,
)

CUDA = torch.device("cuda")
N, WIDTH, FAN_IN = 70, 72, 48  # no multiples of a tile
ARGS = StepArgs(lr=0.05, scale=0.25, momentum=0.9, weight_decay=1e-3, seed=2**40 + 3, step=9)
BF16, FP32, FP8 = torch.bfloat16, torch.float32, torch.float8_e4m3fn
NEW = torch.cuda.get_device_capability() >= (8, 9)  # reads float8


def normal(*shape: int, dtype: torch.dtype | None = FP32) -> Tensor | None:
    return None if dtype is None else torch.randn(*shape).to(dtype).to(CUDA)


def positives(rows: int, times: int, rate: float = 0.02) -> Positives:
    """Some pairs of them, each ``times`` times."""
    row, batch = (torch.rand(rows, N) < rate).nonzero(as_tuple=True)
    return Positives(batch.repeat_interleave(times).to(CUDA), row.repeat_interleave(times).to(CUDA))


def tail_state(
    size: int, fan_in: int, dtype: torch.dtype, momentum: torch.dtype | None, bias: bool, groups: int = 5, width: int = WIDTH
) -> TailState:
    index = random_features(0, groups, width, fan_in, 7, CUDA)
    biases = normal(groups, size) if bias else None, normal(groups, size) if bias and momentum else None
    weight, kept = normal(groups, size, fan_in, dtype=dtype), normal(groups, size, fan_in, dtype=momentum)
    return TailState(weight, index, kept, *biases, 2**33, groups * size - 3, 0)


def tails() -> None:
    x_ND = normal(N, WIDTH, dtype=BF16)
    summed = [replace(ARGS, half_sums=half, deterministic=fixed) for half, fixed in ((True, False), (False, False), (False, True))]
    for args, rows_first in itertools.product(summed, (True, False)):
        for rate in (0.003, 0.03):  # few in a group, and many
            tail = tail_state(16, FAN_IN, BF16, BF16, True)
            triton_tail.tail_step(x_ND, positives(tail.rows, 1, rate), tail, args, True, triton_tail.TailConfig(32, rows_first, 4, 2))
    for size, fan_in, momentum, bias, times, loss in (
        (16, 64, None, False, 0, "bce"), (32, 32, FP32, True, 2, "squared_hinge"),
        (64, 64, BF16, True, 1, "bce"), (128, 16, BF16, False, 2, "bce"),
    ):  # fmt: skip
        tail = tail_state(size, fan_in, BF16, momentum, bias)
        tail_step(x_ND, positives(tail.rows, times), tail, replace(ARGS, loss=loss))
    if NEW:
        for size, momentum in ((16, BF16), (64, None)):
            tail = tail_state(size, FAN_IN, FP8, momentum, True)
            tail_step(x_ND, positives(tail.rows, 1), tail, ARGS)
    tail = tail_state(16, 16, FP32, FP32, True)
    tail_step(x_ND.float(), positives(tail.rows, 1), tail, ARGS)
    tail, fixed = tail_state(16, 64, BF16, BF16, True), replace(ARGS, deterministic=True)
    if slab_tail.takes(x_ND, tail, fixed):
        for want_loss in (False, True):
            slab_tail.tail_step(x_ND, positives(tail.rows, 2), tail, fixed, want_loss)


def heads() -> None:
    triton_head.CHUNK_BYTES = 2 * N * 150  # two chunks and more
    kinds = [(BF16, BF16, True, 2), (BF16, None, False, 0), (FP32, FP32, True, 1), *([(FP8, BF16, True, 1)] if NEW else [])]
    for dtype, momentum, bias, times in kinds:
        head = HeadState(
            normal(300, WIDTH, dtype=dtype), normal(300, WIDTH, dtype=momentum), normal(300) if bias else None,
            normal(300) if bias and momentum else None, 3,
        )  # fmt: skip
        head_step(normal(N, WIDTH, dtype=BF16 if dtype == FP8 else dtype), positives(300, times), head, ARGS, want_loss=bias)


def best() -> None:
    for dtype, size, k in ((BF16, 16, 5), (BF16, 64, 100), (FP32, 32, 1), *([(FP8, 16, 5)] if NEW else [])):
        x_ND = normal(N, WIDTH, dtype=BF16 if dtype == FP8 else dtype)
        head = HeadState(normal(600, WIDTH, dtype=dtype), None, normal(600), None, 0)
        topk(x_ND, x_ND, head, tail_state(size, FAN_IN, dtype, None, True, 2400 // size), k)


def layers() -> None:
    for size, fan_in in ((1, FAN_IN), (12, FAN_IN), (16, 64), (64, 64)):
        tail = tail_state(size, fan_in, BF16, None, True, 7)
        x, bias = normal(N, WIDTH, dtype=BF16), tail.bias.view(-1)[: tail.rows] if size > 1 else tail.bias.view(-1)
        rows = len(bias)
        dz = normal(N, rows, dtype=BF16)
        for config in (None, triton_linear.PLAIN):
            triton_linear.forward(x, tail.weight, tail.index, bias, rows, config)
            triton_linear.grad_x(dz, tail.weight, tail.index, WIDTH, config)
            triton_linear.grad_weight(dz, x, tail.index, torch.empty_like(tail.weight), config)
            if size == 1:
                break
    for size, fan_in, spare in ((16, 64, 0), (32, 16, 0), (48, 128, 3), (64, 32, 1)):
        width, rows = 2 * WIDTH, 31 * size - spare
        tail = tail_state(size, fan_in, BF16, None, True, 31, width)
        x, dz, bias = normal(N, width, dtype=BF16), normal(N, rows, dtype=BF16), normal(rows)
        if slab_linear.takes("forward", x, tail.weight, width):
            slab_linear.forward(x, tail.weight, tail.index, bias, rows)
            slab_linear.grad_x(dz, tail.weight, tail.index, width)


def turns() -> None:
    """Kernels whose warps add in turns, with several groups for each warp."""
    x_ND, tail = normal(N, 2 * WIDTH, dtype=BF16), tail_state(16, 64, BF16, None, True, 1600, 2 * WIDTH)
    if slab_linear.takes("grad_x", x_ND, tail.weight, 2 * WIDTH):
        slab_linear.grad_x(normal(N, tail.rows, dtype=BF16), tail.weight, tail.index, 2 * WIDTH)
    fixed = replace(ARGS, deterministic=True)
    for n, groups, width, momentum, bias in ((300, 2700, 2 * WIDTH, BF16, True), (130, 200, 500, None, False)):
        tail, x_ND = tail_state(16, 64, BF16, momentum, bias, groups, width), normal(n, width, dtype=BF16)
        if slab_tail.takes(x_ND, tail, fixed):
            slab_tail.tail_step(x_ND, positives(tail.rows, 2, 1e-3), tail, fixed)


def encoders() -> None:
    """A transformer's layer and the embeddings before it: every tile of attention, with and without padding and dropout."""
    seed = torch.tensor([2**40 + 3], device=CUDA)
    for tokens, heads, width, p, hides, paired in (
        (20, 2, 32, 0.1, True, True), (50, 3, 64, 0.0, False, True), (50, 2, 64, 0.1, True, False), (100, 1, 16, 0.3, True, False),
        (128, 2, 64, 0.1, False, False),
    ):  # fmt: skip
        size = heads * width
        tables = [normal(*shape, dtype=BF16).requires_grad_() for shape in ((40, size), (tokens, size), (size,), (size,), (size,))]
        e_BSH = encoder_ops.embed(torch.randint(0, 40, (7, tokens)).to(CUDA), *tables, 3, p, 1e-5, seed)
        e_BSH.backward(torch.randn_like(e_BSH))
        x_BSH, w_CH = normal(7, tokens, size, dtype=BF16).requires_grad_(), normal(3 * size, size, dtype=BF16).requires_grad_()
        seen = (torch.rand(7, tokens) < 0.8).to(CUDA) if hides else None
        pair = normal(heads, tokens, tokens, dtype=BF16).requires_grad_() if paired else None
        c_BSH, r_BSH = encoder_ops.attend(x_BSH, w_CH, normal(3 * size, dtype=BF16), seen, heads, p, seed, pair)
        norm = [normal(size, dtype=BF16).requires_grad_() for _ in range(3)]
        y_MH = encoder_ops.dropout_add_norm(c_BSH.flatten(0, 1), norm[0], r_BSH.flatten(0, 1), *norm[1:], p, 1e-5, seed)
        z_MC, r_MH = encoder_ops.widen(y_MH, normal(300, size, dtype=BF16), normal(300, dtype=BF16).requires_grad_())
        torch.autograd.backward((z_MC, r_MH), (torch.randn_like(z_MC), torch.randn_like(r_MH)))


def main() -> None:
    launched: set[str] = set()
    run = triton.JITFunction.run

    def noted(self: triton.JITFunction, *args: object, **kwargs: object) -> object:
        launched.add(f"{self.fn.__module__.split('.')[-1]}.{self.fn.__name__}")
        return run(self, *args, **kwargs)

    triton.JITFunction.run = noted
    kernel = slabs._kernel
    slabs._kernel = lambda index, files, name: launched.add(f"{files[-1][:-3]}.{name.split('<')[0]}") or kernel(index, files, name)
    torch.manual_seed(0)
    for part in [tails, heads, best, layers, turns, encoders]:
        part()
        torch.cuda.synchronize()
    print(f"{len(launched)} kernels:", *sorted(launched))


if __name__ == "__main__":
    main()
