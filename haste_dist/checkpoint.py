"""Checkpoints that any number of ranks can read, published in one step, without pickle.

checkpoints/
  step-00001200/              complete if it is there: it is written under another name and renamed
    state.json                where the run stands, and the sha256 of every other file
    encoder.safetensors       float32 weights by name, whole
    optimizer.safetensors     AdamW moments by weight name, whole
    output-00000-of-00002.safetensors   the label rows of one rank; metadata: the global position of each tensor
    kept.safetensors          batches kept for the next rewiring, where there are some (rewire.grow=gradient)
  last.json, best.json        {"step": 1200}
"""

import dataclasses
import hashlib
import json
import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from haste_dist.classifier import Classifier
from haste_dist.collectives import barrier
from haste_dist.engine import EncoderEngine
from haste_dist.errors import CheckpointError
from haste_dist.world import World

SCHEMA_VERSION = 1
CHUNK = 2**24
KEPT = "kept.safetensors"


@dataclass
class RunState:
    """Where a run stands: all that the loop itself must know to go on."""

    step: int = 0
    best: float = -1.0  # of the metric that picks the best checkpoint
    best_step: int = -1
    worse: int = 0  # evaluations since the best one


def save(folder: Path, state: RunState, engine: EncoderEngine, classifier: Classifier, world: World, fingerprint: str) -> Path:
    """Writes ``folder``/step-N; every rank calls it. ``fingerprint`` names the label order that the rows follow.

    Raises CheckpointError on every rank if any rank could not write or holds a number that is not finite; the earlier checkpoints
    stay as they are.
    """
    final = folder / f"step-{state.step:08d}"
    partial = folder / f".partial-{state.step:08d}"
    weights, moments = engine.state()
    tensors = classifier.tensors()
    lower = f"not finite at step {state.step}; resume with lower encoder.lr or output.lr"
    broken = _find_not_finite({**weights, **{name: tensor for name, (tensor, _) in tensors.items()}})
    _agree(f"{broken} is {lower}" if broken else "", f"a tensor of another rank is {lower}", world)
    if world.is_first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True, exist_ok=True)
    barrier(world)
    problem = ""
    try:
        if world.is_first:
            _write(partial / "encoder.safetensors", weights, {})
            _write(partial / "optimizer.safetensors", moments, {})
            if classifier.kept:  # a few MB, the same on all ranks
                _write(partial / KEPT, _name_kept(classifier), {})
        positions = {name: str(start) for name, (_, start) in tensors.items()}
        name = f"output-{world.rank:05d}-of-{world.size:05d}.safetensors"
        _write(partial / name, {key: tensor.cpu().contiguous() for key, (tensor, _) in tensors.items()}, positions)
    except OSError as error:
        problem = f"{partial}: {error.strerror or error} (rank {world.rank}); free some space and resume"
    try:
        _agree(problem, "another rank failed to write; free some space and resume", world)
    except CheckpointError:
        if world.is_first:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    if world.is_first:
        files = {path.name: _sha256(path) for path in sorted(partial.iterdir())}
        page = {"schema_version": SCHEMA_VERSION, "label_order": fingerprint, "state": dataclasses.asdict(state), "files": files}
        _write_json(partial / "state.json", page)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        _sync(folder)
        point(folder, "last", state.step)
    barrier(world)
    return final


def load(checkpoint: Path, engine: EncoderEngine | None, classifier: Classifier, fingerprint: str, verify: bool = True) -> RunState:
    """Reads what ``save`` wrote into ``engine`` and ``classifier``, at any number of ranks. Raises CheckpointError."""
    page = read_page(checkpoint)
    if page["label_order"] != fingerprint:
        raise CheckpointError(f"{checkpoint}: belongs to another label order than the prepared folder's; use the data it was trained with")
    if verify:
        verify_files(checkpoint, page)
    try:
        if engine is not None:
            engine.load_state(load_file(checkpoint / "encoder.safetensors"), load_file(checkpoint / "optimizer.safetensors"))
        _load_rows(checkpoint, classifier)
        _load_kept(checkpoint, classifier)
        return RunState(**page["state"])
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise CheckpointError(f"{checkpoint}: cannot be read ({error}); delete the folder to use an earlier checkpoint") from None


def read_page(checkpoint: Path) -> dict:
    """A checkpoint's state.json. Raises CheckpointError if it is missing, damaged or of another version."""
    try:
        page = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        version = page["schema_version"]
        if not {"label_order", "state", "files"} <= set(page):
            raise KeyError("label_order, state or files")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{checkpoint}: not a readable checkpoint ({error})") from None
    if version != SCHEMA_VERSION:
        raise CheckpointError(f"{checkpoint}: schema version {version}, this program reads {SCHEMA_VERSION}")
    return page


