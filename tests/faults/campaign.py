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
the step that saves waits for the save before it, so that is at most two intervals. And training goes on within a minute.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parents[1]))

from forked import RANKS, Board, drive, fork
from tiny import make_prepared
from undisturbed import HANG_SECONDS, INTERVAL, Reference, Result, look_at, problems_of, read_history

from haste_dist.checkpoint import CHECKPOINTS
from haste_dist.config import Config, load_config, save_config
from haste_dist.records import append_record

EPOCHS = 20  # of 12 steps


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
                look_at(Path(config.run.folder), self.folder, self.reference)
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
