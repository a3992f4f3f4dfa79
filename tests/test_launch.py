"""Starting ranks: Ray and torchrun run the same loop, Ctrl-C saves and leaves nobody behind, a rank's error is one line."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from ray_nodes import SECONDS, alive_with, wait_for
from tiny import FULL, make_prepared, read_losses

from haste_dist.config import Config, save_config
from haste_dist.errors import ConfigError, DataError, HasteError, OutOfMemory
from haste_dist.runlog import read_events
from haste_launch import cli
from haste_launch.ray_session import ray_session
from haste_launch.ray_train import (
    ECHO_SECONDS,
    absolute_paths,
    check_memory,
    config_from_dict,
    count_ranks,
    stop_reader,
    stop_signals,
    user_error,
)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    config = make_prepared(tmp_path, overrides=["launch.ranks=2", "train.max_steps=12"])
    save_config(config, tmp_path / "c.yaml")
    return config


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.skipif(not FULL, reason="set HASTE_FULL=1"))]
)
def test_ctrl_c_and_sigterm_save_and_leave_no_process(config: Config, tmp_path: Path, number: signal.Signals) -> None:
    mark = f"mark-{uuid.uuid4()}"
    words = ["train", str(tmp_path / "c.yaml"), "train.max_steps=0", "train.epochs=10000", "train.evaluate_every=0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "haste_launch.cli", *words],
        env={**os.environ, "HASTE_TEST_MARK": mark},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    run = Path(config.run.folder)
    metrics = run / "metrics.jsonl"
    wait_for(lambda: process.poll() is not None or (metrics.exists() and len(read_losses(run)) > 20))
    assert process.poll() is None, process.communicate()[1]
    assert len(alive_with(mark)) > 3  # the command, Ray's servers, two ranks
    os.killpg(process.pid, number)  # what a terminal does, or timeout: everyone in the group gets it
    _, said = process.communicate(timeout=SECONDS)
    assert "Traceback" not in said
    end = read_events(run)[-1]
    assert (end["event"], end["reason"]) == ("end", "stopped")
    assert (run / "checkpoints" / f"step-{end['step']:08d}" / "state.json").is_file()
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert said.strip().splitlines()[-1].startswith("haste: interrupted: training stopped, everything is saved in ")
    else:
        assert process.returncode == 0
        assert f"stopped at step {end['step']:,}" in said
    wait_for(lambda: not alive_with(mark), 20)


SHELTERED = """
import os, signal, time
import ray
from haste_dist.config import Config
from haste_launch.ray_session import ray_session

with ray_session(Config()):
    @ray.remote
    class Rank:
        def pid(self):
            return os.getpid()

    rank = Rank.remote()
    pid = ray.get(rank.pid.remote())
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.killpg(0, signal.SIGTERM)
    time.sleep(2)
    assert ray.get(rank.pid.remote(), timeout=20) == pid
    assert ray.nodes()[0]["Alive"]
    began = time.monotonic()
