"""The trace of a few steps: its page adds up, kernels belong to the stage that launched them, and a run leaves both in its folder."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import make_prepared, run_ranks

from haste_dist import meters
from haste_dist.config import Config
from haste_dist.meters import STAGES
from haste_dist.profiling import WARM_STEPS, page, read_trace, summarize
from haste_dist.runlog import read_events
from haste_dist.train import train
from haste_dist.world import World


def event(cat: str, name: str, ts: float, dur: float, **more: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": 1, **more}


def gpu_trace() -> list[dict[str, Any]]:
    """One step of 1,000 us: forward launches a kernel that runs while the tail is launched; the optimizer waits."""
    made = [event("user_annotation", name, ts, dur) for name, ts, dur in (("data", 0, 100), ("forward", 100, 200), ("tail", 300, 100))]
    made += [event("user_annotation", "optimizer", 700, 300), event("user_annotation", "ProfilerStep#1", 0, 1000)]
    made += [event("cuda_runtime", "cudaLaunchKernel", 150, 5, args={"correlation": 1})]
    made += [event("cuda_runtime", "cudaLaunchKernel", 350, 5, args={"correlation": 2}, tid=2)]
    made += [event("kernel", "gemm", 200, 300, args={"correlation": 1}), event("kernel", "tail", 400, 200, args={"correlation": 2})]
    made += [event("cuda_runtime", "cudaStreamSynchronize", 750, 50, args={"correlation": 3})]
    return made


def test_kernels_belong_to_the_stage_that_launched_them() -> None:
    found = summarize(gpu_trace(), 1)
    assert found.step_ms == 1.0
    assert {s.name: (s.host_ms, s.device_ms, s.waited_ms) for s in found.stages} == {
        "data": (0.1, 0, 0),
        "forward": (0.2, 0.3, 0),
        "tail": (0.1, 0.2, 0),
        "optimizer": (0.3, 0, 0.05),
        "other": (pytest.approx(0.3), 0, 0),
    }
    assert found.busy_ms == 0.4  # 200 to 600, of which 100 twice
    assert found.waits == {"optimizer": 1}
    assert [name for name, _, _ in found.largest] == ["gemm", "tail"]
    text = page(found, 1, "rank-0.json.gz")
    assert "device busy 0.40 ms, idle 0.60 ms (60.0%)" in text


def test_operations_of_a_cpu_count_without_what_they_call() -> None:
    ops = [event("cpu_op", "linear", 0, 100), event("cpu_op", "mm", 10, 60), event("cpu_op", "add", 80, 10), event("cpu_op", "mm", 200, 40)]
    found = summarize([event("user_annotation", "forward", 0, 250), *ops], 2)
    assert found.busy_ms == 0
    assert {name: (round(ms, 6), calls) for name, ms, calls in found.largest} == {"mm": (0.05, 1), "linear": (0.015, 0), "add": (0.005, 0)}
    assert "device" not in page(found, 2, "t")


def test_an_empty_trace_says_so_little() -> None:
    assert summarize([], 1).step_ms == 0


def profiled(world: World, config: Config) -> None:
    train(config, world)
    assert meters._watchers == []


def test_a_run_leaves_a_trace_a_rank_and_one_page(tmp_path: Path) -> None:
    config = make_prepared(tmp_path, overrides=[f"train.max_steps={WARM_STEPS + 6}", "train.profile=3", "train.evaluate_every=0"])
    run_ranks(2, profiled, config)
    folder = Path(config.run.folder) / "profile"
    assert {path.name for path in folder.iterdir()} == {"rank-0.json.gz", "rank-1.json.gz", "summary.txt"}
    names = [e["name"] for e in read_trace(folder / "rank-1.json.gz") if e.get("cat") == "user_annotation"]
    assert {name: names.count(name) for name in ("forward", "tail", "scatter", "backward", "optimizer")} == dict.fromkeys(
        ("forward", "tail", "scatter", "backward", "optimizer"), 3
    )
    text = (folder / "summary.txt").read_text()
    assert all(f"\n{name} " in text for name in ("data", *STAGES))
    (told,) = [e for e in read_events(config.run.folder) if e["event"] == "profile"]
    assert told["step"] == WARM_STEPS + 3
    shares = sum(value for name, value in told.items() if name.endswith("_ms") and name != "step_ms")
    assert shares == pytest.approx(told["step_ms"], rel=0.05)


def test_a_short_run_and_one_without_profile_leave_nothing(tmp_path: Path) -> None:
    from haste_dist.world import join_world

    config = make_prepared(tmp_path, overrides=["train.max_steps=3", "train.profile=3"])
    train(config, join_world("cpu"))
    assert not (Path(config.run.folder) / "profile").exists()
    assert json.loads((Path(config.run.folder) / "metrics.jsonl").read_text().splitlines()[-1])["event"] == "end"
