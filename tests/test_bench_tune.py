"""``haste bench kernels --tune``: what is measured, kept and told, on a CPU with made-up times; and what is compiled ahead is what runs."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from haste_dist.errors import ConfigError
from haste_kernels import triton_head, triton_linear, triton_maxima, triton_tail, tuning
from haste_kernels.triton_tail import TailConfig
from haste_launch import bench, bench_tune, cli
from haste_launch.bench_case import BACKWARD, FORWARD, HEAD, LAYER, TAIL, TOPK, Case, Ceilings
from haste_launch.bench_measure import Times

CPU = torch.device("cpu")
TINY = "--labels 96 --batch 20 --width 32 --fan-in 16 --group 16 -k 5 --seconds 0.001"
SLOW, FAST, BROKEN = (TailConfig(32, rows_first, 4, stages) for rows_first, stages in ((True, 2), (True, 3), (False, 2)))


@pytest.fixture(autouse=True)
def _own_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("HASTE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(bench, "measure_ceilings", lambda *_: Ceilings(10.0, 0.1))
    tuning.forget()
    yield
    tuning.forget()


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> list[TailConfig]:
    """Three made-up tiles of the tail step beside the table's, of which one fails; those that were tried."""
    calls: list[TailConfig] = []

    def tail_step(*_: Any, config: TailConfig) -> None:
        calls.append(config)
        if config == BROKEN:
            raise RuntimeError("out of shared memory")

    def time_calls(call: Callable[[], Any], *_: Any) -> Times:
        call()
        ms = {SLOW: 3.0, FAST: 1.0}.get(calls[-1], 2.0) if calls else 2.0
        return Times(ms, ms, ms)

    monkeypatch.setattr(triton_tail, "tail_step", tail_step)
    monkeypatch.setattr(triton_tail, "CANDIDATES", (SLOW, BROKEN, FAST))
    monkeypatch.setattr(triton_head, "head_step", lambda *_, **__: None)
    monkeypatch.setattr(triton_head, "CANDIDATES", ())
    monkeypatch.setattr(bench_tune, "time_calls", time_calls)
    monkeypatch.setattr(bench_tune, "compile_ahead", lambda *_: None)
    return calls


def case(topic: str, dtype: str = "float32", labels: int = 96) -> Case:
    return Case(topic, labels, 20, 32, 16, 16, 5 if topic == TOPK else 0, dtype, dtype)


def stages(told: list[str]) -> bench_tune.Stages:
    def stage(name: str, count: int) -> Callable[[str], None]:
        told.append(name)
        return lambda note: None

    return stage


def test_the_fastest_is_kept_and_told(tried: list[TailConfig]) -> None:
    told: list[str] = []
    bench_tune.tune_cases([case(TAIL), case(TAIL, labels=960), case(LAYER)], CPU, 1.0, stages(told))
    default = triton_tail.default_config(16, 16, 20)
    assert tried == [default, SLOW, BROKEN, FAST], "once, though three cases share the choice"
    key = "G=16 F=16 N=32 float32 momentum=float32"
    assert tuning.chosen("tail_step", key, (SLOW, BROKEN, FAST)) == FAST
    (line,) = [line for line in told if line.startswith("tail_step")]
    assert line == (
        f"tail_step {key} (L=96 N=20 D=32 F=16 G=16): batch=32 rows_first=True warps=4 stages=3 ahead=0: 1 ms, the table's 2 ms; 3 of 4 ran"
    )
    assert str(tuning.path()) in told[-1]


