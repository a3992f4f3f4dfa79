"""Test hosts: network, process and host-name namespaces on this machine, joined by a virtual cable; the file system is shared storage."""

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

CARD = "eth0"
PROGRAMS = ("ip", "unshare", "nsenter")


@dataclass
class Host:
    """A machine of its own as far as network and processes go."""

    name: str
    address: str
    init: int  # process id, seen from here; everything on the host ends with it

    @property
    def words(self) -> tuple[str, ...]:
        """Put before a command, they run it on the host."""
        return ("nsenter", f"--target={self.init}", "--net", "--pid", "--uts", "--mount")

    @property
    def environment(self) -> dict[str, str]:
        """What docs/launch.md says of machines whose own name does not lead to the card between them."""
        return {"GLOO_SOCKET_IFNAME": CARD, "NCCL_SOCKET_IFNAME": CARD}

    def run(self, *command: str, **more: str) -> subprocess.CompletedProcess:
        environment = {**os.environ, **self.environment, **more}
        return subprocess.run([*self.words, *command], env=environment, capture_output=True, text=True, timeout=240, check=False)

    def pull_the_plug(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.init, signal.SIGKILL)


def are_possible() -> bool:
    """Whether this machine lets its tests make hosts."""
    if any(shutil.which(word) is None for word in PROGRAMS):
        return False
    return subprocess.run(["unshare", "--net", "--pid", "--uts", "--fork", "true"], capture_output=True, check=False).returncode == 0


@contextlib.contextmanager
def two_hosts() -> Iterator[tuple[Host, Host]]:
    """Two hosts that see each other and nobody else. Skips the test where namespaces are not allowed."""
    if missing := [word for word in PROGRAMS if shutil.which(word) is None]:
        pytest.skip(f"{' and '.join(missing)} not installed (iproute2, util-linux)")
    hosts, processes, networks = [], [], []
    try:
        for number in (1, 2):
            name = f"haste-{os.getpid()}-{number}"
            # The first process of the namespaces takes in orphans, as init does.
            program = f"hostname {name}; echo; while :; do sleep 3600 & wait; done"
            flags = ["--net", "--pid", "--uts", "--mount-proc", "--fork", "--kill-child"]
            unshare = subprocess.Popen(
                ["unshare", *flags, "sh", "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
            )
            processes.append(unshare)
            assert unshare.stdout is not None
            assert unshare.stderr is not None
            if not unshare.stdout.readline():
                pytest.skip(f"namespaces are not allowed here: {unshare.stderr.read().strip()}")
            init = int(Path(f"/proc/{unshare.pid}/task/{unshare.pid}/children").read_text().split()[0])
            networks.append(os.open(f"/proc/{init}/ns/net", os.O_RDONLY))  # else the cable would go with the host, at both ends
            hosts.append(Host(name, f"10.77.0.{number}", init))
        first, second = hosts
        plug(f"link add {CARD} netns {first.init} type veth peer name {CARD} netns {second.init}")
        for host in hosts:
            for line in (f"address add {host.address}/24 dev {CARD}", f"link set {CARD} up", "link set lo up"):
                plug(line, host)
        yield first, second
    finally:
        for host in hosts:
            host.pull_the_plug()
        for process in processes:
            process.kill()
            process.wait()
        for network in networks:
            os.close(network)


def plug(line: str, host: Host | None = None) -> None:
    done = subprocess.run([*(host.words if host else ()), "ip", *line.split()], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"namespaces are not allowed here: ip {line}: {done.stderr.strip()}")