def verify_files(checkpoint: Path, page: dict) -> None:
    """Compares every file with its checksum. Raises CheckpointError naming the first that differs."""
    for name, expected in page["files"].items():
        path = checkpoint / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing; delete the folder to use an earlier checkpoint")
        if _sha256(path) != expected:
            raise CheckpointError(f"{path}: damaged (its checksum differs); delete the folder to use an earlier checkpoint")


def newest(folder: Path) -> Path | None:
    """The complete checkpoint with the most steps, or None."""
    found = sorted(path for path in folder.glob("step-*") if (path / "state.json").is_file())
    return found[-1] if found else None


def point(folder: Path, name: str, step: int) -> None:
    """Makes ``name`` (best or last) mean the checkpoint of ``step``."""
    partial = folder / f".{name}.json"
    _write_json(partial, {"step": step})
    os.replace(partial, folder / f"{name}.json")


def pointed(folder: Path, name: str) -> Path:
    """The checkpoint that ``name`` (best or last) means. Raises CheckpointError."""
    try:
        step = int(json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}/{name}.json: no usable checkpoint ({error}); train the run first") from None
    path = folder / f"step-{step:08d}"
    if not path.is_dir():
        raise CheckpointError(f"{path}: missing, though {name}.json names it")
    return path


def resolve(folder: Path, name: str) -> Path:
    """``best``, ``last`` or a folder name such as step-00001200. Raises CheckpointError."""
    if name in ("best", "last"):
        return pointed(folder, name)
    if not (folder / name / "state.json").is_file():
        raise CheckpointError(
            f"{folder / name}: no such checkpoint; there are: {', '.join(p.name for p in sorted(folder.glob('step-*'))) or 'none'}"
        )
    return folder / name


def prune(folder: Path, keep: set[int]) -> None:
    """Deletes all checkpoints but those of the steps in ``keep``, and what interrupted saves left."""
    for path in [*folder.glob("step-*"), *folder.glob(".partial-*")]:
        if path.name.startswith(".") or int(path.name.removeprefix("step-")) not in keep:
            shutil.rmtree(path, ignore_errors=True)


def _find_not_finite(tensors: dict[str, Tensor]) -> str:
    """The name of a tensor that holds NaN or an infinity; nothing where none does."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            return name
    return ""


def _agree(problem: str, elsewhere: str, world: World) -> None:
    """Raises CheckpointError on every rank if any rank has a problem; ``elsewhere`` is what the others say."""
    failed = torch.tensor([int(bool(problem))])
    torch.distributed.all_reduce(failed, group=world.control)
    if failed.item():
        raise CheckpointError(f"could not save a checkpoint: {problem or elsewhere}")


def _load_rows(checkpoint: Path, classifier: Classifier) -> None:
    """Fills each tensor of this rank's shard from whichever files hold its rows."""
    wanted = classifier.tensors()
    filled = dict.fromkeys(wanted, 0)
    for path in sorted(checkpoint.glob("output-*.safetensors")):
        with safe_open(path, framework="pt") as file:
            starts = file.metadata()
            if set(starts) != set(wanted):
                raise CheckpointError(f"{path}: holds {sorted(starts)}, this configuration needs {sorted(wanted)}")
            for name, (tensor, start) in wanted.items():
                source = file.get_slice(name)
                offset, shape = int(starts[name]), source.get_shape()
                if tuple(shape[1:]) != tuple(tensor.shape[1:]):
                    raise CheckpointError(
                        f"{path}: {name} has rows of shape {shape[1:]}, this configuration needs {list(tensor.shape[1:])}"
                    )
                low, high = max(start, offset), min(start + tensor.shape[0], offset + shape[0])
                if low < high:
                    tensor[low - start : high - start] = source[low - offset : high - offset].to(tensor.device, tensor.dtype)
                    filled[name] += high - low
    for name, (tensor, _) in wanted.items():
        if filled[name] != tensor.shape[0]:
            raise CheckpointError(f"{checkpoint}: holds {filled[name]} of the {tensor.shape[0]} rows of {name} that are needed here")


def _name_kept(classifier: Classifier) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for i, (x_ND, label_rows_NM) in enumerate(classifier.kept):
        named |= {f"{i}.x": x_ND.cpu().contiguous(), f"{i}.label_rows": label_rows_NM.cpu().contiguous()}
    return named


def _load_kept(checkpoint: Path, classifier: Classifier) -> None:
    """The batches kept for the next rewiring; none in most checkpoints."""
    path, device = checkpoint / KEPT, classifier.device
    found = load_file(path) if path.is_file() else {}
    classifier.kept = [(found[f"{i}.x"].to(device), found[f"{i}.label_rows"].to(device)) for i in range(len(found) // 2)]


def _write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    try:
        save_file(tensors, path, metadata=metadata)
    except SafetensorError as error:  # it wraps the system's error
        raise OSError(str(error)) from None
    _sync(path)


def _write_json(path: Path, page: dict) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(page, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems cannot sync a folder
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()
