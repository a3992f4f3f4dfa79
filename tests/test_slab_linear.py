"""Slabs in shared memory: how much fits, what is taken; the kernels compile, where NVIDIA's compiler is. Their results need a GPU."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

slab_linear = pytest.importorskip("haste_kernels.slab_linear")
FILES = [Path(slab_linear.__file__).with_name(name) for name in ("slab.cuh", "slab_linear.cu")]
ARGUMENTS = {"forward": "const float*, half*", "grad_x": "float*"}


SHARED = 226 << 10  # of an H100


@given(st.sampled_from(["forward", "grad_x"]), st.integers(1, 20_000), st.integers(1, 8192))
def test_a_slab_is_the_largest_that_fits_and_has_rows(op: str, n: int, width: int) -> None:
    one, parts = width * slab_linear.PART * slab_linear.BYTES[op], slab_linear.parts(op, n, width, SHARED)
    assert parts * one <= SHARED
    assert (parts == 0) == (one > SHARED)
    if parts:
        assert slab_linear.PART * parts < 2 * max(n, slab_linear.PART)
        larger = [p for p in slab_linear.PARTS[op] if p > parts]
        assert all(p * one > SHARED or slab_linear.PART * p // 2 >= n for p in larger)


def test_a_cpu_takes_the_other_kernels() -> None:
    x, weight = torch.zeros(512, 768, dtype=torch.bfloat16), torch.zeros(20_000, 16, 64, dtype=torch.bfloat16)
    assert not slab_linear.takes("forward", x, weight, 768)
    assert not slab_linear.serves("grad_x", x, weight, 768)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc, a part of the CUDA toolkit, is not on the PATH")
def test_kernels_compile(tmp_path: Path) -> None:
    lines = [*(f'#include "{file}"' for file in FILES), "typedef unsigned short half;"]
    for op, more in ARGUMENTS.items():
        for values, fan_in, size, parts, even in (("half", 64, 16, 2, "true"), ("float", 128, 48, 1, "false"), ("half", 16, 64, 2, "true")):
            of = f"true, {values}, 384, {fan_in}, {size}, {parts}, {8 if op == 'forward' and size % 32 == 0 else 12}, {even}"
            lines.append(
                f"template __global__ void slab_{op}<{of}>(const half*, const {values}*, const short*, {more}, {', '.join(['int'] * 5)});"
            )
    (tmp_path / "all.cu").write_text("\n".join(lines))
    command = ["nvcc", "-arch=sm_90", "-std=c++17", "-cubin", "-o", str(tmp_path / "all.cubin"), str(tmp_path / "all.cu")]
    made = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert made.returncode == 0, made.stderr[-2000:]
