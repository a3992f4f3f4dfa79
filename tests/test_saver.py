"""Checkpoints written behind the steps: what is saved, what a failure leaves, what stays, and that nothing grows."""

import contextlib
import copy
import io
import json
import math
import os
import shutil
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_checkpoint import classifier
from tiny import FULL, make_prepared, read_losses, run_ranks

from haste_dist import checkpoint, saver
from haste_dist.checkpoint import RunState
from haste_dist.config import CheckpointConfig, Config
from haste_dist.errors import CheckpointError, HasteError
from haste_dist.runlog import read_events
from haste_dist.saver import Saver, _find_not_finite, retained
from haste_dist.tensor_file import write_tensors
from haste_dist.train import train
from haste_dist.world import World, join_world
from haste_launch import cli


class NoEncoder:
    """Stands for an engine where only label rows matter."""

    def state(self) -> tuple[dict, dict]:
        return {"w": torch.ones(3)}, {}


def test_files_are_what_safetensors_writes(tmp_path: Path) -> None:
    kinds = [torch.float32, torch.bfloat16, torch.int16, torch.int64, torch.uint8, torch.float8_e4m3fn]
    tensors = {f"t{i}": torch.arange(3 * i).reshape(i, 3).to(kind) for i, kind in enumerate(kinds)} | {"scalar": torch.tensor(2.5)}
    record = write_tensors(tmp_path / "ours", tensors, {"a": "1"})
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in load_file(tmp_path / "ours").items())
    save_file(tensors, tmp_path / "theirs", metadata={"a": "1"})
    assert (tmp_path / "ours").stat().st_size == record.bytes
    assert abs(record.bytes - (tmp_path / "theirs").stat().st_size) < 64