print("ended in", time.monotonic() - began)
"""


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs Linux")
def test_ray_outlives_a_sigterm_to_the_group_and_ends_at_once() -> None:
    mark = f"mark-{uuid.uuid4()}"
    words = [sys.executable, "-c", SHELTERED]
    done = subprocess.run(words, env={**os.environ, "HASTE_TEST_MARK": mark}, capture_output=True, text=True, start_new_session=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split("ended in ")[1]) < 20  # seconds; without servers that answer it is a minute
    wait_for(lambda: not alive_with(mark), 20)


@pytest.mark.slow
def test_ray_and_torchrun_run_the_same_loop(config: Config, tmp_path: Path, ray_session: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", str(tmp_path / "c.yaml"), f"run.folder={tmp_path}/ray"]) == 0
    words = [str(tmp_path / "c.yaml"), f"run.folder={tmp_path}/torchrun"]
    command = ["torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
    program = [sys.executable, "-m", *command, "-m", "haste_launch.torchrun", *words]
    done = subprocess.run(program, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stderr
    assert len(read_losses(tmp_path / "ray")) == 12
    np.testing.assert_allclose(read_losses(tmp_path / "ray"), read_losses(tmp_path / "torchrun"), rtol=1e-6)
    assert {e["ranks"] for e in read_events(tmp_path / "torchrun") if e["event"] == "start"} == {2}
    capsys.readouterr()
    assert cli.main(["evaluate", str(tmp_path / "ray"), "--checkpoint", "last", "--predictions", str(tmp_path / "p.parquet")]) == 0
    assert pq.read_table(tmp_path / "p.parquet").num_rows == 48
    assert "precision" in capsys.readouterr().out
    assert (tmp_path / "ray" / "evaluate-test.json").is_file()
    assert {path.name for path in (tmp_path / "ray").iterdir() if path.name.startswith(".")} <= {".lock"}


@pytest.mark.slow
def test_the_error_of_a_rank_is_one_line(config: Config, tmp_path: Path, ray_session: None, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", str(tmp_path / "c.yaml"), "output.lr=1e30"]) == 2
    said = capfd.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("haste: error: ")]
    assert len(lines) == 1
    assert " in the gradient of the encoder " in lines[0]
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("words", "resources", "expected"),
    [
        ({}, {"CPU": 2}, (1, False)),
        ({}, {"CPU": 8, "GPU": 4}, (4, True)),
        ({"ranks": 2}, {"CPU": 8, "GPU": 4}, (2, True)),
        ({"ranks": 3, "device": "cpu"}, {"CPU": 2, "GPU": 4}, (3, False)),
    ],
)
def test_ranks_follow_the_cluster(words: dict, resources: dict, expected: tuple) -> None:
    config = Config()
    for name, value in words.items():
        setattr(config.launch, name, value)
    assert count_ranks(config, resources) == expected


@pytest.mark.parametrize(("words", "said"), [({"device": "cuda"}, "has no GPU"), ({"ranks": 9}, "has 4 GPUs")])
def test_more_than_the_cluster_has_is_refused(words: dict, said: str) -> None:
    config = Config()
    for name, value in words.items():
        setattr(config.launch, name, value)
    with pytest.raises(ConfigError, match=said):
        count_ranks(config, {"CPU": 8} if "device" in words else {"GPU": 4})


def test_a_config_crosses_to_the_ranks_whole(config: Config) -> None:
    import dataclasses

    assert config_from_dict(dataclasses.asdict(config)) == config


def test_paths_are_made_absolute_and_names_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    config = Config()
    config.data.prepared, config.run.folder, config.encoder.name, config.encoder.tokenizer = "prepared", "run", "model", "bert-base-uncased"
    resolved = absolute_paths(config)
    assert resolved.data.prepared == str(tmp_path / "prepared")
    assert resolved.encoder.name == str(tmp_path / "model")
    assert resolved.encoder.tokenizer == "bert-base-uncased"


def test_the_first_signal_asks_and_the_second_interrupts(tmp_path: Path) -> None:
    stop = tmp_path / "stop"
    wants_stop = stop_reader(stop)
    assert not wants_stop()
    before = signal.getsignal(signal.SIGINT)
    with stop_signals(stop) as received:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # the echo of a sender that signals the group as well
        assert received == [signal.SIGTERM]
        assert stop.exists()
        time.sleep(ECHO_SECONDS)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    time.sleep(0.3)
    assert wants_stop()


def test_only_a_users_error_loses_its_traceback() -> None:
    assert user_error(WorkersFailed({1: ValueError("a bug")})) is None
    assert str(user_error(WorkersFailed({0: HasteError("gone")}))) == "gone"


def test_memory_that_is_full_is_one_line() -> None:
    from ray.exceptions import OutOfMemoryError
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    said = OutOfMemoryError(
        "2 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 192.0.2.2, ID: 91cc) was "
        "22.48GB used / 23.54GB limit (0.954927)\nOOM kill reason: ..."
    )
    found = user_error(WorkersFailed({0: WorkerHealthCheckFailedError("A worker health check failed.", said)}))
    assert isinstance(found, OutOfMemory)
    assert "the memory of 192.0.2.2 is full (22.48GB used / 23.54GB limit), so Ray ended a rank" in str(found)
    assert "\n" not in str(found)
    found = user_error(WorkersFailed({0: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB\nmore")}))
    assert str(found) == "a GPU's memory is full (CUDA out of memory. Tried to allocate 1.00 GiB); haste plan says which settings fit"


class WorkersFailed(Exception):
    """Shaped like Ray's error."""

    def __init__(self, failures: dict[int, Exception]):
        super().__init__()
        self.worker_failures = failures


