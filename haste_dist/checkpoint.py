"""What a checkpoint is, and how any number of ranks reads one, without pickle. ``saver`` writes them.

checkpoints/
  step-00001200/              complete if it is there: it is written under another name and renamed
    state.json                where the run stands, size and sha256 of every other file, and a checksum of itself
    encoder.safetensors       float32 weights by name, whole
    optimizer.safetensors     AdamW moments by weight name, whole
    output-00000-of-00002.safetensors   the label rows of one rank; metadata: the global position of each tensor
    kept.safetensors          batches kept for the next rewiring, where there are some (rewire.grow=gradient)
  last.json, best.json        {"step": 1200}, with a checksum
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from haste_dist.classifier import Classifier
from haste_dist.engine import EncoderEngine
from haste_dist.errors import CheckpointError, HasteError
from haste_dist.manifest import atomic_file
from haste_dist.sealed import check_file, seal, unseal

SCHEMA_VERSION = 2
CHECKPOINTS = "checkpoints"  # in a run folder
PAGE, ENCODER, OPTIMIZER, KEPT = "state.json", "encoder.safetensors", "optimizer.safetensors", "kept.safetensors"
STEP_NAME = re.compile(r"step-\d{8,}")
REPLACED = ".replaced-"  # before the name of a complete checkpoint while another of its step takes its place
PIECE = 2**28  # bytes of rows read at once
MEND = "delete the folder to use an earlier checkpoint"
OTHER = "set output.* as the run's config.yaml has it, or name another run.folder"


@dataclass
class RunState:
    """Where a run stands: all that the loop itself must know to go on."""

    step: int = 0
    best: float = -1.0  # of the metric that picks the best checkpoint
    best_step: int = -1
    worse: int = 0  # evaluations since the best one
    skipped: int = 0  # batches that were passed over


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def rows_file(rank: int, ranks: int) -> str:
    return f"output-{rank:05d}-of-{ranks:05d}.safetensors"


def load(checkpoint: Path, engine: EncoderEngine | None, classifier: Classifier, fingerprint: str) -> RunState:
    """Reads what ``Saver`` wrote into ``engine`` and ``classifier``, at any number of ranks; nothing is used before its checksum is right.

    Of the label rows a rank reads, and checks, only the files that hold its own. Raises CheckpointError.
    """
    page = page_of(checkpoint, fingerprint)
    verify_files(checkpoint, page, (name for name in page["files"] if not name.startswith("output")))
    with _told(checkpoint, page):
        if engine is not None:
            engine.load_state(load_file(checkpoint / ENCODER), load_file(checkpoint / OPTIMIZER))
        load_rows(checkpoint, page, classifier)
        _load_kept(checkpoint, page, classifier)
        return RunState(**page["state"])


def load_encoder(checkpoint: Path, engine: EncoderEngine, fingerprint: str) -> None:
    """The encoder alone, for prediction: of all files only its own is read. Raises CheckpointError."""
    page = page_of(checkpoint, fingerprint)
    verify_files(checkpoint, page, [ENCODER])
    with _told(checkpoint, page):
        engine.load_state(load_file(checkpoint / ENCODER), {})


def load_labels(checkpoint: Path, classifier: Classifier, fingerprint: str, verified: bool = False) -> None:
    """The label rows of ``classifier``'s shard alone, for prediction: it may have no momentum. Raises CheckpointError.

    ``verified``: the caller, who loads shard after shard, has held the files against their checksums.
    """
    page = page_of(checkpoint, fingerprint)
    with _told(checkpoint, page):
        load_rows(checkpoint, page, classifier, momentum=False, verified=verified)


def page_of(checkpoint: Path, fingerprint: str) -> dict:
    """The state.json of a checkpoint of that label order. Raises CheckpointError."""
    page = read_page(checkpoint)
    if page["label_order"] != fingerprint:
        raise CheckpointError(
            f"{checkpoint}: belongs to another label order than the prepared folder's; use the data it was trained with (data.prepared), "
            "or another run.folder"
        )
    return page


@contextmanager
def _told(checkpoint: Path, page: dict) -> Iterator[None]:
    """What goes wrong inside is a CheckpointError, which names a damaged file where there is one."""
    try:
        yield
    except CheckpointError:
        verify_files(checkpoint, page)  # what does not fit may be a damaged file that this rank would not have needed
        raise
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        verify_files(checkpoint, page)
        raise CheckpointError(f"{checkpoint}: cannot be read ({error}); {MEND}") from None


def read_page(checkpoint: Path) -> dict:
    """A checkpoint's state.json. Raises CheckpointError if it is missing, damaged or of another version.

    Version 1 had no checksum of itself and no sizes; it is read as it is, and the next save writes the current version.
    """
    path = checkpoint / PAGE
    try:
        data = path.read_bytes()
        page = json.loads(data)
        version = page["schema_version"]
        if version == 1 and "checksum" not in page:
            page["files"] = {name: {"bytes": (checkpoint / name).stat().st_size, "sha256": value} for name, value in page["files"].items()}
        elif version == SCHEMA_VERSION:
            page = unseal(data)
        if not {"label_order", "state", "files"} <= set(page):
            raise KeyError("label_order, state or files")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{checkpoint}: not a readable checkpoint ({PAGE}: {error}); {MEND}") from None
    if version not in (1, SCHEMA_VERSION):
        raise CheckpointError(f"{path}: schema version {version}, this program reads 1 to {SCHEMA_VERSION}; update haste_dist, or {MEND}")
    return page


def verify_files(checkpoint: Path, page: dict, names: Iterable[str] | None = None) -> None:
    """Compares files (default: all) with their sizes and checksums. Raises CheckpointError naming the first that differs."""
    try:
        for name in page["files"] if names is None else names:
            check_file(checkpoint, name, page["files"][name], MEND)
    except HasteError as error:
        raise CheckpointError(str(error)) from None


def put_back(folder: Path) -> None:
    """What ``Saver`` had set aside to save the same step again, where it was killed before it had. Raises OSError."""
    for path in folder.glob(f"{REPLACED}*"):
        final = folder / path.name.removeprefix(REPLACED)
        if final.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.replace(path, final)


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints in ``folder``, fewest steps first."""
    found = (path for path in folder.glob("step-*") if STEP_NAME.fullmatch(path.name) and (path / PAGE).is_file())
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def newest(folder: Path) -> Path | None:
    """The complete checkpoint with the most steps, or None."""
    return next(reversed(complete(folder)), None)


