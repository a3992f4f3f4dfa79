"""What ``haste doctor`` runs on each machine: its facts, a port that listens, one rank of an all-reduce."""

import os
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "triton", "ray", "deepspeed", "transformers", "safetensors", "pyarrow", "numpy", "omegaconf")
CONNECT_SECONDS = 5.0
JOIN_SECONDS = 60
MIB = 2**20


@dataclass
class Facts:
    """A machine as it is. Reasons are empty where all is well."""

    time: float
    versions: dict[str, str]
    gpus: list[str]
    busy: list[int]  # MiB that somebody holds, of each GPU
    links: list[str]  # of the first GPU to each other one, as nvidia-smi names them: NV18, PHB, SYS
    compiler: bool  # that Triton's launchers are built with
    free: dict[str, int]  # bytes, of folders
    locks: dict[str, float]  # of half-built extensions, to seconds since
    no_write: str
    no_read: str
    no_data: str


def look(run_folder: str, prepared: str, name: str) -> Facts:
    """Facts of this machine. ``name`` is of a file that the first machine wrote into the run folder, which holds that name."""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return Facts(
        time.time(),
        {"python": ".".join(map(str, sys.version_info[:2])), "haste_dist": _fingerprint(), **{p: _version(p) for p in PACKAGES}},
        [torch.cuda.get_device_name(i) for i in range(count)],
        [int(word) for word in _ask("nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits").split()] if count else [],
        first_links(_ask("nvidia-smi", "topo", "-m")) if count > 1 else [],
        any(shutil.which(word) for word in (os.environ.get("CC", "cc"), "gcc", "clang")),
        {folder: shutil.disk_usage(folder).free for folder in {run_folder, "/tmp", "/dev/shm"} if os.path.isdir(folder)},
        {str(lock): time.time() - lock.stat().st_mtime for lock in find_locks()},
        _write(Path(run_folder)) if run_folder else "",
        _read(Path(run_folder) / name, name) if run_folder else "",
        _open(prepared) if prepared else "",
    )


def find_locks() -> list[Path]:
    """Files with which torch keeps two processes from building one extension; a process that was killed leaves its own."""
    named = os.environ.get("TORCH_EXTENSIONS_DIR")
    roots = [Path(named)] if named else [Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "torch_extensions"]
    return sorted(lock for root in roots if root.is_dir() for lock in root.glob("**/lock"))


def first_links(page: str) -> list[str]:
    """The links of GPU0 to the other GPUs, out of the table that ``nvidia-smi topo -m`` prints."""
    rows = [line.replace("\x1b[4m", "").replace("\x1b[0m", "").split() for line in page.splitlines()]
    head = next((row for row in rows if "GPU1" in row and "GPU0" in row[:1]), [])
    count = sum(word.startswith("GPU") and word[3:].isdigit() for word in head)
    row = next((row for row in rows if row[:1] == ["GPU0"] and row is not head), [])
    return row[2 : count + 1]


class Listener:
    """A port that answers whoever connects. A Ray actor."""

    def __init__(self, host: str):
        self._server = socket.create_server((host, 0), backlog=64)

    def port(self) -> int:
        return self._server.getsockname()[1]


def reach(addresses: list[tuple[str, int]]) -> list[str]:
    """Which of the addresses this machine cannot connect to, with the reason."""
    missed = []
    for host, port in addresses:
        try:
            socket.create_connection((host, port), CONNECT_SECONDS).close()
        except OSError as error:
            missed.append(f"{host}:{port} ({error.strerror or error})")
    return missed


class Rank:
    """One rank of an all-reduce. A Ray actor."""

    def port(self) -> int:
        """A free port for the ranks to meet at."""
        with socket.socket() as one:
            one.bind(("", 0))
            return one.getsockname()[1]

    def measure(self, rank: int, ranks: int, meet: str, on_gpu: bool, mib: int) -> float:
        """Seconds of an all-reduce of ``mib`` MiB, the median of ten; the sum is checked. Raises what torch raises."""
        from datetime import timedelta
        from statistics import median

        import torch
        import torch.distributed as dist

        device = torch.device("cuda" if on_gpu else "cpu")
        backend, limit = ("nccl" if on_gpu else "gloo"), timedelta(seconds=JOIN_SECONDS)
        dist.init_process_group(backend, init_method=f"tcp://{meet}", rank=rank, world_size=ranks, timeout=limit)
        try:
            one = torch.full((mib * MIB // 4,), rank + 1.0, device=device)
            dist.all_reduce(one)
            if one[-1].item() != ranks * (ranks + 1) / 2:
                raise RuntimeError(f"the sum over {ranks} ranks is wrong")
            seconds = []
            for _ in range(10):
                started = time.perf_counter()
                dist.all_reduce(one.fill_(1.0))
                one[-1].item()  # waits for the GPU
                seconds.append(time.perf_counter() - started)
            return median(seconds)
        finally:
            dist.destroy_process_group()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def _fingerprint() -> str:
    """Eight digits that differ where the code does."""
    import hashlib
    import importlib.util

    digest = hashlib.sha256()
    for package in ("haste_dist", "haste_kernels", "haste_launch"):
        spec = importlib.util.find_spec(package)
        for file in sorted(Path(next(iter(spec.submodule_search_locations or []))).glob("*.py")) if spec else []:
            digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:8]


def _ask(*words: str) -> str:
    """What a program prints, or nothing if it is not there or fails."""
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _write(folder: Path) -> str:
    file = folder / f".doctor-{socket.gethostname()}-{os.getpid()}"
    try:
        file.write_text(file.name, encoding="utf-8")
        said = "" if file.read_text(encoding="utf-8") == file.name else "what was written is not what is read"
        file.unlink()
        return said
    except OSError as error:
        return error.strerror or str(error)


def _read(file: Path, text: str) -> str:
    try:
        return "" if file.read_text(encoding="utf-8") == text else "it holds something else"
    except OSError as error:
        return error.strerror or str(error)


def _open(prepared: str) -> str:
    from haste_dist.errors import HasteError
    from haste_dist.manifest import MANIFEST
    from haste_dist.storage import whole_address

    try:
        (whole_address(prepared) / MANIFEST).read()
        return ""
    except HasteError as error:
        return str(error)
