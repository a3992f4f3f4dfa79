"""``haste study``: named cases of settings, each trained from several seeds, side by side on the GPUs there are; then the report.

Each run is a process of its own on one GPU (or the CPU). A finished run is kept, a cut one goes on from its checkpoint, so the same command
goes on with a study. After each run the report is written anew; it needs nothing but what runs left in the study's folder.

Exit status: 0 done, 2 wrong words or a run that failed, 130 stopped by Ctrl-C or SIGTERM with every finished run kept.
"""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from haste_dist.errors import ConfigError, DataError, HasteError, Interrupted
from haste_dist.manifest import writable_folder
from haste_dist.runlog import read_events
from haste_dist.trial_records import append_trials
from haste_dist.trials import Study, Trial, read_result, read_study_page, run_trial, trials_of, with_label_order, write_results
from haste_launch.study_report import write_report

POLL_SECONDS = 0.5
PATIENCE = 60  # seconds that a run has to save after it was asked to stop


@dataclass
class Run:
    """A run that is going on."""

    trial: Trial
    process: subprocess.Popen
    gpu: str
    shown: int = 0  # evaluations that were printed


def study(page: str, out: Path, overrides: list[str], side_by_side: int, plot: bool = True, records: str = "") -> int:
    """Runs what is missing and writes the report, and a record a run into the folder ``records``; the exit status. Raises HasteError."""
    wanted = read_study_page(page)
    console = Console(highlight=False, soft_wrap=True)
    trials: list[Trial] = []
    embeddings: dict[str, Any] = {}  # texts are embedded once for all label orders that are made now
    asked = trials_of(wanted, out, overrides)
    writable_folder(out, "choose another --out")
    for trial in asked:
        trials.append(dataclasses.replace(trial, config=with_label_order(trial.config, out, wanted.seeds[0], embeddings)))
    missing = [trial for trial in trials if read_result(trial) is None]
    needed = [*(member for trial in missing for member in trial.members), *(trials if wanted.keep_weights else [])]
    again = list(dict.fromkeys(one.folder for one in needed if read_result(one) and not one.has_weights))
    for folder in again:  # what it has is kept until it has it again
        console.print(f"{folder.name}: its weights are gone, so it is trained again")
    left = [trial for trial in trials if trial in missing or trial.folder in again]
    if len(left) < len(trials):
        console.print(f"{len(trials) - len(left)} of {len(trials)} runs are in {out} already and are kept")
    failed = _run_all(left, Path(page), out, overrides, side_by_side, console, lambda: _write(wanted, trials, out, False, records))
    if any(read_result(trial) for trial in trials):
        console.print(str(_write(wanted, trials, out, plot, records)))
    if failed:
        raise HasteError(f"{len(failed)} of {len(left)} runs failed, the first is {failed[0].folder} (output.log there says why)")
    return 0


def report(page: str, out: Path, overrides: list[str], plot: bool = True, records: str = "") -> int:
    """Writes the report of what is finished, and runs nothing: the study's folder is all it reads. Raises HasteError."""
    wanted = read_study_page(page)
    trials = trials_of(wanted, out, overrides)
    done = sum(read_result(trial) is not None for trial in trials)
    if not done:
        raise DataError(f"{out}: holds no finished run of {page}; without --report they are made")
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{done} of {len(trials)} runs are finished")
    console.print(str(_write(wanted, trials, out, plot, records)))
    return 0


def main(argv: list[str]) -> int:
    """A run in a process of its own: PAGE OUT CASE SEED PREPARED [a.b=c ...]."""
    page, out, case, seed, prepared, *overrides = argv
    received: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _frame: received.append(number))
    try:
        wanted = read_study_page(page)
        trials = trials_of(wanted, Path(out), [*overrides, f"data.prepared={prepared}"])
        trial = next(trial for trial in trials if (trial.case, trial.seed) == (case, int(seed)))
        return 0 if run_trial(trial, wanted, lambda: bool(received)) else 130
    except HasteError as error:
        print(f"haste: error: {error}", file=sys.stderr, flush=True)
        return 2


