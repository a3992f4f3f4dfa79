"""haste doctor: each thing that would stop a run is found, and its line says what to do."""

import dataclasses
import os
import socket
import time
from pathlib import Path

import pytest

from haste_dist.config import Config
from haste_launch import doctor_node
from haste_launch.doctor import FAIL, OK, SLOW, Finding, doctor, findings, judge, judge_tokens
from haste_launch.doctor_node import MIB, Facts, Listener, find_locks, first_links, look, reach

TOPOLOGY = """
\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\tNUMA Affinity\x1b[0m
GPU0\t X \tNV18\tSYS\tPIX\t0-31\t0
GPU1\tNV18\t X \tSYS\tPHB\t0-31\t0
GPU2\tSYS\tSYS\t X \tNODE\t32-63\t1
NIC0\tPIX\tPHB\tNODE\t X
"""
SOUND = Facts(
    time=100.0,
    versions={"python": "3.11", "torch": "2.13.0", "ray": "2.60.0", "deepspeed": "0.19.8", "haste_dist": "0a1b2c3d"},
    gpus=["H100", "H100"],
    busy=[3, 0],
    links=["NV18"],
    compiler=True,
    free={"/tmp": 50 * 2**30, "/dev/shm": 8 * 2**30},
    locks={},
    no_write="",
    no_read="",
    no_data="",
)


def judged(before: float = 99.9, after: float = 100.1, device: str = "auto", **changes: object) -> list[Finding]:
    config = Config()
    config.data.prepared, config.run.folder, config.launch.device = "/p", "/r", device
    return list(judge("10.0.0.2", dataclasses.replace(SOUND, **changes), SOUND, before, after, config))


def test_a_sound_machine_has_nothing_to_do() -> None:
    found = judged()
    assert {finding.level for finding in found} == {OK}
    assert {finding.what for finding in found} == {"versions", "gpus", "links", "storage", "data", "disk", "clock"}
    assert not any(finding.todo for finding in found)
    assert str(found[1]) == "ok   gpus     10.0.0.2         2 x H100"


@pytest.mark.parametrize(
    ("changes", "level", "line"),
    [
        (
            {"versions": {**SOUND.versions, "torch": "2.11.0"}},
            FAIL,
            r"versions .* torch 2\.11\.0 \(not 2\.13\.0\): install the same pins",
        ),
        ({"versions": {**SOUND.versions, "haste_dist": "ffffffff"}}, FAIL, r"versions .* haste_dist ffffffff .* the same code"),
        ({"compiler": False}, FAIL, r"gpus .* install a C compiler"),
        ({"gpus": [], "device": "cuda"}, FAIL, r"gpus .* no GPU: nvidia-smi must list one"),
        ({"busy": [3, 4096]}, SLOW, r"gpus .* GPU 1 has 4\.0 GiB in use: nvidia-smi tells"),
        ({"links": ["SYS"]}, SLOW, r"links .* SYS: GPUs talk through the host"),
        ({"no_write": "Read-only file system"}, FAIL, r"storage .* /r: not writable \(Read-only file system\): mount the same"),
        ({"no_read": "No such file"}, FAIL, r"storage .* not the same folder as on the first node .*: mount the same folder"),
        ({"no_data": "/p/manifest.json: cannot be read"}, FAIL, r"data .*: run haste prepare"),
        ({"free": {"/tmp": 2**30}}, FAIL, r"disk .* 1\.0 GiB free in /tmp: make room there"),
        ({"free": {"/dev/shm": 64 * MIB}}, FAIL, r"disk .* 0\.1 GiB free in /dev/shm: start the container with --shm-size 8g"),
        ({"time": 103.0}, FAIL, r"clock .* at most 2\.9 s from this machine's: start chrony"),
        ({"time": 90.0}, FAIL, r"clock .* at most 9\.9 s .*: start chrony"),
        ({"locks": {"/c/x/lock": 3600.0}}, FAIL, r"lock .* /c/x/lock is 60 minutes old: .* rm /c/x/lock"),
        ({"locks": {"/c/x/lock": 30.0}}, SLOW, r"lock .* 0 minutes old: a build is at work"),
    ],
)
def test_what_is_wrong_says_what_to_do(changes: dict, level: str, line: str) -> None:
    import re

    bad = [finding for finding in judged(**changes) if finding.level != OK]
    assert [finding.level for finding in bad] == [level]
    assert re.search(line, str(bad[0])), bad[0]


def test_a_slow_answer_is_no_wrong_clock() -> None:
    assert {finding.level for finding in judged(before=60.0, after=140.0, time=135.0)} == {OK}


def test_links_are_read_from_the_table() -> None:
    assert first_links(TOPOLOGY) == ["NV18", "SYS"]
    assert first_links("") == []


def test_locks_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    assert find_locks() == []
    (tmp_path / "py311_cpu" / "fused").mkdir(parents=True)
    lock = tmp_path / "py311_cpu" / "fused" / "lock"
    lock.touch()
    os.utime(lock, (0, time.time() - 3600))
    assert find_locks() == [lock]
    facts = look(str(tmp_path), "", "nosuch")
    assert 3590 < facts.locks[str(lock)] < 3700
    assert (facts.no_write, facts.no_read) == ("", "No such file or directory")
    assert not list(tmp_path.glob(".doctor*"))


def test_ports_that_answer_and_ports_that_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_node, "CONNECT_SECONDS", 1.0)
    listener = Listener("127.0.0.1")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # but does not listen
        port = closed.getsockname()[1]
        assert reach([("127.0.0.1", listener.port()), ("127.0.0.1", port)]) == [f"127.0.0.1:{port} (Connection refused)"]


@pytest.mark.slow
def test_a_cluster_is_looked_at(ray_session: None, tmp_path: Path) -> None:
    """All there is to find on this machine; the prepared folder is missing."""
    config = Config()
    config.run.folder, config.data.prepared, config.launch.device = str(tmp_path / "run"), str(tmp_path / "nosuch"), "cpu"
    found = list(findings(config))
    assert [finding.what for finding in found if finding.level == FAIL] == ["data"]
    assert {finding.what for finding in found} >= {"versions", "storage", "data", "disk", "clock", "auth", "ports", "gloo"}
    assert "all-reduce of 8 MiB in " in str(found[-1])
    assert judge_tokens([{"NodeManagerAddress": "10.0.0.1"}]).level == OK
    assert list((tmp_path / "run").iterdir()) == []
    config.run.folder = str(tmp_path / "file")
    (tmp_path / "file").touch()
    (first,) = findings(config)
    assert str(first).startswith("FAIL storage")
    assert first.todo == "name another folder by run.folder="


def test_the_exit_status_tells(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import contextlib

    from haste_launch import doctor as module

    monkeypatch.setattr(module, "ray_session", lambda _: contextlib.nullcontext())
    for level, status, last in ((OK, 0, "nothing here would stop a run"), (SLOW, 0, "nothing"), (FAIL, 1, "1 of these would stop a run")):
        monkeypatch.setattr(module, "findings", lambda _, level=level: iter([Finding(level, "disk", "a", "b", "c")]))
        assert doctor(Config()) == status
        assert capsys.readouterr().out.splitlines()[-1].startswith(last)