def test_where_the_table_is_best_it_stays(tried: list[TailConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    bench_tune.tune_cases([case(TAIL)], CPU, 1.0, stages([]))
    monkeypatch.setattr(triton_tail, "CANDIDATES", (SLOW, BROKEN))
    bench_tune.tune_cases([case(TAIL)], CPU, 1.0, stages([]))
    assert tuning.chosen("tail_step", "G=16 F=16 N=32 float32 momentum=float32", (SLOW, BROKEN, FAST)) is None


def test_where_none_runs_that_is_told_and_the_rest_goes_on(tried: list[TailConfig], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ValueError("no such layout\nand more")

    monkeypatch.setattr(triton_tail, "tail_step", broken)
    told: list[str] = []
    bench_tune.tune_cases([case(TAIL), case(HEAD)], CPU, 1.0, stages(told))
    assert any("not tuned" in line and line.endswith("none of 4 tiles runs here: ValueError: no such layout") for line in told), told
    assert list(tuning.kept()) == [f"head_{part} D=32 N=32 float32 momentum=float32" for part in ("gradient", "update")]


def test_tuning_comes_before_the_gate_and_the_table(
    tried: list[TailConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "check_tunable", lambda: None)
    assert cli.main(["bench", "kernels", "--tune", "--what", "tail", *TINY.split()]) == 0
    out, err = capsys.readouterr()
    assert err.index("tuning: 4") < err.index("tail_step G=16") < err.index("gate: ") < err.index("measuring: ")
    assert "haste_dist" in out
    tried.clear()
    assert cli.main(["bench", "kernels", "--what", "tail", *TINY.split()]) == 0
    assert tried == [], "only --tune tunes"


def test_a_red_gate_gives_the_chosen_tiles_up(
    tried: list[TailConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tuning.remember("topk_tail", "from before", SLOW)
    monkeypatch.setattr(bench, "check_tunable", lambda: None)
    monkeypatch.setattr(bench, "run", red_gate)
    assert cli.main(["bench", "kernels", "--tune", "--what", "tail", *TINY.split()]) == 1
    assert "given up" in capsys.readouterr().err
    assert list(tuning.kept()) == ["topk_tail from before"]


def red_gate(*_: Any) -> Any:
    assert len(tuning.kept()) == 2, "a tile was chosen"
    raise bench.Wrong([])


def test_without_a_gpu_or_its_kernels_it_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", "kernels", "--tune", *TINY.split()]) == cli.USAGE_ERROR
    out, err = capsys.readouterr()
    assert (out, err) == ("", "haste: error: --tune: there is no GPU here to measure tiles on\n")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: torch.zeros(0))
    with pytest.raises(ConfigError, match="do not run here: plain torch is asked for"):
        bench_tune.check_tunable()


def test_a_folder_that_cannot_be_made_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = tuning.path()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    monkeypatch.setattr(bench_tune, "use_triton", lambda _: True)
    monkeypatch.setattr(tuning, "path", lambda: tmp_path / "file" / path.name)
    with pytest.raises(ConfigError, match=r"--tune: .*file: "):
        bench_tune.check_tunable()


@pytest.mark.parametrize(
    ("topic", "kernels"),
    [
        (TAIL, ["tail_step"]),
        (LAYER, ["head_gradient", "head_update", "tail_step"]),
        (HEAD, ["head_gradient", "head_update"]),
        (TOPK, ["topk_tail", "topk_head"]),
        (FORWARD, ["linear_forward"]),
        (BACKWARD, ["linear_grad_x", "linear_grad_weight"]),
    ],
)
def test_each_operation_has_its_kernels_and_each_runs(topic: str, kernels: list[str]) -> None:
    found = bench_tune.tunables(case(topic), CPU)
    assert [one.kernel for one in found] == kernels
    for one in found:
        assert one.choices[0] == one.default
        assert set(one.choices) == {one.default, *one.candidates}
        one.call(one.default)
    meta = bench_tune.tunables(case(topic, "bfloat16"), bench_tune.META)
    assert all(" bfloat16" in one.key for one in meta), "as on a GPU"


def test_the_keys_are_those_that_a_launch_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr(tuning, "chosen", lambda kernel, key, _: asked.append((kernel, key)))
    for topic in (TAIL, HEAD, TOPK, FORWARD, BACKWARD):
        found = bench_tune.tunables(case(topic), CPU)
        for one in found:
            asked.clear()
            one.call(None)
            assert (one.kernel, one.key) in asked
            assert set(asked) <= {(other.kernel, other.key) for other in found}


def test_compiling_counts_and_tells_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_tune, "compile_one", lambda case, number, config: "" if config != BROKEN else "Error: too large")
    told: list[str] = []
    bench_tune.compile_ahead([(case(TAIL), 0, config) for config in (SLOW, BROKEN, FAST)], stages(told), ThreadPoolExecutor(2))
    assert told == ["compiling", "compiling: 1 of 3 failed, the first with Error: too large"]


def test_processes_take_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cases and tiles reach them, and what goes wrong there comes back: here nothing can be compiled for."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    told: list[str] = []
    bench_tune.compile_ahead([(case(TAIL), 0, config) for config in (SLOW, FAST)], stages(told))
    assert len(told) == 2
    assert told[1].startswith("compiling: 2 of 2 failed, the first with ")


COMPILE = """
import json, sys, types
import torch
from pathlib import Path
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

class Target:
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_current_target(self): return GPUTarget("cuda", 90, 32)

driver.set_active(Target())
torch.cuda.get_device_capability = lambda device=None: (9, 0)
torch.cuda.get_device_properties = lambda device=None: types.SimpleNamespace(multi_processor_count=132)

from haste_kernels import tuning
from haste_launch import bench_tune
from haste_launch.bench_case import Case

def made():
    return sorted(str(path) for path in Path(sys.argv[1]).glob("*/*.cubin"))

counts = []
for n, rows in ((32, 96), (20, 1000)):
    for topic in ("tail_step", "topk", "linear_forward"):
        case = Case(topic, rows, n, 64, 16, 16, 5, "float32", "float32")
        there = bench_tune.tunables(case, bench_tune.META)
        errors = [bench_tune.compile_one(case, number, one.default) for number, one in enumerate(there)]
        before = made()
        with tuning.compile_only():
            for one in bench_tune.tunables(case, torch.device("cpu")):
                one.call(one.default)
        counts.append([errors, len(before), len(set(made()) - set(before))])
print(json.dumps(counts))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="Triton compiles on Linux")
def test_what_is_compiled_without_memory_is_what_tensors_need(tmp_path: Path) -> None:
    """For a GPU that is only named: after compiling on the meta device, real tensors of the same shape find all they need."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    words = [sys.executable, "-c", COMPILE, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    made = 0
    for errors, count, more in json.loads(done.stdout):
        assert not any(errors), errors
        assert count > made or count == made > 0
        assert more == 0
        made = count
    assert made >= 8


def test_tables_and_candidates_are_small_enough_to_measure() -> None:
    """A tile takes about 0.2 s to measure; a minute a kernel is the most that one waits."""
    lists = [triton_tail.CANDIDATES, triton_maxima.TAIL_CANDIDATES, triton_maxima.HEAD_CANDIDATES, *triton_linear.CONFIGS.values()]
    assert all(0 < len(set(one)) == len(one) < 100 for one in lists)
