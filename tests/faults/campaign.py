"""A fault campaign: random SIGKILLs to ranks, driver and in the middle of a save; after each the run must be as if there had been none.

    python tests/faults/campaign.py --kills 200         # ranks forked by a driver: a kill costs seconds
    python tests/faults/campaign.py --kills 20 --ray    # through haste train: ranks, the driver, ranks during a save

The driver is the real one (haste_launch.attempts), the ranks run the real loop over gloo; they are only started by a fork of a process that
has imported everything. There the kills are of four kinds:

rank      a rank, at any time
driver    the driver; its ranks are left behind, as torchrun leaves them, and its successor starts at once
both      the driver and its ranks at the same time, as when Ray or a machine goes
writer    a rank, by itself, before a random one of its operations on checkpoints: a file opened, a piece of one written, a sync, a
          rename, a removal

After each kill, before ranks start again: every checkpoint that looks complete has right checksums and, bit for bit, the tensors and
the state of a run that nothing disturbed; the pointers lead to one; the run folder verifies. From the log: every loss is that of the
undisturbed run, a run goes on from the newest checkpoint that was ever published, and at most the steps since the save before are lost:
a step waits for the save before the last, so that is less than two intervals. And training goes on within a minute.
"""

import argparse
import json
import mmap
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
import traceback
import uuid
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parents[1]))

import deepspeed  # noqa: F401  imported here, so that no rank has to
import torch
import torch.utils.tensorboard
from ray.exceptions import RayActorError
from tiny import free_port, make_prepared, read_losses

from haste_dist import checkpoint, saver, tensor_file
from haste_dist.config import Config, load_config, save_config
from haste_dist.errors import HasteError
from haste_dist.records import append_record
from haste_dist.run_lock import lock
from haste_dist.runlog import read_events
from haste_dist.train import CHECKPOINTS, train
from haste_dist.verify import verify
from haste_dist.world import join_world, leave_world
from haste_launch.attempts import until_done
from haste_launch.torchrun import is_orphan

RANKS, INTERVAL, EPOCHS = 2, 10, 60  # of 12 steps
HANG_SECONDS = 60.0
CHANGES = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir")  # audit events
USERS, PEERS, BUG = 3, 4, 5  # how a rank can end: a HasteError, an error that a lost peer explains, any other


