"""Writes checkpoints behind the steps: a step waits only while this rank's tensors are copied to the host's memory.

The rest is done by a thread of each rank: it writes and hashes the rank's own file, the ranks tell each other how that went, and the
first one publishes the whole by renaming its folder, or removes it. Then it is copied to ``checkpoint.store``, where there is one; if
that fails the run goes on, for the checkpoint is there, and the next save tries again. The threads talk over a process group of their
own, in the same order on every rank, so their messages never mix with the training thread's and neither waits for the other.

A save waits for the one before it. All ranks learn of a failure by the same words, and the run stops by them: at the next save, at its
end, or earlier where the loop takes ``failed`` for a wish to stop, which the ranks agree on.
"""

import dataclasses
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from haste_dist.agreement import exchange
from haste_dist.checkpoint import (
    ENCODER,
    KEPT,
    OPTIMIZER,
    PAGE,
    REPLACED,
    SCHEMA_VERSION,
    STEP_NAME,
    RunState,
    complete,
    folder_name,
    point,
    put_back,
    rows_file,
    step_of,
)
from haste_dist.checkpoint_store import CheckpointStore
from haste_dist.classifier import Classifier
from haste_dist.config import CheckpointConfig
from haste_dist.engine import EncoderEngine
from haste_dist.errors import CheckpointError, DataError
from haste_dist.guards import ADVICE
from haste_dist.sealed import seal
from haste_dist.tensor_file import FileRecord, write_tensors
from haste_dist.world import World
from haste_kernels import STORED

PIECE = 1 << 26  # bytes of float8 looked at at once
LEAVE_SECONDS = 60.0  # that a run which ends by an error gives a checkpoint to be finished


class LostRankError(RuntimeError):
    """Another rank is gone: no mistake of the user, so starting again may help."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was published: how long the step stood, how long it waited for the save before, how long this rank wrote."""

    step: int
    folder: str
    stall_s: float
    waited_s: float
    write_s: float
    bytes: int  # over all ranks
    copy_s: float = 0.0  # to the store
    copy_problem: str = ""  # why it is not there


@dataclass
class Job:
    """What one save hands to the thread: copies that no step changes."""

    state: RunState
    files: dict[str, tuple[dict[str, Tensor], dict[str, str]]]  # of this rank: tensors and metadata by file name
    saved: Saved
    problem: str  # why it must not be saved; else empty


