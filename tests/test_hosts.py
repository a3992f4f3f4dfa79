"""A cluster of two hosts with a network between them: ranks on both, one host lost, and the launch files as they are written."""

import copy
import os
import re
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hosts import Host, two_hosts
from ray_nodes import SECONDS, start_node, wait_for
from test_recovery import failures_and_steps
from tiny import FULL, make_prepared, read_losses

from haste_dist.config import Config, save_config
from haste_dist.runlog import read_events
from haste_dist.train import train
from haste_dist.world import join_world
from haste_launch.attempts import newest_step

ROOT = Path(__file__).resolve().parents[1]
PORT = 6379
JOINED = "import ray, time; ray.init(address='auto', log_to_driver=False)\nwhile sum(n['Alive'] for n in ray.nodes()) < 2: time.sleep(0.2)"


@dataclass
class Cluster:
    first: Host
    second: Host
    environment: dict[str, str]

    @property
    def address(self) -> str:
        return f"{self.first.address}:{PORT}"

    def start(self, *words: str) -> subprocess.Popen:
        """haste on the first host."""
        command = [*self.first.words, sys.executable, "-m", "haste_launch.cli", *words]
        return subprocess.Popen(command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def hosts() -> Iterator[tuple[Host, Host]]:
    with two_hosts() as pair:
        yield pair


@pytest.fixture
def cluster(hosts: tuple[Host, Host], short: Path) -> Cluster:
    first, second = hosts
    environment = {**os.environ, **first.environment, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex}
    environment |= {"RAY_health_check_period_ms": "500", "RAY_health_check_failure_threshold": "4"}
    cluster, mark = Cluster(first, second, environment), f"mark-{uuid.uuid4()}"
    words = ["--head", f"--port={PORT}", "--include-dashboard=false", f"--temp-dir={short}"]
    start_node(words, mark, environment, first.words, first.address)
    reached = ["bash", "-c", f"exec 3<>/dev/tcp/{first.address}/{PORT}"]
    wait_for(lambda: second.run(*reached).returncode == 0)
    start_node([f"--address={cluster.address}"], mark, environment, second.words, second.address)
    more = {"RAY_ADDRESS": cluster.address, **environment}
    done = first.run(sys.executable, "-c", JOINED, **more)
    assert done.returncode == 0, done.stderr
    return cluster


@pytest.fixture
def config(tmp_path: Path) -> Config:
    config = make_prepared(tmp_path, overrides=["launch.ranks=2", "train.epochs=20", "train.evaluate_every=0", "train.checkpoint_every=10"])
    config.launch.elastic, config.launch.wait, config.launch.timeout = True, 1.0, 10
    save_config(config, tmp_path / "c.yaml")
    return config


@pytest.mark.slow
def test_a_run_over_two_hosts_outlives_a_rank_and_a_host(cluster: Cluster, config: Config, tmp_path: Path) -> None:
    """First a rank is killed, then its host loses power; the losses are those of a run that nothing disturbed."""
    run = Path(config.run.folder)
    training = cluster.start("train", str(tmp_path / "c.yaml"), f"launch.address={cluster.address}")
    wait_for(lambda: failures_and_steps(run) >= (0, 12) and newest_step(run))  # a save ends some steps after its own
    ranks = [host.run("pgrep", "--count", "--full", "RayTrainWorker").stdout.strip() for host in (cluster.first, cluster.second)]
    cluster.second.run("pkill", "--signal", "KILL", "--full", "RayTrainWorker")
    wait_for(lambda: failures_and_steps(run) >= (1, 12))
    cluster.second.pull_the_plug()
    _, said = training.communicate(timeout=SECONDS)
    assert training.returncode == 0, said
    assert ranks == ["1", "1"]
    assert [e["ranks"] for e in read_events(run) if e["event"] == "start"] == [2, 2, 1]
    assert len(re.findall(r"ranks failed \(.*\); going on from step \d+", said)) == 2
    whole = copy.deepcopy(config)
    whole.run.folder += "-whole"
    train(whole, join_world("cpu"))
    np.testing.assert_allclose(read_losses(run), read_losses(whole.run.folder), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not FULL, reason="half a minute; set HASTE_FULL=1")
def test_the_doctor_sees_both_hosts(cluster: Cluster, config: Config, tmp_path: Path) -> None:
    words = ["doctor", str(tmp_path / "c.yaml"), f"launch.address={cluster.address}"]
    said, problems = (done := cluster.start(*words)).communicate(timeout=SECONDS)
    assert done.returncode == 0, problems
    for host in (cluster.first, cluster.second):
        for what in ("versions", "storage", "data", "clock"):
            assert f"ok   {what:<9}{host.address}" in said
        assert re.search(rf"ok   ports    {host.address} +reaches 1 other nodes", said)
    assert re.search(r"ok   gloo     2 ranks +all-reduce of 8 MiB in [\d.]+ ms", said)


@pytest.mark.slow
@pytest.mark.skipif(not FULL, reason="a minute; set HASTE_FULL=1")
def test_the_slurm_script_trains_on_both_hosts(hosts: tuple[Host, Host], config: Config, tmp_path: Path) -> None:
    """The script as it is; srun and scontrol are small programs that do on two hosts what Slurm does on its nodes."""
    first, second = hosts
    programs = tmp_path / "bin"
    programs.mkdir()
    environment = first.environment
    sends = " ".join(f"{name}={value}" for name, value in environment.items())
    patience = "RAY_gcs_rpc_server_reconnect_timeout_s=10"  # not the 60 that a worker node waits for a head that has gone
    write_program(programs / "scontrol", f'test "$1" = show && echo {first.address} || echo "$@" >> {tmp_path}/requeued')
    write_program(
        programs / "srun",
        "while [[ $1 == --* ]]; do shift; done\n"
        + "".join(f'{" ".join(host.words)} env {sends} {own} "$@" & pids+=($!)\n' for host, own in ((second, patience), (first, "")))
        + 'wait "${pids[1]}"; status=$?; wait "${pids[0]}"; exit $status',  # as Slurm, which waits for all tasks
    )
    words = ["bash", str(ROOT / "launch" / "slurm.sbatch"), str(tmp_path / "c.yaml")]
    more = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "a,b", "SLURM_JOB_NUM_NODES": "2", "HOME": str(tmp_path)}
    more |= {"HASTE_VENV": str(Path(sys.executable).parents[1]), "PATH": f"{programs}:{os.environ['PATH']}"}
    job = subprocess.Popen(words, env={**os.environ, **more}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    run = Path(config.run.folder)
    wait_for(lambda: (run / "metrics.jsonl").exists() and len(read_losses(run)) > 12)
    job.send_signal(signal.SIGUSR1)  # the time limit is near
    said, _ = job.communicate(timeout=SECONDS)
    assert job.returncode == 0, said
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    end = read_events(run)[-1]
    assert (end["event"], end["reason"]) == ("end", "stopped")
    done = subprocess.run(words, env={**os.environ, **more}, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [e["ranks"] for e in read_events(run) if e["event"] == "start"] == [2, 2]
    assert len(read_losses(run)) == 20 * 12
    assert list((tmp_path / ".ray").iterdir()) == []


def write_program(path: Path, lines: str) -> None:
    path.write_text(f"#!/bin/bash\n{lines}\n")
    path.chmod(0o755)
