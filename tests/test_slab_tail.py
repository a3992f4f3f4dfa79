"""The tail's step from slabs in shared memory: how it is cut, what is taken, and that it compiles. Its results need a GPU."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from haste_kernels import StepArgs, TailState

slab_tail = pytest.importorskip("haste_kernels.slab_tail")
FILES = [Path(slab_tail.__file__).with_name(name) for name in slab_tail.FILES]
SHARED = 226 << 10  # of an H100


@given(st.integers(1, 3000), st.integers(1, 2000), st.integers(1, 200))
def test_a_cut_holds_all_rows_at_once(n: int, width: int, processors: int) -> None:
    cut = slab_tail.cut(n, width, processors, SHARED)
    holds = {p: slab_tail._bytes(width, p) <= SHARED and n <= slab_tail.PART * p * min(slab_tail.MOST_SLABS, processors) for p in (4, 2)}
    assert (cut is not None) == any(holds.values())
    if cut is not None:
        assert holds[cut.parts]
        assert n <= cut.rows < n + slab_tail.PART * cut.parts
        assert 1 <= cut.slabs <= slab_tail.MOST_SLABS
        assert cut.slabs * cut.ranges <= processors < cut.slabs * (cut.ranges + 1)  # programs wait for each other
        assert cut.parts == 4 or not holds[4] or n <= 64


def test_two_shapes_are_cut_as_measured() -> None:
    assert slab_tail.cut(512, 768, 132, SHARED) == slab_tail.Cut(parts=2, slabs=8, ranges=16)
    assert slab_tail.cut(512, 384, 132, SHARED) == slab_tail.Cut(parts=4, slabs=4, ranges=33)


def test_a_cpu_takes_the_other_kernels() -> None:
    weight = torch.zeros(20_000, 16, 64, dtype=torch.bfloat16)
    tail = TailState(weight, torch.zeros(20_000, 64, dtype=torch.int16), None, None, None, 0, 320_000, 0)
    args = StepArgs(lr=0.1, scale=1.0, deterministic=True)
    assert not slab_tail.serves(torch.zeros(512, 768, dtype=torch.bfloat16), tail, args)


@pytest.mark.parametrize("value", [0.0, 0.1, -3e-7, 1e30])
def test_numbers_are_passed_as_float32(value: float) -> None:
    assert torch.tensor(slab_tail._bits(value), dtype=torch.int32).view(torch.float32).item() == torch.tensor(value).item()


@pytest.mark.parametrize("value", [0, 5, 2**31, 2**40 + 3, 2**64 - 1])
def test_long_numbers_are_passed_as_two_words(value: int) -> None:
    low, high = slab_tail._words(value)
    assert 0 <= low < 2**32
    assert high << 32 | low == value


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc, a part of the CUDA toolkit, is not on the PATH")
def test_the_kernel_compiles_and_has_the_launcher_s_numbers(tmp_path: Path) -> None:
    lines = [f'#include "{file}"' for file in FILES]
    for name in ("WARPS", "UPDATERS", "RING", "STAGE"):
        lines.append(f"static_assert({name} == {getattr(slab_tail, name)});")
    lines.append(f"static_assert(G == {slab_tail.SIZE} && F == {slab_tail.FAN_IN} && UP == {slab_tail.UP});")
    for slabs in range(1, slab_tail.MOST_SLABS + 1):
        words = slab_tail.ring_words(slab_tail.Cut(2, slabs, 3))
        lines.append(f"static_assert(3 * WARPS * record_words({slabs}) == {words});")
    states = "const unsigned short*, unsigned short*, unsigned short*, const short*, float*, float*, float*, u64*"
    for kind in ("768, 8, 2, true, false, false", "384, 4, 4, false, true, true", "100, 3, 4, true, true, false"):
        numbers = ", ".join(["const i64*"] * 3 + ["float*"] + ["int"] * 14)
        lines.append(f"template __global__ void slab_tail_step<{kind}>({states}, {numbers});")
    (tmp_path / "all.cu").write_text("\n".join(lines))
    command = ["nvcc", "-arch=sm_90a", "-std=c++17", "-cubin", "-o", str(tmp_path / "all.cubin"), str(tmp_path / "all.cu")]
    made = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert made.returncode == 0, made.stderr[-2000:]