class Saver:
    """Saves a run's checkpoints into ``folder``. Every rank makes one and calls its methods at the same steps, ``failed`` apart."""

    def __init__(
        self, folder: Path, config: CheckpointConfig, world: World, fingerprint: str, told: Callable[[Saved], None] = lambda saved: None
    ):
        """``fingerprint``: of the label order that the rows follow; ``told`` hears of each published checkpoint, on the caller's thread."""
        self.folder, self.config, self.world, self.fingerprint, self.told = folder, config, world, fingerprint, told
        self._own = rows_file(world.shards.rank, world.shards.size)
        self._writes = world.copies.rank == 0  # of replicas of the label rows the first writes them
        self._group = dist.new_group(backend="gloo") if world.size > 1 else None
        self._host: dict[str, Tensor] = {}
        self._thread: threading.Thread | None = None
        self._done: Saved | None = None
        self._error: BaseException | None = None
        self._store = CheckpointStore(config.store) if config.store else None
        self.not_copied = ""  # why the last checkpoint is not in the store; the same on all ranks

    def reserve(self, classifier: Classifier) -> None:
        """Takes the host memory that saves need, as much as ``classifier.bytes()``: page-locked memory takes its time."""
        if self._writes:
            for name, (tensor, _) in classifier.tensors().items():
                self._host_copy(name, tensor)

    def save(self, state: RunState, engine: EncoderEngine, classifier: Classifier) -> None:
        """Starts to write ``folder``/step-N and returns once all is copied; waits first if the save before it still runs.

        Raises CheckpointError, on every rank, if that one failed; the earlier checkpoints stay as they are.
        """
        began = time.perf_counter()
        self.wait()
        ready = time.perf_counter()
        weights, moments = engine.state()
        lost = _find_not_finite({**weights, **{name: tensor for name, (tensor, _) in classifier.tensors().items()}})
        problem = f"{lost} is not finite at step {state.step}; {ADVICE}" if lost else ""
        files = {self._own: self._copy_rows(classifier)} if self._writes else {}
        if self.world.is_first:
            files |= {ENCODER: (weights, {}), OPTIMIZER: (moments, {})}
            if classifier.kept:  # a few MB, the same on all ranks
                files[KEPT] = (_name_kept(classifier), {})
        if self.world.device.type == "cuda":
            torch.cuda.current_stream(self.world.device).synchronize()
        times = Saved(state.step, folder_name(state.step), time.perf_counter() - ready, ready - began, 0.0, 0)
        job = Job(dataclasses.replace(state), files, times, problem)
        # A daemon: a process that ends by an error must not wait for ranks that are gone.
        self._thread = threading.Thread(target=self._run, args=(job,), name="checkpoint", daemon=True)
        self._thread.start()

    def _copy_rows(self, classifier: Classifier) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What the file of this rank's label rows holds: tensors on their way to the host, and where each begins."""
        rows, starts = {}, {}
        for name, (tensor, start) in classifier.tensors().items():
            rows[name] = self._host_copy(name, tensor)
            rows[name].copy_(tensor, non_blocking=True)
            starts[name] = str(start)
        return rows, starts

    def failed(self) -> bool:
        """Whether a save has failed so far; does not wait. Tells of one that is complete by now."""
        if self._thread is not None and not self._thread.is_alive():
            self._collect()
        return self._error is not None

    def wait(self) -> None:
        """Until the last save is complete. Raises CheckpointError, on every rank, if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._collect()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.wait()
        elif self._thread is not None and isinstance(error, Exception):
            self._thread.join(LEAVE_SECONDS)  # what was copied before the error is worth finishing
        self._host.clear()

    def _collect(self) -> None:
        self._thread, done, self._done = None, self._done, None
        if done is not None:
            self.told(done)

    def _host_copy(self, name: str, tensor: Tensor) -> Tensor:
        """The memory that ``tensor`` is copied to, the same at each save."""
        found = self._host.get(name)
        if found is None or found.shape != tensor.shape or found.dtype != tensor.dtype:
            pinned = tensor.device.type == "cuda"
            found = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
            if not pinned:
                found.fill_(0)  # so that the system hands the memory out now, not during a save
            self._host[name] = found
        return found

    def _run(self, job: Job) -> None:
        try:
            self._done = self._write(job)
        except BaseException as error:  # raised again by wait()
            self._error = error

    def _write(self, job: Job) -> Saved:
        """The thread's work. Raises CheckpointError, the same on every rank."""
        final = self.folder / job.saved.folder
        partial = self.folder / f".partial-{job.saved.step:08d}"
        began = time.perf_counter()
        self._agree({"problem": job.problem or (_attempt(lambda: _fresh(partial), final) if self.world.is_first else "")}, partial)
        records: dict[str, FileRecord] = {}

        def write_files() -> None:
            partial.mkdir(exist_ok=True)  # a network file system may show the first rank's folder late
            for name, (tensors, metadata) in job.files.items():
                records[name] = write_tensors(partial / name, tensors, metadata)

        problem = _attempt(write_files, final)
        wrote = time.perf_counter() - began
        own = dataclasses.asdict(records[self._own]) if self._own in records else {}
        pages = self._agree({"problem": problem, "file": self._own, "record": own}, partial)
        problem = ""
        files = {page["file"]: page["record"] for page in pages if page["record"]}
        if self.world.is_first:
            files |= {name: dataclasses.asdict(record) for name, record in records.items()}
            problem = _attempt(lambda: self._publish(job.state, files, partial, final), final)
        self._agree({"problem": problem}, partial)
        total = sum(record["bytes"] for record in files.values())
        began = time.perf_counter()
        self.not_copied = self._copy(final, list(records), job.state)
        return dataclasses.replace(job.saved, write_s=wrote, bytes=total, copy_s=time.perf_counter() - began, copy_problem=self.not_copied)

    def _copy(self, final: Path, names: list[str], state: RunState) -> str:
        """Copies a published checkpoint to the store; what kept it from that, on any rank."""
        store = self._store
        if store is None:
            return ""

        def publish() -> None:
            if self.world.is_first:
                store.publish(final, retained({*store.steps(), state.step}, state.best_step, self.config))

        for work in (lambda: store.upload(final, names), publish):
            problems = [page["problem"] for page in self._exchange({"problem": _attempt(work, final)}) if page["problem"]]
            if problems:
                return problems[0]
        return ""

    def _publish(self, state: RunState, files: dict[str, Any], partial: Path, final: Path) -> None:
        page = {
            "schema_version": SCHEMA_VERSION,
            "label_order": self.fingerprint,
            "state": dataclasses.asdict(state),
            "files": dict(sorted(files.items())),
        }
        with (partial / PAGE).open("wb") as file:
            file.write(seal(page))
            file.flush()
            os.fsync(file.fileno())
        sync_folder(partial)
        if final.exists():  # a resumed run that saves the step it began at
            aside = final.with_name(f"{REPLACED}{final.name}")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(final, aside)
        os.replace(partial, final)
        put_back(self.folder)
        sync_folder(self.folder)
        point(self.folder, "last", state.step)
        if (self.folder / folder_name(state.best_step)).is_dir():  # also an earlier one: a process may have been killed at this line
            point(self.folder, "best", state.best_step)
        prune(self.folder, state.best_step, self.config)

    def _agree(self, page: dict[str, Any], partial: Path | None = None) -> list[dict[str, Any]]:
        """The pages of all ranks. Raises CheckpointError if one tells of a problem; the first rank then removes ``partial``."""
        pages = self._exchange(page)
        problems = [one["problem"] for one in pages if one["problem"]]
        if problems:
            if self.world.is_first and partial is not None:
                shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(f"could not save a checkpoint: {problems[0]}; mend that and resume from the one before it")
        return pages

    def _exchange(self, page: dict[str, Any]) -> list[dict[str, Any]]:
        """The pages of all ranks. Raises LostRankError where one is gone; what it was saving is pruned later."""
        try:
            return exchange(page, self.world, self._group)
        except RuntimeError as error:
            raise LostRankError(f"could not save a checkpoint: the ranks lost each other ({str(error).splitlines()[0][:200]})") from None


