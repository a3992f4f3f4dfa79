"""The driver and its ranks as forks of a process that has imported everything, and what kills a rank inside a save."""

import mmap
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import deepspeed  # noqa: F401  imported here, so that no rank has to
import torch
import torch.utils.tensorboard
from ray.exceptions import RayActorError
from tiny import free_port
from undisturbed import Reference, look_at

from haste_dist import saver, tensor_file
from haste_dist.checkpoint import CHECKPOINTS
from haste_dist.config import Config
from haste_dist.errors import HasteError
from haste_dist.train import train
from haste_dist.world import join_world, leave_world
from haste_launch.attempts import until_done
from haste_launch.torchrun import is_orphan

RANKS = 2
CHANGES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")  # audit events
USERS, PEERS, BUG = 3, 4, 5  # how a rank can end: a HasteError, an error that a lost peer explains, any other


class Board:
    """Numbers that all processes of a campaign see: of each rank, operations left until it kills itself, its process id, when it did so."""

    def __init__(self) -> None:
        self.numbers = memoryview(mmap.mmap(-1, 4096)).cast("d")

    def arm(self, rank: int, operations: int) -> None:
        self.numbers[16 + rank] = 0.0
        self.numbers[rank] = operations

    def disarm(self) -> None:
        for rank in range(RANKS):
            self.numbers[rank] = 0

    def operation(self, rank: int) -> None:
        self.numbers[24 + rank] += 1
        if self.numbers[rank] > 0:
            self.numbers[rank] -= 1
            if self.numbers[rank] == 0:
                self.numbers[16 + rank] = time.time()
                os.kill(os.getpid(), signal.SIGKILL)

    def died(self, rank: int) -> float:
        return self.numbers[16 + rank]

    def operations(self, rank: int) -> int:
        return int(self.numbers[24 + rank])

    def pid(self, rank: int, value: int | None = None) -> int:
        if value is not None:
            self.numbers[8 + rank] = value
        return int(self.numbers[8 + rank])


class Lost(Exception):
    """Shaped like the error of Ray Train."""

    def __init__(self, failures: dict[int, BaseException]):
        super().__init__("ranks failed")
        self.worker_failures = failures


def fork(work: Callable[[], object], said: Path) -> int:
    """Runs ``work`` in a process of its own, its output appended to ``said``; the process id. Its exit status is what ``work`` returns."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        descriptor = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        status = int(work() or 0)  # type: ignore[call-overload]
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def run_rank(config: Config, rank: int, port: int, board: Board, plant: bool) -> int:
    """A rank, as torchrun would have started it."""
    parent = os.getppid()
    board.pid(rank, os.getpid())
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(RANKS), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank))
    count_operations(lambda: board.operation(rank), config.run.folder)
    if plant:
        publish_too_early()
    try:
        train(config, join_world("cpu", config.launch.timeout), lambda: is_orphan(parent))
        leave_world()
        return 0
    except BaseException as error:
        traceback.print_exc()
        return USERS if isinstance(error, HasteError) else PEERS if isinstance(error, RuntimeError | OSError) else BUG


def count_operations(happened: Callable[[], None], run: str) -> None:
    """Calls ``happened`` before each operation of this process on files of the run's checkpoints."""
    folder, sync, real = f"{run}/{CHECKPOINTS}", os.fsync, tensor_file.hashlib

    def look(event: str, arguments: tuple) -> None:
        if event in CHANGES and folder in str(arguments[0]) and (event != "open" or int(arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)):
            happened()

    class Digest:
        """Told of each piece of a file before it is written."""

        def __init__(self) -> None:
            self.real = real.sha256()

        def update(self, piece: memoryview) -> None:
            happened()
            self.real.update(piece)

        def hexdigest(self) -> str:
            return self.real.hexdigest()

    def counted_sync(descriptor: int) -> None:
        happened()
        sync(descriptor)

    sys.addaudithook(look)
    os.fsync = counted_sync
    tensor_file.hashlib = SimpleNamespace(sha256=Digest)
    tensor_file.PIECE = 2**13


def publish_too_early() -> None:
    """The planted fault: a checkpoint gets its name while half of each file is still to be written."""
    real_write, real_publish = saver.write_tensors, saver.Saver._publish

    def write(path: Path, *words: object) -> tensor_file.FileRecord:
        record = real_write(path, *words)
        os.truncate(path, record.bytes // 2)
        Path(f"{path.parent.parent}/.late-{path.name}").unlink(missing_ok=True)
        waiting.append((path, words))
        return record

    def publish(self: saver.Saver, *words: object) -> None:
        real_publish(self, *words)
        final = words[3]
        for path in list(final.glob("*.safetensors")):
            time.sleep(0.01)
            for held, tensors in waiting:
                if held.name == path.name:
                    real_write(path, *tensors)
        waiting.clear()

    waiting: list[tuple[Path, tuple]] = []
    saver.write_tensors, saver.Saver._publish = write, publish


def drive(config: Config, board: Board, folder: Path, reference: Reference | None, plant: bool) -> int:
    """The driver's process: ranks until they are done, and again after failures."""

    def start(ranks: int) -> BaseException | None:
        if reference is not None:
            look_at(Path(config.run.folder), folder, reference)
        port = free_port()
        said = folder / "ranks.log"
        pids = {rank: fork(lambda rank=rank: run_rank(config, rank, port, board, plant), said) for rank in range(ranks)}  # type: ignore[misc]
        return watch(pids)

    until_done(config, RANKS, start, lambda: RANKS, lambda seconds: False)
    if reference is not None:
        look_at(Path(config.run.folder), folder, reference)
    return 0


def watch(pids: dict[int, int]) -> BaseException | None:
    """Waits for ranks; once one has failed the others have a second. What failed, as Ray would tell it."""
    failures: dict[int, BaseException] = {}
    end = float("inf")
    while pids:
        for rank, pid in list(pids.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if not done:
                continue
            del pids[rank]
            code = os.waitstatus_to_exitcode(status)
            if code:
                kinds = {USERS: HasteError, PEERS: RuntimeError, BUG: AssertionError}
                failures[rank] = kinds[code](f"rank {rank} failed") if code in kinds else RayActorError()
                end = min(end, time.monotonic() + 1.0)
        if time.monotonic() > end:
            for pid in pids.values():
                os.kill(pid, signal.SIGKILL)
            end = float("inf")
        time.sleep(0.01)
    return Lost(failures) if failures else None
