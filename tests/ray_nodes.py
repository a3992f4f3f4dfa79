"""Ray nodes started by ``ray start``, as on a real cluster, and what tests ask of processes."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

SECONDS = 280


def wait_for(condition: Callable[[], object], seconds: float = SECONDS) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.2)


def start_node(words: list[str], mark: str, environment: dict[str, str], before: tuple[str, ...] = (), host: str = "127.0.0.1") -> None:
    """A Ray node of one CPU whose processes carry HASTE_TEST_MARK=mark; ``before``: words that run the command elsewhere."""
    ray = [*before, sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--num-cpus=1", f"--node-ip-address={host}"]
    ports = ["--dashboard-agent-listen-port=0", "--dashboard-agent-grpc-port=0", "--disable-usage-stats", f"--object-store-memory={2**27}"]
    subprocess.Popen(
        [*ray, *ports, *words], env={**environment, "HASTE_TEST_MARK": mark}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )


def alive_with(mark: str) -> list[int]:
    """Processes, not zombies, that inherited HASTE_TEST_MARK=mark."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (entry / "environ").read_bytes() and "\nState:\tZ" not in (entry / "status").read_text():
                found.append(int(entry.name))
        except OSError:  # it ended, or is another user's
            continue
    return found


def kill_all(mark: str) -> None:
    """SIGKILL to whatever was started with HASTE_TEST_MARK=mark."""
    while left := alive_with(mark):
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it has just ended
        return b""


def ranks_with(mark: str) -> list[int]:
    """Process ids of Ray Train's workers."""
    return [pid for pid in alive_with(mark) if b"RayTrainWorker" in command_of(pid)]


def answers(port: int, host: str = "127.0.0.1") -> bool:
    with socket.socket() as s:
        s.settimeout(2)
        return s.connect_ex((host, port)) == 0