def _write(wanted: Study, trials: list[Trial], out: Path, plot: bool, records: str) -> Path:
    done = [trial for trial in trials if read_result(trial)]
    write_results(out, [result for trial in done if (result := read_result(trial))])
    if records:
        append_trials(wanted, done, records)
    return write_report(wanted, done, out, plot)


def _run_all(
    left: list[Trial], page: Path, out: Path, overrides: list[str], side_by_side: int, console: Console, after: Any
) -> list[Trial]:
    """Runs all of ``left``, ``side_by_side`` on each GPU; returns those that failed. Raises Interrupted."""
    gpus = _gpus(left)
    places = [gpu for _ in range(side_by_side) for gpu in gpus]
    waiting = list(left)
    failed: list[Trial] = []
    running: list[Run] = []
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while waiting or running:
            while len(running) < len(places) and (trial := _next(waiting, [*(run.trial for run in running), *failed])):
                taken = [run.gpu for run in running]
                gpu = next(gpu for gpu in places if taken.count(gpu) < side_by_side)
                waiting.remove(trial)
                running.append(Run(trial, _start(trial, page, out, overrides, gpu, len(places)), gpu))
            if not running:  # what is left waits for runs that failed
                return failed + waiting
            time.sleep(POLL_SECONDS)
            for run in list(running):
                status = run.process.poll()  # before the look at its log, so that nothing is missed
                run.shown = _show(run.trial, run.shown, console)
                if status is None:
                    continue
                running.remove(run)
                if status:
                    failed.append(run.trial)
                    console.print(f"{run.trial.folder.name}: failed with exit status {status}; {run.trial.folder / 'output.log'}")
                else:
                    after()
    except KeyboardInterrupt:
        _stop(running)
        raise Interrupted(f"every finished run is kept in {out}; the same command goes on from there") from None
    except BaseException:
        _stop(running)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    return failed


def _next(waiting: list[Trial], unfinished: list[Trial]) -> Trial | None:
    """The first whose members neither wait nor are ``unfinished``."""
    pending = {trial.folder for trial in (*waiting, *unfinished)}
    return next((trial for trial in waiting if not any(member.folder in pending for member in trial.members)), None)


def _gpus(left: list[Trial]) -> list[str]:
    """The GPUs that runs may have, as CUDA names them; one empty name for the CPU. Raises ConfigError."""
    if not left:
        return [""]
    import torch

    device = left[0].config.launch.device
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return [""]
    if not torch.cuda.is_available():
        raise ConfigError("launch.device=cuda: torch sees no GPU on this host; set launch.device=cpu")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]


def _start(trial: Trial, page: Path, out: Path, overrides: list[str], gpu: str, share: int) -> subprocess.Popen:
    trial.folder.mkdir(parents=True, exist_ok=True)
    threads = str(trial.config.launch.threads or max(1, (os.cpu_count() or 1) // share))
    environment = {**os.environ, "OMP_NUM_THREADS": threads, **({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {})}
    words = [str(page), str(out), trial.case, str(trial.seed), trial.config.data.prepared, *overrides]
    with open(trial.folder / "output.log", "ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "haste_launch.study", *words], stdout=log, stderr=log, env=environment, start_new_session=True
        )


def _show(trial: Trial, seen: int, console: Console) -> int:
    """Prints the evaluations that a run has made since the last look; returns how many there are."""
    try:
        events = [event for event in read_events(trial.folder) if event["event"] == "eval"]
    except HasteError:
        return seen
    for event in events[seen:]:
        figures = "  ".join(f"{name} {100 * event[name]:.2f}" for name in ("P@1", "P@3", "P@5", "PSP@5") if name in event)
        rare = " ".join(f"{100 * value:.1f}" for name, value in event.items() if name.startswith("r_at_5_freq"))
        console.print(f"{trial.folder.name}: epoch {event['epoch']:.1f} {trial.config.evaluate.split}  {figures}  R@5 by frequency {rare}")
    return len(events)


def _stop(running: list[Run]) -> None:
    """Asks the runs to save and to stop, and ends those that do not."""
    for run in running:
        run.process.terminate()
    end = time.monotonic() + PATIENCE
    for run in running:
        try:
            run.process.wait(max(0.1, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            run.process.kill()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
