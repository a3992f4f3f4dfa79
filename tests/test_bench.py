"""``haste bench kernels``: its words, the floor's arithmetic, a gate that a broken kernel does not pass, records and plots. On a CPU."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from haste_kernels import TailState
from haste_launch import bench, cli
from haste_launch.bench_case import LAYER, PROVIDER_NAMES, STEPS, TAIL, TOPICS_OF, Case, Ceilings
from haste_launch.bench_measure import GIB, Times, measure_ceilings, peak_gib, time_calls
from haste_launch.bench_plot import draw_topic, short
from haste_launch.bench_problem import make_parts, zipf_positives
from haste_launch.bench_providers import PROVIDERS
from haste_launch.bench_settings import Words, read_words, settle

CPU = torch.device("cpu")
TINY = "--labels 96 --batch 20 --width 32 --fan-in 8 --group 16 -k 5 --seconds 0.001"
ALL_TOPICS = [topic for topics in TOPICS_OF.values() for topic in topics]
Step = Callable[..., tuple[Tensor, Tensor | None]]


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(bench, "measure_ceilings", lambda *_: Ceilings(10.0, 0.1))


def words(line: str = "") -> Words:
    return read_words(cli.parse(["bench", "kernels", *line.split()]))


def run(line: str) -> int:
    return cli.main(["bench", "kernels", *line.split()])


def case(topic: str = TAIL, dtype: str = "float32", momentum: str = "", bias: bool = True, group: int = 16) -> Case:
    return Case(topic, 96, 20, 32, 8, group, 5, dtype, momentum or dtype, bias)


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for file in sorted(folder.glob("*.jsonl")) for line in file.read_text().splitlines()]


# Words


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("--what tails", "--what tails: one of tail, head, topk, layer, linear"),
        ("--labels many", "--labels many: whole numbers"),
        ("--batch 0", "--batch 0: at least 1"),
        ("--group 24", "--group 24: one of 16, 32, 64, 128"),
        ("--group 64 --labels 100", "--labels 100: at least two groups, 128 labels"),
        ("--fan-in 65 --width 64 --what tail", "--fan-in 65: more than the 64 features there are"),
        ("--fan-in 33 --width 64 --what layer", "(a layer's tail reads half of the width)"),
        ("--width 65 --what layer", "--width 65: a layer reads it in two halves"),
        ("-k 129", "-k 129: at most 128"),
        ("--sweep labels", "--sweep labels: reads name=value,value"),
        ("--sweep rank=1,2", "--sweep rank=1,2: reads name=value,value"),
        ("--sweep fan-in=", "names no value"),
        ("--providers authors", "--providers authors: one of haste_dist"),
        ("--plot out.pdf", "--plot out.pdf: a plot is written as .png"),
        ("--records NOFOLDER", "no folder that can be written to"),
        ("--dtype float16", "--dtype float16: one of bfloat16, float32"),
        ("--momentum yes", "--momentum yes: one of bfloat16, float32, float8, none"),
        ("--seconds long", "--seconds long: not a number"),
        ("--seconds -1", "--seconds -1: between 0 and 3600"),
        ("--seconds nan", "--seconds nan: between 0 and 3600"),
    ],
)
def test_wrong_words_are_told_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str, says: str) -> None:
    file = tmp_path / "file"
    file.touch()
    assert run(line.replace("NOFOLDER", str(file))) == cli.USAGE_ERROR
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("haste: error: ")
    assert err.count("\n") == 1
    assert says in err


def test_without_words_the_device_decides() -> None:
    on_gpu, on_cpu = settle(words(), cuda=True), settle(words(), cuda=False)
    tails = [one for one in on_gpu.cases if one.topic == TAIL]
    assert tails == [Case(TAIL, 655_360, 512, 768, 64, group, 0) for group in (16, 32, 64)]
    assert {one.topic for one in on_gpu.cases} == set(ALL_TOPICS)
    assert on_gpu.records == Path("benchmarks/records")
    assert on_cpu.records is None
    assert {(one.dtype, one.momentum) for one in on_cpu.cases} == {("float32", "float32")}
    assert max(one.labels for one in on_cpu.cases) < 10_000
    assert settle(words("--quick"), cuda=True).seconds < on_gpu.seconds
    assert settle(words("--records none"), cuda=True).records is None
    assert on_gpu.providers == list(PROVIDER_NAMES)


def test_lists_multiply_and_a_sweep_varies_one_number() -> None:
    line = "--what tail --labels 1000,2000 --group 16,32 --sweep batch=8,16 --sweep fan-in=4 --batch 32 --fan-in 8 --width 64"
    shapes = [one.shape("LNFG").values() for one in settle(words(line), cuda=False).cases]
    product = [(labels, 32, 8, group) for labels in (1000, 2000) for group in (16, 32)]
    assert [tuple(shape) for shape in shapes] == [*product, (1000, 8, 8, 16), (1000, 16, 8, 16), (1000, 32, 4, 16)]


def test_a_head_alone_has_a_tenth_of_the_labels() -> None:
    (head,) = settle(words("--what head --labels 1000 --group 16,32 --fan-in 4,8 -k 3"), cuda=False).cases[:1]
    assert head.labels == 112
    assert head.shape() == {"L": 112, "N": 64, "D": 128}


def test_a_plot_without_sweeps_varies_labels_batch_fan_in_and_group() -> None:
    cases = settle(words("--what layer --plot x.png --quick"), cuda=True).cases
    varied = {name: {getattr(one, name) for one in cases} for name in ("labels", "batch", "width", "fan_in", "group")}
    assert {name: len(values) for name, values in varied.items()} == {"labels": 5, "batch": 5, "width": 1, "fan_in": 5, "group": 4}
    assert len(settle(words("--what layer --plot x.png --group 16,32"), cuda=True).cases) == 2


# The floor


def test_the_floor_is_what_must_move_or_be_computed() -> None:
    tail = Case(TAIL, 655_360, 512, 768, 64, 16, 0)
    traffic = tail.traffic()
    weights = 655_360 * 64
    assert traffic.flops == 6 * weights * 512
    biases = 2 * 2 * 4 * 655_360  # a bias and its momentum, read and written
    x_dx = 512 * 768 * (2 + 4)
    assert traffic.bytes == 8 * weights + 2 * 40_960 * 64 + biases + x_dx
    assert traffic.held == 4 * weights + 2 * 40_960 * 64 + biases // 2 + x_dx
    floor = tail.floor(Ceilings(3000, 738))
    assert (round(floor.ms, 3), floor.bound) == (0.175, "flops")
    assert tail.floor(Ceilings(1000, 738)).bound == "bytes"
    assert tail.floor(Ceilings(1000, 738)).ms == pytest.approx(traffic.bytes / 1e12 * 1e3)


def test_a_layer_is_its_head_and_its_tail() -> None:
    layer = Case(LAYER, 1000, 8, 64, 4, 16, 0, "float32", "none", bias=False)
    (head, tail) = layer.parts
    assert (head.rows, head.start, head.stop) == (112, 0, 32)
    assert (tail.rows, tail.start, tail.stop) == (888, 32, 64)
    assert layer.traffic().flops == 6 * 8 * (112 * 32 + 888 * 4)
    weights = 112 * 32 + 888 * 4
    assert layer.traffic().bytes == 2 * 4 * weights + 2 * 56 * 4 + 8 * 64 * (4 + 4)


@pytest.mark.parametrize("topic", ALL_TOPICS)
def test_no_state_is_smaller_than_the_memory_floor(topic: str) -> None:
    one = case(topic)
    states = [part.state for part in make_parts(one, CPU)]
    least = sum(state.weight.nbytes for state in states)
    assert least < one.traffic().held
    assert one.traffic().held <= one.traffic().bytes or topic not in STEPS


# The problem


def test_positives_are_distinct_sorted_and_follow_a_zipf_law() -> None:
    positives = zipf_positives(1000, 4000, 0)
    pairs = positives.row * 4000 + positives.batch
    assert bool((pairs.diff() > 0).all())
    assert 0 <= int(positives.row.min()) <= int(positives.row.max()) < 1000
    assert 4 * 4000 < len(positives.row) <= 5 * 4000
    counts = torch.bincount(positives.row, minlength=1000).double()
    assert 0.85 < float(counts[31:100].sum() / counts[310:1000].sum()) < 1.1  # as many labels of each part, equal steps of the logarithm


def test_a_layer_shares_its_positives_out() -> None:
    whole = zipf_positives(96, 20, 0)
    head, tail = make_parts(case(LAYER), CPU)
    assert len(head.positives.row) + len(tail.positives.row) == len(whole.row)
    assert head.x_ND.shape == tail.x_ND.shape == (20, 16)
    assert (head.state.first_row, tail.state.first_row) == (0, 16)
    assert isinstance(tail.state, TailState)
    assert tail.state.first_group == 1


# A run


def test_a_run_prints_a_table_and_appends_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"{TINY} --group 16,32 --what tail,topk,layer,head --records {tmp_path}"
    assert run(line) == 0
    out, err = capsys.readouterr()
    found = records(tmp_path)
    assert f"{len(found)} records appended under" in out
    assert "left out" in err  # the authors' package
    assert {record["topic"] for record in found} == {"tail_step", "topk", "layer_step", "head_step"}
    for record in found:
        assert 0 < record["p20_ms"] <= record["p50_ms"] <= record["p80_ms"]
        assert record["peak_gib"] > 0
        assert record["dtype"] == "float32"
        assert record["gpus"] == 0
        assert ("momentum" in record) == (record["topic"] in STEPS)
    keys = [(record["topic"], record["provider"], *record["shape"].items()) for record in found]
    assert len(set(keys)) == len(keys), "each measured once"
    tails = {record["provider"]: record for record in found if record["topic"] == "tail_step" and record["shape"].get("G", 16) == 16}
    assert tails["haste_dist"]["shape"] == {"L": 96, "N": 20, "D": 32, "F": 8, "G": 16}
    assert tails["dense"]["shape"] == {"L": 96, "N": 20, "D": 32}
    assert tails["dense_width_f"]["shape"] == {"L": 96, "N": 20, "F": 8}
    assert tails["floor"]["bound"] in ("bytes", "flops")
    assert tails["floor"]["copy_gb_s"] == 10
    for word in ("tail_step", "haste_dist", "floor", "faster"):
        assert word in out
    assert run(line) == 0
    assert len(records(tmp_path)) == 2 * len(found), "appended, not replaced"


def test_what_does_not_fit_is_said_and_not_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    build = {**PROVIDERS["dense"].build}
    monkeypatch.setitem(PROVIDERS, "dense", dataclasses.replace(PROVIDERS["dense"], build={**build, TAIL: full}, unchecked=(TAIL,)))
    assert run(f"{TINY} --what tail --records {tmp_path} --providers haste_dist,dense,floor") == 0
    assert "out of memory" in " ".join(capsys.readouterr().out.split())
    assert {record["provider"] for record in records(tmp_path)} == {"haste_dist", "floor"}


def test_a_plot_shows_time_and_memory_with_the_floor(tmp_path: Path) -> None:
    file = tmp_path / "bench.png"
    assert run(f"{TINY} --what tail,topk --sweep labels=64,192 --sweep group=32 --plot {file} --records {tmp_path}") == 0
    for path in (file, tmp_path / "bench-topk.png"):
        data = path.read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        assert len(data) > 20_000


def test_what_is_drawn_is_what_was_measured() -> None:
    def row(labels: int, group: int, provider: str, ms: float) -> bench.Row:
        one = Case(TAIL, labels, 8, 64, 4, group, 0)
        return bench.Row(one, provider, one.shape(), {"p20_ms": ms, "p50_ms": ms, "p80_ms": ms, "peak_gib": ms / 1024})

    rows = [row(labels, 16, name, labels * ms) for labels in (1000, 4000, 2000) for name, ms in (("haste_dist", 0.01), ("floor", 0.001))]
    rows += [row(1000, 32, "haste_dist", 5.0), row(1000, 32, "floor", 1.0), row(4000, 32, "floor", 7.0)]
    rows.append(bench.Row(rows[0].case, "dense", {}, {}, "out of memory"))
    figure = draw_topic(rows, "title")
    assert len(figure.axes) == 4
    times, by_group, memory, _ = figure.axes
    drawn = {str(one.get_label()): one for one in times.get_lines()}
    assert set(drawn) == {"this project", "floor of this device"}
    assert np.asarray(drawn["this project"].get_xdata()).tolist() == [1000, 2000, 4000]
    assert np.asarray(drawn["this project"].get_ydata()).tolist() == [10, 20, 40]
    assert drawn["floor of this device"].get_linestyle() == "--"
    assert np.asarray(by_group.get_lines()[0].get_xdata()).tolist() == [16, 32]
    assert memory.get_ylabel() == "peak memory (MiB)"
    assert np.asarray(memory.get_lines()[0].get_ydata()).tolist() == [10, 20, 40]
    assert [short(value) for value in (512, 4096, 16_384, 655_360, 1_000_000, 2_812_288)] == ["512", "4096", "16.4k", "655k", "1M", "2.81M"]


# Measuring


def test_memory_is_the_most_that_lives_at_once() -> None:
    held = torch.zeros(1 << 18)  # 1 MiB

    def call() -> Tensor:
        for _ in range(3):
            made = held * 2
        more = torch.cat([made, made])
        return more.view(-1)[:5].clone()

    # What is held, what was made last, and the two of it in one.
    assert peak_gib(call, CPU, lambda: [held, held], 0) * GIB == pytest.approx((1 + 1 + 2) << 20, abs=1 << 10)


def test_times_are_quantiles() -> None:
    times = time_calls(lambda: sum(range(1000)), CPU, 0.01)
    assert 0 < times.p20_ms <= times.p50_ms <= times.p80_ms < 1000


def test_ceilings_are_rates() -> None:
    ceilings = measure_ceilings(CPU, torch.float32, 0.001)
    assert 0.1 < ceilings.copy_gb_s < 10_000
    assert 0.0001 < ceilings.gemm_tflop_s < 100


def test_calls_that_vary_are_pointed_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench, "time_calls", lambda *_: Times(1.0, 1.2, 2.0))
    assert run(f"{TINY} --what head") == 0
    assert "2 of 3 vary by half" in capsys.readouterr().out