def test_a_run_that_would_fill_its_gpus_is_refused_before_ranks_start(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a made-up GPU of one GiB, most of which is kept free."""
    import ray
    import torch

    from haste_dist.model import open_prepared

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2, "GPU": 2})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "small GPU")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: SimpleNamespace(total_memory=2**30))
    config.launch.device = "cuda"
    with pytest.raises(ConfigError, match=r"each of 2 GPUs would need .* small GPU has 1\.0 GiB"):
        check_memory(config, open_prepared(config))
    config.launch.check_memory = False
    check_memory(config, open_prepared(config))
    config.launch.check_memory, config.launch.device = True, "cpu"
    check_memory(config, open_prepared(config))
    config.launch.label_parallel = 3
    with pytest.raises(ConfigError, match="label_parallel=3 does not divide the 2 ranks"):
        check_memory(config, open_prepared(config))


@pytest.mark.parametrize("folder", ["file", "file/below"])
def test_a_file_in_the_way_of_a_run_is_told_in_one_line(
    config: Config, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    from haste_launch import ray_train

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2})
    monkeypatch.setattr(ray_train, "ray_session", lambda *_: contextlib.nullcontext())
    (tmp_path / "file").touch()
    config.run.folder, config.launch.device = str(tmp_path / folder), "cpu"
    with pytest.raises(DataError, match=f"^{tmp_path / folder}: cannot be written .*; choose another run.folder$"):
        ray_train.train(config)
    with pytest.raises(DataError, match=f"^{tmp_path / folder}: cannot be written .*; evaluate-test.json is written there: .* a copy$"):
        ray_train.evaluate(config, "last")


def test_a_command_that_joined_a_cluster_waits_for_none_of_its_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    """It once ended half a minute late, looking for the end of servers that it had not started."""
    import ray

    for name, value in {"is_initialized": False, "init": None, "shutdown": None}.items():
        monkeypatch.setattr(ray, name, lambda *_, value=value, **__: value)
    config = Config()
    with socket.create_server(("127.0.0.1", 0)) as server:
        config.launch.address = f"127.0.0.1:{server.getsockname()[1]}"
        with ray_session(config):
            pass
    assert "end of Ray" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize("address", ["127.0.0.1:1", "[::1]:1", "127.0.0.1:99999", "no-such-host.invalid:6379"])
def test_a_cluster_that_is_not_there_is_one_line_at_once(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    """Ray itself tries for minutes."""
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("asks Ray"))
    config = Config()
    config.launch.address = address
    said = rf"launch\.address: no Ray cluster at '{re.escape(address)}' \(.+\); name another, or none to start Ray on this machine"
    with pytest.raises(ConfigError, match=said), ray_session(config):
        pass


@pytest.mark.parametrize("early", [True, False])
def test_sigterm_interrupts_while_ray_is_there_and_is_as_before_after(early: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def start(**_: object) -> None:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(15))  # as Ray does
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM if early else 0)  # blocked until it has started

    for name, value in {"is_initialized": lambda: False, "init": start, "shutdown": lambda: None}.items():
        monkeypatch.setattr(ray, name, value)

    def terminate() -> None:
        assert not early
        signal.raise_signal(signal.SIGTERM)
        time.sleep(20)  # until Python comes to it

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), ray_session(Config()):
        terminate()
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="needs Linux")
def test_a_start_that_is_interrupted_leaves_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server and its child, neither of which hears SIGTERM, as Ray's are."""
    import ray

    children: list[int] = []
    servers: list[subprocess.Popen[str]] = []

    def start(**_: object) -> None:
        server = subprocess.Popen(["sh", "-c", "sleep 600 & echo $!; wait"], stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None
        servers.append(server)
        children.append(int(server.stdout.readline()))
        raise KeyboardInterrupt

    for name, value in {"is_initialized": lambda: False, "init": start, "shutdown": lambda: None}.items():
        monkeypatch.setattr(ray, name, value)
    with pytest.raises(KeyboardInterrupt), ray_session(Config()):
        pass
    assert servers[0].wait(20) == -signal.SIGKILL
    child = Path(f"/proc/{children[0]}/stat")
    wait_for(lambda: not child.exists() or "(sleep) Z" in child.read_text(), 20)


def test_ray_is_started_a_second_time(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    begun: list[str] = []

    def start(address: str, **_: object) -> None:
        begun.append(address)
        if len(begun) == 1:
            raise RuntimeError("the raylet has gone")

    for name, value in {"is_initialized": lambda: False, "init": start, "shutdown": lambda: begun.append("end")}.items():
        monkeypatch.setattr(ray, name, value)
    with ray_session(Config()):
        assert begun == ["local", "end", "local"]