@dataclass
class Result:
    """What a campaign found."""

    kills: Counter = field(default_factory=Counter)
    recover_s: list[float] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)  # steps, at each start after the first
    corrupted: list[str] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)
    hangs: list[str] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)  # runs that gave up

    @property
    def sound(self) -> bool:
        return not (self.corrupted or self.silent or self.hangs or self.ended)

    def figures(self) -> dict[str, object]:
        times = sorted(self.recover_s)
        return {
            "kills": self.kills.total(),
            **{f"kills_{kind}": count for kind, count in sorted(self.kills.items())},
            "corrupted": len(self.corrupted),
            "silently_lost": len(self.silent),
            "hangs": len(self.hangs),
            "gave_up": len(self.ended),
            "lost_steps": max(self.lost, default=0),
            "lost_steps_p50": statistics.median(self.lost) if self.lost else 0,
            "interval": INTERVAL,
            "recover_p50_s": round(times[len(times) // 2], 2) if times else 0.0,
            "recover_p95_s": round(times[min(len(times) - 1, int(0.95 * len(times)))], 2) if times else 0.0,
            "recover_max_s": round(times[-1], 2) if times else 0.0,
        }


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


def drive(config: Config, board: Board, folder: Path, reference: "Reference | None", plant: bool) -> int:
    """The driver's process: ranks until they are done, and again after failures."""

    def start(ranks: int) -> BaseException | None:
        if reference is not None:
            look_at(config, folder, reference)
        port = free_port()
        said = folder / "ranks.log"
        pids = {rank: fork(lambda rank=rank: run_rank(config, rank, port, board, plant), said) for rank in range(ranks)}  # type: ignore[misc]
        return watch(pids)

    until_done(config, RANKS, start, lambda: RANKS, lambda seconds: False)
    if reference is not None:
        look_at(config, folder, reference)
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


@dataclass
class Reference:
    """A run that nothing disturbed: files (with checksums) and state of each checkpoint, and all losses."""

    pages: dict[int, dict]
    losses: list[float]

    @classmethod
    def of(cls, run: Path) -> "Reference":
        found = checkpoint.complete(run / CHECKPOINTS)
        return cls({checkpoint.step_of(path): checkpoint.read_page(path) for path in found}, read_losses(run))


def look_at(config: Config, folder: Path, reference: Reference) -> None:
    """Holds the run folder against the reference, once nobody writes there; notes problems in a file beside it."""
    run = Path(config.run.folder)
    os.close(lock(run, HANG_SECONDS))
    problems = problems_of(run, reference)
    with (folder / "problems.jsonl").open("a") as file:
        file.writelines(json.dumps(problem) + "\n" for problem in problems)


def problems_of(run: Path, reference: Reference) -> list[str]:
    """What is not as it would be without kills. Nobody must write there meanwhile."""
    saved = run / CHECKPOINTS
    found = checkpoint.complete(saved)
    if not found:
        return []
    problems = []
    try:
        verify(run)
    except HasteError as error:
        problems.append(str(error))
    for path in found:
        with suppress(HasteError):  # told by verify
            page, expected = checkpoint.read_page(path), reference.pages.get(checkpoint.step_of(path))
            if expected is not None and (page["files"], page["state"]) != (expected["files"], expected["state"]):
                problems.append(f"{path}: is not what an undisturbed run saves")
    return problems


def read_history(run: Path, reference: Reference, result: Result) -> None:
    """What the log of a run says of its losses and its starts."""
    reached = published = 0
    for event in read_events(run):
        if event["event"] == "step":
            reached = max(reached, event["step"])
            if event["loss"] != reference.losses[event["step"] - 1]:
                result.corrupted.append(f"{run}: loss {event['loss']} at step {event['step']}, not {reference.losses[event['step'] - 1]}")
        elif event["event"] == "checkpoint":
            published = max(published, event["step"])
        elif event["event"] == "start" and reached:
            result.lost.append(max(0, reached - event["step"]))
            if event["step"] < published:
                result.silent.append(f"{run}: step {published} had been published, went on from {event['step']}")
            if reached - event["step"] >= 2 * INTERVAL:
                result.silent.append(f"{run}: {reached - event['step']} steps lost")
            reached = event["step"]


class Campaign:
    """Runs, one after the other, and kills among them."""

    def __init__(self, folder: Path, seed: int, seconds: float, plant: bool = False):
        self.folder, self.plant, self.end = folder, plant, time.monotonic() + seconds
        self.random, self.board, self.result = random.Random(seed), Board(), Result()
        folder.mkdir(parents=True, exist_ok=True)
        os.waitpid(fork(self._prepare, folder / "prepare.log"), 0)
        self.config = load_config(folder / "c.yaml")
        self.reference = self._undisturbed()

    def _prepare(self) -> None:
        words = ["train.batch_size=16", f"train.epochs={EPOCHS}", f"train.checkpoint_every={INTERVAL}", "train.evaluate_every=5"]
        words += ["encoder.dropout=0.1", "output.tail_dropout=0.1", "launch.retries=50", "launch.timeout=60", "launch.threads=1"]
        save_config(make_prepared(self.folder, overrides=[*words, f"launch.ranks={RANKS}"]), self.folder / "c.yaml")

    def _config(self, name: str) -> Config:
        config = load_config(self.folder / "c.yaml")
        config.run.folder = str(self.folder / name)
        return config

    def _undisturbed(self) -> Reference:
        config = self._config("undisturbed")
        config.checkpoint.keep = 10**6
        _, status = os.waitpid(fork(lambda: drive(config, self.board, self.folder, None, False), self.folder / "driver.log"), 0)
        assert status == 0, (self.folder / "ranks.log").read_text()[-2000:]
        return Reference.of(Path(config.run.folder))

    def over(self, kills: int) -> bool:
        return self.result.kills.total() >= kills or time.monotonic() > self.end

    def run(self, kills: int) -> Result:
        """Kills until there were ``kills``, or the time is over."""
        per_save = self.board.operations(0) / len(self.reference.pages)
        number = 0
        while not self.over(kills):
            number += 1
            config = self._config(f"run-{number}")
            self._one_run(config, kills, per_save)
            read_history(Path(config.run.folder), self.reference, self.result)
            shutil.rmtree(Path(config.run.folder) / "tensorboard", ignore_errors=True)
        if (self.folder / "problems.jsonl").exists():
            self.result.corrupted += [json.loads(line) for line in (self.folder / "problems.jsonl").read_text().splitlines()]
        return self.result

    def _one_run(self, config: Config, kills: int, per_save: float) -> None:
        log = Path(config.run.folder) / "metrics.jsonl"
        driver, killed_at, began = self._start(config), time.time(), True
        while True:
            outcome = self._await(driver, log, killed_at)
            if outcome == "going" and not began:
                self.result.recover_s.append(time.time() - killed_at)
            if outcome == "hang":
                self.result.hangs.append(f"{config.run.folder}: nothing for {HANG_SECONDS:g} s after {killed_at}")
                self._end(driver)
                driver, killed_at, began = self._start(config), time.time(), True
                continue
            if outcome in ("done", "gave up"):
                if outcome == "gave up":
                    self.result.ended.append(f"{config.run.folder}: {(self.folder / 'driver.log').read_text()[-300:]}")
                return
            if self.over(kills):
                self._end(driver)  # nothing is left to see
                self.board.disarm()
                look_at(config, self.folder, self.reference)
                return
            kind = self.random.choice(["rank", "driver", "both", "writer", "writer"])
            killed = self._kill(kind, driver, per_save)
            if killed:
                killed_at, began = killed, False
                self.result.kills[kind] += 1
                if kind in ("driver", "both"):
                    os.waitpid(driver, 0)
                    driver = self._start(config)
                print(json.dumps({"kills": self.result.kills.total(), "kind": kind, "sound": self.result.sound}), flush=True)

    def _kill(self, kind: str, driver: int, per_save: float) -> float:
        """When the kill happened; 0 if what was to be killed had ended."""
        rank = self.random.randrange(RANKS)
        if kind == "writer":
            share = self.board.operations(1) / max(1, self.board.operations(0)) if rank else 1.0
            self.board.arm(rank, self.random.randint(1, max(1, int(2 * share * per_save))))
            end = time.time() + HANG_SECONDS
            while not self.board.died(rank) and time.time() < end and _alive(driver):
                time.sleep(0.005)
            self.board.disarm()
            return self.board.died(rank)
        time.sleep(self.random.uniform(0, 1.0))
        ranks = [self.board.pid(r) for r in range(RANKS)]
        if kind == "rank":
            return _kill(ranks[rank])
        killed = _kill(driver)
        if kind == "both":
            for pid in ranks:
                _kill(pid)
        return killed

    def _start(self, config: Config) -> int:
        return fork(lambda: drive(config, self.board, self.folder, self.reference, self.plant), self.folder / "driver.log")

    def _end(self, driver: int) -> None:
        _kill(driver)
        os.waitpid(driver, 0)
        for rank in range(RANKS):
            _kill(self.board.pid(rank))

    def _await(self, driver: int, log: Path, since: float) -> str:
        """Until ranks that started after ``since`` have done a step: going; or the driver has ended: done or gave up; or: hang."""
        end = time.time() + HANG_SECONDS
        while time.time() < end:
            pid, status = os.waitpid(driver, os.WNOHANG)
            if pid:
                return "gave up" if status else "done"
            if log.exists() and _goes_on(log, since):
                return "going"
            time.sleep(0.02)
        return "hang"


def _goes_on(log: Path, since: float) -> bool:
    started = False
    for line in log.read_bytes().splitlines()[-60:]:
        with suppress(ValueError):
            event = json.loads(line)
            started = started or (event["event"] == "start" and event["time"] >= since)
            if started and event["event"] == "step":
                return True
    return False


def _alive(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def _kill(pid: int) -> float:
    """When it was done; 0 if there was nobody."""
    if not pid or not _alive(pid):
        return 0.0
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
        return time.time()
    return 0.0


def through_ray(campaign: Campaign, kills: int) -> Result:
    """The same through ``haste train``: ranks and drivers at random times, ranks while a checkpoint is being written."""
    from test_launch import alive_with
    from test_recovery import kill_all, ranks_with

    config, result, chance = campaign._config("ray"), campaign.result, campaign.random
    save_config(config, campaign.folder / "ray.yaml")
    run, mark = Path(config.run.folder), ""
    log = run / "metrics.jsonl"
    process: subprocess.Popen | None = None
    killed_at, kind = time.time(), ""
    try:
        while not campaign.over(kills):
            if process is None:
                mark = f"mark-{uuid.uuid4()}"
                words = [sys.executable, "-m", "haste_launch.cli", "train", str(campaign.folder / "ray.yaml")]
                with (campaign.folder / "ray.log").open("a") as said:
                    process = subprocess.Popen(words, env={**os.environ, "HASTE_TEST_MARK": mark}, stdout=said, stderr=said)
            end = time.time() + 3 * HANG_SECONDS
            while not (log.exists() and _goes_on(log, killed_at)) and process.poll() is None and time.time() < end:
                time.sleep(0.05)
            if time.time() >= end:
                result.hangs.append(f"ray: nothing for {3 * HANG_SECONDS:g} s after {kind}")
            elif kind:
                result.recover_s.append(time.time() - killed_at)
                if result.recover_s[-1] > HANG_SECONDS:
                    result.hangs.append(f"ray: {result.recover_s[-1]:.0f} s after {kind}")
            if process.poll() is not None:  # the run is over
                if process.returncode:
                    result.ended.append(f"ray: exit {process.returncode}")
                read_history(run, campaign.reference, result)
                result.corrupted += problems_of(run, campaign.reference)
                shutil.rmtree(run)
                process, killed_at, kind = None, time.time(), ""
                continue
            kind = chance.choice(["rank", "driver", "writer"])
            killed_at = _kill_ray(kind, chance, process, ranks_with(mark), run)
            if killed_at:
                result.kills[kind] += 1
                print(
                    json.dumps({"ray kills": result.kills.total(), "kind": kind, "sound": result.sound, "recover_s": result.recover_s[-1:]})
                )
            if kind == "driver":
                process.wait()
                process = None
        return result
    finally:
        if process is not None:
            process.kill()
            process.wait()
        while mark and alive_with(mark):
            kill_all(mark)
        if log.exists():
            read_history(run, campaign.reference, result)
            result.corrupted += problems_of(run, campaign.reference)


def _kill_ray(kind: str, chance: random.Random, process: subprocess.Popen, ranks: list[int], run: Path) -> float:
    if kind == "writer":
        end = time.time() + HANG_SECONDS
        while time.time() < end and process.poll() is None and not next((run / CHECKPOINTS).glob(".partial-0*"), None):
            time.sleep(0.0005)
        time.sleep(chance.uniform(0, 0.01))
    else:
        time.sleep(chance.uniform(0, 1.0))
    return _kill(process.pid if kind == "driver" else chance.choice(ranks or [0]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--ray", action="store_true", help="through haste train")
    parser.add_argument("--plant", action="store_true", help="a fault that must be found: publish before the files are whole")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="end after this time, with fewer kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/faults"), help="folder for runs and logs; must not exist")
    parser.add_argument("--records", default="", help="folder that the record is appended to")
    words = parser.parse_args()
    if words.out.exists():
        parser.error(f"{words.out} exists")
    campaign = Campaign(words.out.absolute(), words.seed, words.seconds, words.plant)
    result = through_ray(campaign, words.kills) if words.ray else campaign.run(words.kills)
    for problem in (*result.corrupted, *result.silent, *result.hangs, *result.ended):
        print(problem)
    print(json.dumps(result.figures(), indent=1))
    if words.records:
        figures = {"started_by": "haste train" if words.ray else "fork", "seed": words.seed, **result.figures()}
        append_record("fault_campaign", "haste_dist", {"L": 101, "N": 16, "W": RANKS}, figures, words.records, gpus=0)
    return 0 if result.sound else 1


if __name__ == "__main__":
    sys.exit(main())