def retained(steps: Iterable[int], best: int, config: CheckpointConfig) -> set[int]:
    """Which of the checkpoints of ``steps`` stay: the newest ``keep``, the best, and every multiple of ``keep_every``. Pure."""
    ordered = sorted(steps)
    kept = set(ordered[-config.keep :]) | ({best} & set(ordered))
    if config.keep_every:
        kept |= {step for step in ordered if step % config.keep_every == 0}
    return kept


def prune(folder: Path, best: int, config: CheckpointConfig) -> None:
    """Deletes the checkpoints that are not retained, and what interrupted saves left."""
    kept = retained((step_of(path) for path in complete(folder)), best, config)
    for path in folder.glob("step-*"):
        if STEP_NAME.fullmatch(path.name) and step_of(path) not in kept:
            # Renamed first: a folder half deleted must not pass for a checkpoint.
            gone = path.with_name(f".partial-old-{path.name}")
            with suppress(OSError):
                os.replace(path, gone)
    for path in folder.glob(".partial-*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(".*.part"):  # of last.json or best.json, by a process that was killed
        path.unlink(missing_ok=True)


def sync_folder(path: Path) -> None:
    """Waits until the names in a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems cannot sync a folder
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)


def _attempt(work: Callable[[], None], final: Path) -> str:
    """What kept ``work`` from being done, or nothing."""
    try:
        work()
    except OSError as error:
        return f"{final}: {error.strerror or error}"
    except DataError as error:  # names the place itself
        return str(error)[:500]
    return ""


def _find_not_finite(tensors: dict[str, Tensor]) -> str:
    """The name of a tensor that holds NaN or an infinity; nothing where none does. Waits for the device once."""
    named = [(name, tensor) for name, tensor in tensors.items() if tensor.is_floating_point() and tensor.numel()]
    for device in {tensor.device for _, tensor in named}:
        here = [(name, tensor) for name, tensor in named if tensor.device == device]
        sound = torch.stack([_all_finite(tensor) for _, tensor in here]).tolist()
        for (name, _), is_sound in zip(here, sound, strict=True):
            if not is_sound:
                return name
    return ""


def _all_finite(tensor: Tensor) -> Tensor:
    """A boolean on the tensor's device, which is not waited for."""
    if tensor.dtype == STORED["float8"]:  # torch has no minimum of it; without its sign NaN is the largest code, 127
        codes = tensor.view(torch.uint8).flatten().split(PIECE)
        return torch.stack([(code & 127).amax() for code in codes]).amax() < 127
    return torch.stack(tensor.aminmax()).isfinite().all()


def _name_kept(classifier: Classifier) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for i, (x_ND, label_rows_NM) in enumerate(classifier.kept):
        named |= {f"{i}.x": x_ND.cpu().contiguous(), f"{i}.label_rows": label_rows_NM.cpu().contiguous()}
    return named