def point(folder: Path, name: str, step: int) -> None:
    """Makes ``name`` (best or last) mean the checkpoint of ``step``. Raises OSError."""
    with atomic_file(folder / f"{name}.json") as file:
        file.write(seal({"step": step}))


def pointed(folder: Path, name: str) -> Path:
    """The checkpoint that ``name`` (best or last) means. Raises CheckpointError."""
    path = folder / f"{name}.json"
    try:
        data = path.read_bytes()
        step = int((unseal(data) if b"checksum" in data else _unsealed_pointer(data))["step"])
    except FileNotFoundError as error:
        others = [p.name for p in complete(folder)] if name == "best" else []
        what = f"not evaluated yet, so none is the best; name one with --checkpoint: {', '.join(['last', *others])}"
        what = what if others else "train the run first"
        raise CheckpointError(f"{path}: no usable checkpoint ({error.strerror}); {what}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        names = ", ".join(p.name for p in complete(folder)) or "none"
        raise CheckpointError(f"{path}: no usable checkpoint ({error}); name one with --checkpoint: {names}") from None
    checkpoint = folder / folder_name(step)
    if not checkpoint.is_dir():
        raise CheckpointError(f"{checkpoint}: missing, though {name}.json names it")
    return checkpoint


def resolve(folder: Path, name: str) -> Path:
    """``best``, ``last`` or a folder name such as step-00001200. Raises CheckpointError."""
    if name in ("best", "last"):
        return pointed(folder, name)
    found = complete(folder)
    if name not in [path.name for path in found]:  # so that no name leads out of the folder
        raise CheckpointError(f"{folder / name}: no such checkpoint; there are: {', '.join(p.name for p in found) or 'none'}")
    return folder / name


def load_rows(checkpoint: Path, page: dict, classifier: Classifier, momentum: bool = True, verified: bool = False) -> None:
    """Fills each tensor of this rank's shard from whichever files hold its rows. Raises CheckpointError, SafetensorError.

    ``momentum=False``: what the files hold of it is passed over.
    """
    wanted = classifier.tensors()
    filled = dict.fromkeys(wanted, 0)
    for path in (checkpoint / name for name in page["files"] if name.startswith("output")):
        if not path.is_file():
            raise CheckpointError(f"{path}: missing; {MEND}")
        with safe_open(path, framework="pt") as file:
            starts = {name: start for name, start in (file.metadata() or {}).items() if momentum or "momentum" not in name}
            if set(starts) != set(wanted):
                raise CheckpointError(f"{path}: holds {sorted(starts)}, this configuration needs {sorted(wanted)}; {OTHER}")
            spans = {name: _overlap(tensor.shape[0], start, file, name, int(starts[name])) for name, (tensor, start) in wanted.items()}
            if not verified and any(low < high for low, high in spans.values()):
                verify_files(checkpoint, page, [path.name])
            for name, (tensor, start) in wanted.items():
                source = file.get_slice(name)
                if tuple(source.get_shape()[1:]) != tuple(tensor.shape[1:]):
                    raise CheckpointError(
                        f"{path}: {name} has rows of shape {source.get_shape()[1:]}, this configuration needs "
                        f"{list(tensor.shape[1:])}; {OTHER}"
                    )
                (low, high), offset = spans[name], int(starts[name])
                rows = max(1, PIECE // max(1, tensor[:1].nbytes))
                for at in range(low, high, rows):
                    end = min(at + rows, high)
                    tensor[at - start : end - start] = source[at - offset : end - offset].to(tensor.device, tensor.dtype)
                    filled[name] += end - at
    for name, (tensor, _) in wanted.items():
        if filled[name] != tensor.shape[0]:
            raise CheckpointError(f"{checkpoint}: holds {filled[name]} of the {tensor.shape[0]} rows of {name} that are needed here")


def _overlap(rows: int, start: int, file: safe_open, name: str, offset: int) -> tuple[int, int]:
    """The global positions [low, high) of a tensor that both this rank and ``file`` hold."""
    return max(start, offset), min(start + rows, offset + file.get_slice(name).get_shape()[0])


def _load_kept(checkpoint: Path, page: dict, classifier: Classifier) -> None:
    """The batches kept for the next rewiring; none in most checkpoints."""
    device = classifier.device
    found = load_file(checkpoint / KEPT) if KEPT in page["files"] else {}
    classifier.kept = [(found[f"{i}.x"].to(device), found[f"{i}.label_rows"].to(device)) for i in range(len(found) // 2)]


def _unsealed_pointer(data: bytes) -> dict:
    """A pointer that version 1 wrote, without a checksum: exactly {"step": n}, so that few changes of a sealed one look like it."""
    match = re.fullmatch(rb'\{\s*"step": (\d+)\s*\}\s*', data)
    if match is None:
        raise ValueError("damaged")
    return {"step": match[1]}
