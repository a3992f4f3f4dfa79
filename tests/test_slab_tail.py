"""The tail's step from slabs in shared memory: how it is cut, what is taken, and that it compiles. Its results need a GPU."""

import ctypes
import shutil
import subprocess
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from haste_kernels import StepArgs, TailState, nvrtc, slabs

slab_tail = pytest.importorskip("haste_kernels.slab_tail")
FILES = [Path(slab_tail.__file__).with_name(name) for name in slab_tail.FILES]
SHARED = 226 << 10  # of an H100
ARGS = StepArgs(lr=0.1, scale=1.0, deterministic=True)


def inputs(n: int = 300, groups: int = 40) -> tuple[torch.Tensor, TailState]:
    weight = torch.zeros(groups, 16, 64, dtype=torch.bfloat16)
    tail = TailState(weight, torch.zeros(groups, 64, dtype=torch.int16), None, None, None, 0, groups * 16, 0)
    return torch.zeros(n, 384, dtype=torch.bfloat16), tail


@pytest.fixture
def new_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as what is taken goes."""
    monkeypatch.setattr(slab_tail, "takes_gpu", lambda x: True)
    monkeypatch.setattr(slab_tail, "limits", lambda index: ((9, 0), 132, SHARED))
    monkeypatch.setattr(slabs, "_refused", set())


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
    assert not slab_tail.serves(*inputs(), ARGS)


@pytest.mark.usefixtures("new_gpu")
def test_nothing_to_do_is_left_to_the_other_kernels() -> None:
    assert slab_tail.takes(*inputs(), ARGS)
    assert not slab_tail.takes(*inputs(n=0), ARGS)
    assert not slab_tail.takes(*inputs(groups=0), ARGS)


@pytest.mark.usefixtures("new_gpu")
def test_both_kernels_of_a_shape_are_made_before_it_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the loss and without: a step that is logged must not find out that it has none."""
    made = []
    monkeypatch.setattr(slabs, "_kernel", lambda index, files, name: made.append((files, name)))
    assert slab_tail.serves(*inputs(), ARGS)
    kind = "slab_tail_step<384, 3, 4, false, false"
    assert made == [(slab_tail.FILES, f"{kind}, false>"), (slab_tail.FILES, f"{kind}, true>")]
    assert not slab_tail.serves(*inputs(), StepArgs(lr=0.1, scale=1.0))  # too small to pay
    assert len(made) == 2


@pytest.mark.usefixtures("new_gpu")
def test_a_kernel_that_does_not_compile_is_said_once_and_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def fails(index: int, files: tuple[str, ...], name: str) -> None:
        tried.append(name)
        if name.endswith("true>"):
            raise RuntimeError("ptxas: no setmaxnreg")

    monkeypatch.setattr(slabs, "_kernel", fails)
    with pytest.warns(UserWarning, match=r"slab_tail\.cu.*no setmaxnreg"):
        assert not slab_tail.serves(*inputs(), ARGS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not slab_tail.serves(*inputs(), ARGS)
        assert not slab_tail.serves(*inputs(n=100), ARGS)
    assert len(tried) == 2


def test_words_reach_a_kernel_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps from 2^31 on, and words of seeds, as the kernel casts them back."""
    values, seen = [0, 5, 2**31 + 5, 2**32 - 1, *slab_tail._words(2**64 - 2), -7], []

    def launch(*where: object) -> int:
        seen.extend(ctypes.cast(pointer, ctypes.POINTER(ctypes.c_uint32)).contents.value for pointer in where[-1])
        return 0

    monkeypatch.setattr(torch.cuda._utils, "_get_gpu_runtime_library", lambda: SimpleNamespace(cuLaunchCooperativeKernel=launch))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(_as_parameter_=None))
    nvrtc.launch(SimpleNamespace(func=None), 1, 32, values, 0, at_once=True)
    assert seen == [value & 0xFFFFFFFF for value in values]


@pytest.mark.parametrize("value", [0.0, 0.1, -3e-7, 1e30])
def test_numbers_are_passed_as_float32(value: float) -> None:
    assert torch.tensor(slab_tail._bits(value), dtype=torch.int32).view(torch.float32).item() == torch.tensor(value).item()


@pytest.mark.parametrize("value", [0, 5, 2**31, 2**40 + 3, 2**64 - 1])
def test_long_numbers_are_passed_as_two_words(value: int) -> None:
    low, high = slab_tail._words(value)
    assert 0 <= low < 2**32
    assert high << 32 | low == value


# The slabs have each unit of a pair of groups once in all, none of them none, and none two more than another over all pairs.
TAKEN_ONCE = """
constexpr bool taken_once(int s) {
  int most = 0, least = 1 << 30;
  for (int pair = 0; pair < WARPS / 2; pair++) {
    int times[8] = {};
    for (int slab = 0; slab < s; slab++) {
      if (first_unit(s, slab, pair) < 0 || first_unit(s, slab, pair) >= s) return false;
      for (int u = first_unit(s, slab, pair); u < 8; u += s) times[u]++;
    }
    for (int u = 0; u < 8; u++)
      if (times[u] != 1) return false;
  }
  for (int slab = 0; slab < s; slab++) {
    int count = 0;
    for (int pair = 0; pair < WARPS / 2; pair++)
      for (int u = first_unit(s, slab, pair); u < 8; u += s) count++;
    most = count > most ? count : most, least = count < least ? count : least;
  }
  return most <= least + 1;
}
"""


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc, a part of the CUDA toolkit, is not on the PATH")
def test_the_kernel_compiles_and_has_the_launcher_s_numbers(tmp_path: Path) -> None:
    lines = [f'#include "{file}"' for file in FILES]
    for name in ("WARPS", "UPDATERS", "RING", "STAGE", "EYES"):
        lines.append(f"static_assert({name} == {getattr(slab_tail, name)});")
    lines.append(f"static_assert(G == {slab_tail.SIZE} && F == {slab_tail.FAN_IN} && UP == {slab_tail.UP});")
    lines.append(TAKEN_ONCE)
    for count in range(1, slab_tail.MOST_SLABS + 1):
        words = slab_tail.Cut(2, count, 3).words
        lines.append(f"static_assert(3 * WARPS * record_words({count}) == {words} && taken_once({count}));")
    # Rounds k and k + 2 of a pair of groups are the same updating warp's, and so are a slot's, which keeps the order (slab_update.cuh).
    lines.append("static_assert(2 * (WARPS / 2) % UPDATERS == 0 && RING % 2 == 0);")
    states = "const unsigned short*, unsigned short*, unsigned short*, const short*, float*, float*, float*, double*, u64*"
    for kind in ("768, 8, 2, true, false, false", "384, 4, 4, false, true, true", "100, 3, 4, true, true, false"):
        numbers = ", ".join(["const i64*", "const int*"] + ["int"] * 14)
        lines.append(f"template __global__ void slab_tail_step<{kind}>({states}, {numbers});")
    (tmp_path / "all.cu").write_text("\n".join(lines))
    command = ["nvcc", "-arch=sm_90a", "-std=c++17", "-cubin", "-o", str(tmp_path / "all.cubin"), str(tmp_path / "all.cu")]
    made = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert made.returncode == 0, made.stderr[-2000:]