def test_the_step_goes_on_while_the_copy_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The write is held back; steps change the weights meanwhile; what is saved is the state at the save."""
    go, layer = threading.Event(), classifier(1, 0, 1)
    real = saver.write_tensors
    monkeypatch.setattr(saver, "write_tensors", lambda *words: go.wait(10) and real(*words))
    before = {name: tensor.clone() for name, (tensor, _) in layer.tensors().items()}
    told: list = []
    with Saver(tmp_path, CheckpointConfig(), join_world("cpu"), "order", told.append) as one:
        one.save(RunState(5), NoEncoder(), layer)  # type: ignore[arg-type]
        for tensor, _ in layer.tensors().values():
            tensor += 1
        assert not one.failed()
        assert not list(tmp_path.glob("step-*"))
        assert not told
        go.set()
        one.wait()
        assert [done.step for done in told] == [5]
    loaded = classifier(1, 0, 2)
    assert checkpoint.load(tmp_path / "step-00000005", None, loaded, "order").step == 5
    assert all(torch.equal(tensor, before[name]) for name, (tensor, _) in loaded.tensors().items())
    total = sum(path.stat().st_size for path in (tmp_path / "step-00000005").glob("*.safetensors"))
    assert told[0].bytes == total


def full_disk(monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    """The disk is full where the file of this name is written, at the second save and on."""
    real, seen = saver.write_tensors, []

    def write(path: Path, *words: object) -> object:
        seen.append(path.name)
        if path.name == at and seen.count(at) >= 2:
            raise OSError(28, "No space left on device")
        return real(path, *words)  # type: ignore[arg-type]

    monkeypatch.setattr(saver, "write_tensors", write)


def test_a_full_disk_stops_the_run_and_leaves_the_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_prepared(tmp_path, overrides=["train.checkpoint_every=5", "train.max_steps=30", "train.evaluate_every=0"])
    full_disk(monkeypatch, "output-00000-of-00001.safetensors")
    with pytest.raises(CheckpointError, match=r"step-00000010: No space left on device") as caught:
        train(config, join_world("cpu"))
    assert "\n" not in str(caught.value)
    folder = Path(config.run.folder) / "checkpoints"
    assert [p.name for p in folder.glob("*step*")] + [p.name for p in folder.glob(".partial*")] == ["step-00000005"]
    assert read_events(config.run.folder)[-1]["step"] < 15  # not only at the next save
    monkeypatch.undo()
    assert train(config, join_world("cpu")).step == 30


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_stops_the_run_in_one_line(tmp_path: Path) -> None:
    config = make_prepared(tmp_path, overrides=["train.checkpoint_every=5", "train.max_steps=8"])
    folder = Path(config.run.folder) / "checkpoints"
    folder.mkdir(parents=True)
    folder.chmod(0o500)
    with pytest.raises(CheckpointError, match="Permission denied"):
        train(config, join_world("cpu"))


def test_a_folder_that_cannot_be_made_stops_the_run_in_one_line(tmp_path: Path) -> None:
    config = make_prepared(tmp_path, overrides=["train.max_steps=4"])
    (Path(config.run.folder)).mkdir()
    (Path(config.run.folder) / "checkpoints").write_text("a file is in the way")
    with pytest.raises(CheckpointError, match=r"could not save a checkpoint: .*; mend that") as caught:
        train(config, join_world("cpu"))
    assert "\n" not in str(caught.value)


def fail_on_one_rank(world: World, folder: Path) -> None:
    """Rank 1 cannot write its second checkpoint: both ranks say so, and the first checkpoint is whole."""
    layer = classifier(world.size, world.rank, 1)
    with pytest.MonkeyPatch.context() as patch:
        if world.rank == 1:
            full_disk(patch, "output-00001-of-00002.safetensors")
        one = Saver(folder, CheckpointConfig(), world, "order")
        one.save(RunState(1), NoEncoder(), layer)  # type: ignore[arg-type]
        one.save(RunState(2), NoEncoder(), layer)  # type: ignore[arg-type]
        torch.distributed.barrier(group=world.control)  # the training thread's messages do not meet the saver's
        with pytest.raises(CheckpointError, match="step-00000002: No space left"):
            one.wait()
    assert [p.name for p in folder.glob("*step*")] == ["step-00000001"]
    one.save(RunState(3), NoEncoder(), layer)  # type: ignore[arg-type]
    one.wait()
    assert checkpoint.load(checkpoint.newest(folder), None, layer, "order").step == 3  # type: ignore[arg-type]


def load_with_one_damaged(world: World, folder: Path) -> None:
    from haste_dist.agreement import same_error

    with pytest.raises(HasteError, match=r"output-00001-of-00002.safetensors: damaged"), same_error(world):
        checkpoint.load(checkpoint.newest(folder), None, classifier(world.size, world.rank, 2), "order")  # type: ignore[arg-type]


def test_ranks_fail_together(tmp_path: Path) -> None:
    run_ranks(2, fail_on_one_rank, tmp_path)
    path = tmp_path / "step-00000003" / "output-00001-of-00002.safetensors"
    data = bytearray(path.read_bytes())
    data[-9] ^= 4
    path.write_bytes(data)
    run_ranks(2, load_with_one_damaged, tmp_path)


@given(
    st.sets(st.integers(0, 300), min_size=1, max_size=40),
    st.integers(0, 300),
    st.integers(1, 5),
    st.sampled_from([0, 1, 7, 50]),
)
def test_retention(steps: set[int], best: int, keep: int, every: int) -> None:
    kept = retained(steps, best, CheckpointConfig(keep, every))
    assert kept <= steps
    assert max(steps) in kept
    for step in steps:
        newer = sum(other > step for other in steps)
        assert (step in kept) == (newer < keep or step == best or (every > 0 and step % every == 0))


def test_old_checkpoints_and_leftovers_go(tmp_path: Path) -> None:
    (tmp_path / "step-00000002").mkdir()  # without a page: not complete
    (tmp_path / ".partial-00000001").mkdir()
    (tmp_path / "step-notes").mkdir()  # not ours
    layer = classifier(1, 0, 1)
    with Saver(tmp_path, CheckpointConfig(keep=2, keep_every=30), join_world("cpu"), "order") as one:
        for step in (10, 20, 30, 40, 50, 60, 60):
            one.save(RunState(step, 0.5, 20), NoEncoder(), layer)  # type: ignore[arg-type]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "best.json",
        "last.json",
        "step-00000020",
        "step-00000030",
        "step-00000050",
        "step-00000060",
        "step-notes",
    ]
    assert checkpoint.pointed(tmp_path, "best").name == "step-00000020"


def handles_and_memory() -> tuple[int, int, int]:
    """Open files, threads, resident bytes of this process."""
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return len(os.listdir("/proc/self/fd")), threading.active_count(), resident


def test_memory_and_handles_stay_flat(tmp_path: Path) -> None:
    """A checkpoint every 20 steps: 2,000 of them in the long form."""
    steps = 2000 if FULL else 200
    config = make_prepared(tmp_path, overrides=["train.checkpoint_every=20", f"train.max_steps={steps}", "train.epochs=200"])
    config.train.evaluate_every = 0
    run_ranks(1, stays_flat, config, steps)  # in a process of its own: what earlier tests left open comes and goes


def stays_flat(world: World, config: Config, steps: int) -> None:
    seen: list[tuple[int, int, int]] = []

    def look() -> bool:
        time.sleep(0.01)  # steps this small would leave a save no time to end before the next on a crowded machine
        seen.append(handles_and_memory())
        return False

    assert train(config, world, look).step == steps
    halves = seen[steps // 4 : steps // 2], seen[-steps // 4 :]
    files, threads = ([min(one[i] for one in part) for part in halves] for i in range(2))  # as they are while no save is being written
    memory = [sorted(one[2] for one in part)[len(part) // 2] for part in halves]
    print(f"open files {files}, threads {threads}, MiB {[m / 2**20 for m in memory]}")
    assert files[0] == files[1]
    assert threads[0] == threads[1]
    assert memory[1] - memory[0] < 4 * 2**20


def train_some(world: World, configs: list[Config]) -> None:
    for config in configs:
        train(config, world)


@pytest.mark.slow
def test_a_run_saved_on_four_ranks_goes_on_on_any_number(tmp_path: Path) -> None:
    """Saved by 4 ranks after 13 of 20 steps, ZeRO 1, rewirings before and after; the others go on as one that never stopped."""
    words = ["train.epochs=2", "encoder.zero=1", "output.tail_dropout=0.2", "train.batch_size=24", "rewire.until=1"]
    config = make_prepared(tmp_path, labels=203, texts=240, overrides=words)
    unbroken, stopped = copy.deepcopy(config), copy.deepcopy(config)
    unbroken.run.folder += "-unbroken"
    stopped.train.max_steps = 13
    train(unbroken, join_world("cpu"))
    run_ranks(4, train_some, [stopped])
    expected = read_losses(unbroken.run.folder)
    np.testing.assert_allclose(read_losses(stopped.run.folder), expected[:13], rtol=1e-5)
    for ranks in (1, 2, 3, 4, 8) if FULL else (1,):
        one = copy.deepcopy(config)
        one.run.folder += f"-{ranks}"
        saved = Path(one.run.folder) / "checkpoints"
        shutil.copytree(Path(stopped.run.folder) / "checkpoints", saved)
        if ranks == 1:
            train(one, join_world("cpu"))
        else:
            run_ranks(ranks, train_some, [one])
        assert [e["step"] for e in read_events(one.run.folder) if e["event"] == "start"] == [13]
        np.testing.assert_allclose(read_losses(one.run.folder), expected[13:], rtol=1e-5)
        assert (saved / f"step-00000020/output-00000-of-0000{ranks}.safetensors").is_file()


def bench(_world: World, words: list[str]) -> None:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert cli.main(["bench", "checkpoint", *words]) == 0
    assert "stall_s" in said.getvalue()


def test_the_bench_measures_and_removes_what_it_wrote(tmp_path: Path) -> None:
    words = ["--labels", "1000", "--fan-in", "8", "--group", "16", "--device", "cpu"]
    words += ["--out", str(tmp_path / "disk"), "--records", str(tmp_path / "records")]
    run_ranks(1, bench, words)  # a process of its own: it leaves its process group
    record = json.loads((tmp_path / "records" / "checkpoint.jsonl").read_text())
    assert record["bytes"] > 1008 * 8 * 4 * 2
    assert not list((tmp_path / "disk").iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("at", [0, 5, 11])
def test_a_tensor_with_one_bad_number_is_named(dtype: torch.dtype, at: int) -> None:
    sound, bad = torch.tensor([448.0, -448.0, 0.0, 2.0**-9] * 3).to(dtype), torch.ones(12)
    assert _find_not_finite({"a": sound, "b": torch.arange(3)}) == ""
    for sign in (1.0, -1.0):
        bad[at] = math.copysign(math.nan, sign)
        assert _find_not_finite({"a": sound, "b": bad.to(dtype)}) == "b"


def test_the_next_save_mends_what_a_kill_between_the_pointers_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after last.json names a better checkpoint, before best.json does: the one that it still names is pruned later."""
    layer, config = classifier(1, 0, 1), CheckpointConfig(keep=1)
    with Saver(tmp_path, config, join_world("cpu"), "order") as one:
        one.save(RunState(10, best_step=10), NoEncoder(), layer)  # type: ignore[arg-type]
    real = saver.point
    with monkeypatch.context() as patch:
        patch.setattr(saver, "point", lambda folder, name, step: real(folder, name, step) if name == "last" else sys.exit("killed"))
        killed = Saver(tmp_path, config, join_world("cpu"), "order")
        killed.save(RunState(20, best_step=20), NoEncoder(), layer)  # type: ignore[arg-type]
        with pytest.raises(SystemExit):
            killed.wait()
    assert checkpoint.pointed(tmp_path, "best").name == "step-00000010"
    with Saver(tmp_path, config, join_world("cpu"), "order") as one:
        one.save(RunState(30, best_step=20), NoEncoder(), layer)  # type: ignore[arg-type]
    assert [checkpoint.pointed(tmp_path, name).name for name in ("last", "best")] == ["step-00000030", "step-00000020"]
    assert [path.name for path in checkpoint.complete(tmp_path)] == ["step-00000020", "step-00000030"]
