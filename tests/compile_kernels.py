"""Compiles kernels for GPUs that need not be there: what an interpreter cannot see (types, layouts, shared memory) shows on any machine.

    python compile_kernels.py 90 bfloat16 float8        # capability, then types of the weights

Prints a line a kernel: its name, the type, instructions that convert float8, bytes of shared memory. Exit status 1 where one does
not compile.
"""

import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from haste_kernels import triton_attention, triton_embed, triton_gelu, triton_norm, tuning
from haste_kernels.encoder_ops import LONGEST_PAIRED
from haste_launch.bench_case import BACKWARD, FORWARD, HEAD, TAIL, TOPK, Case
from haste_launch.bench_tune import META, tunables


class NoGpu:
    """What the compiler asks a driver for."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def cases(weight: str) -> Iterator[Case]:
    momentum = {"float8": "none", "bfloat16": "bfloat16", "float32": "float32"}[weight]
    yield Case(HEAD, 4096, 128, 384, 64, 16, 5, weight, momentum)
    for group in (16, 64):
        yield Case(TAIL, 4096, 128, 768, 64, group, 5, weight, momentum)
    yield Case(TOPK, 65_536, 128, 768, 64, 16, 100, weight, "none")
    if weight == "bfloat16":
        yield Case(FORWARD, 4096, 128, 768, 64, 16, 0, weight, "none")
        yield Case(BACKWARD, 4096, 128, 768, 64, 32, 0, weight, "none")


def encoder_passes() -> Iterator[tuple[str, Callable[[], object]]]:
    """What a transformer's layer launches, forward and backward, by the tokens of its texts."""

    def made(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    seed, heads, size = made(1, dtype=torch.int64), 12, 768
    for tokens in (32, 64, 128):
        qkv, x, lse = made(8, tokens, 3 * size), made(8, tokens, size), made(8, heads, tokens, dtype=torch.float32)
        seen = made(8, tokens, dtype=torch.bool)
        for pair in (None, made(heads, tokens, tokens))[: 1 + (tokens <= LONGEST_PAIRED)]:
            yield f"attention {tokens}", partial(triton_attention.attention_forward, qkv, pair, seen, heads, 0.1, seed, x, lse)
            yield f"attention {tokens}", partial(triton_attention.attention_backward, x, qkv, pair, seen, lse, heads, 0.1, seed, qkv)
    x, w, row = made(256, size), made(size), made(256, dtype=torch.float32)
    yield "norm", partial(triton_norm.norm_forward, x, w, x, w, w, 0.1, 1e-5, seed, x, x, row, row)
    yield "norm", partial(triton_norm.norm_backward, x, x, w, row, row, 0.1, seed, x, x)
    ids, word = made(2, 128, dtype=torch.int64), made(1000, size)
    yield "embed", partial(triton_embed.embed_forward, ids, word, x[:128], w, w, w, 0.1, 1e-5, seed, x, row, row)
    yield "embed", partial(triton_embed.embed_backward, x, ids, word, x[:128], w, w, row, row, 0.1, seed, x)
    yield "embed", partial(triton_embed.table_gradient, x, ids, word, 0)
    z, b = made(256, 4 * size), made(4 * size)
    yield "gelu", partial(triton_gelu.gelu_forward, z, b, z)
    yield "gelu", partial(triton_gelu.gelu_backward, z, z, b, z)


def main(capability: int, weights: list[str]) -> int:
    triton.runtime.driver.set_active(NoGpu(capability))  # type: ignore[arg-type]
    torch.cuda.get_device_capability = lambda *_: divmod(capability, 10)  # type: ignore[assignment]
    torch.cuda.get_device_properties = lambda *_: SimpleNamespace(multi_processor_count=132)  # type: ignore[assignment]
    run = triton.JITFunction.run
    failed = 0

    def told(self: Any, *args: Any, **kwargs: Any) -> Any:
        made = run(self, *args, **kwargs)
        if made is not None:
            converts = len(re.findall(r"cvt[^;]*e4m3", made.asm["ptx"]))
            print(f"{self.fn.__name__} {weight} {converts} {made.metadata.shared}", flush=True)
        return made

    triton.JITFunction.run = told
    for weight in weights:
        for case in cases(weight):
            for one in tunables(case, META):
                try:
                    with tuning.compile_only():
                        one.call(one.default)
                except Exception as error:  # whatever the compiler says
                    failed += 1
                    print(f"{one.kernel} {one.key}: {type(error).__name__}: {error}"[:2000], file=sys.stderr)
    weight = "encoder"
    for name, call in encoder_passes():
        try:
            with tuning.compile_only():
                call()
        except Exception as error:
            failed += 1
            print(f"{name}: {type(error).__name__}: {error}"[:2000], file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
