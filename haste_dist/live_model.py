"""A model that changes under its users: a newer checkpoint takes over between two batches.

The new model is loaded beside the old one, which answers meanwhile; then one assignment makes it the current one. A batch keeps the
model that it began with, so no request sees half of each. Labels may be shared by several processes (``part`` of ``parts``): what a
process does not hold it asks the others for, by the version that the batch began with.
"""

import itertools
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from haste_dist import checkpoint
from haste_dist.classifier import Classifier
from haste_dist.errors import HasteError
from haste_dist.export import is_export
from haste_dist.manifest import first_line
from haste_dist.predictor import EXPORTED, Embedder, ModelFiles
from haste_kernels.encoder_ops import TILES
from haste_kernels.topk import merge_topk

Found = tuple[NDArray[np.float32], NDArray[np.int64]]
"""Scores (n, k), best first, and global rows (n, k); -inf and -1 where there are fewer."""


class LabelPart:
    """One process's share of the labels, of the versions in use."""

    def __init__(self, folder: str | Path, part: int, parts: int, device: str = "auto"):
        self.folder, self.part, self.parts, self.device = Path(folder), part, parts, device
        self._held: dict[str, Classifier] = {}

    def warm(self, name: str, most: int) -> None:
        """Loads the version that ``name`` means now, and compiles for up to ``most`` texts at once: before requests. Raises HasteError."""
        version = wanted(self.folder, name)
        self.hold([version])
        compile_kernels(self._held[version], torch.float32, most)

    def hold(self, versions: Sequence[str]) -> None:
        """Loads those of ``versions`` (checkpoint names) that are not there, and lets go of all others. Raises HasteError."""
        for version in versions:
            if version not in self._held:
                self._held[version] = ModelFiles(self.folder, version).labels(self.device, self.part, self.parts)
        for version in set(self._held) - set(versions):
            del self._held[version]

    @torch.no_grad()
    def topk(self, version: str, x_ND: NDArray[np.float32], k: int) -> Found:
        """The best of this share. A process that was started anew may have to load ``version`` first. Raises HasteError."""
        if version not in self._held:
            self.hold([*self._held, version])
        classifier = self._held[version]
        scores, rows = classifier.topk(torch.from_numpy(x_ND).to(classifier.device), k)
        return scores.float().cpu().numpy(), rows.cpu().numpy()


@dataclass
class Current:
    """A model that answers."""

    files: ModelFiles
    embedder: Embedder
    labels: Classifier

    @property
    def step(self) -> int:
        return checkpoint.step_of(self.files.checkpoint) if self.files.checkpoint else 0


class LiveModel:
    """The first of ``parts`` processes: it has the encoder and its share of the labels."""

    def __init__(self, folder: str | Path, name: str = "best", device: str = "auto", parts: int = 1):
        """``name``: best, last (both may move) or one checkpoint. Raises HasteError."""
        self.folder, self.name, self.device, self.parts = Path(folder), name, device, parts
        self.reloads, self.reload_error = 0, ""
        self.current = self.load(wanted(self.folder, name))

    def warm(self, most: int) -> None:
        """Compiles for texts of any length, and up to ``most`` at once: before requests."""
        model = self.current
        lengths = text_lengths(model.files.config.data.max_length) if model.labels.device.type == "cuda" else [1]
        for tokens in lengths:
            x_ND = model.embedder.embed(pa.array([[model.embedder.pad_id] * tokens], pa.list_(pa.int32())))
        compile_kernels(model.labels, x_ND.dtype, most)

    def load(self, version: str) -> Current:
        """Reads it beside the current one. Raises HasteError."""
        files = ModelFiles(self.folder, version)
        loaded = Current(files, files.embedder(self.device), files.labels(self.device, 0, self.parts))
        files.names, files.calibration  # noqa: B018  read now, not in a request
        self.topk(loaded, self.embed(loaded, ["first"]), asked_for(1))  # what cannot run does not take over
        return loaded

    async def follow(self, run: Callable[..., Awaitable[Any]], hold: Callable[[list[str]], Awaitable[Any]]) -> bool:
        """Makes the version that is wanted now the current one; true if it was another. ``run(f, *args)`` runs f in a thread; ``hold``
        tells the other processes what to have. Whatever goes wrong is kept in ``reload_error``, the current one stays, and the next call
        tries again: a GPU may have no memory for two models, a process that shares the labels may have died."""
        old = self.current.files.version
        try:
            version = await run(wanted, self.folder, self.name)
            if version == old:
                self.reload_error = ""
                return False
            loaded = await run(self.load, version)
            await hold([old, version])
        except Exception as error:  # such as a checkpoint that training has removed meanwhile
            self.reload_error = told(error, f"{self.folder}: no newer checkpoint could take over")
            return False
        self.current, self.reload_error = loaded, ""
        self.reloads += 1
        return True

    @torch.no_grad()
    def embed(self, model: Current, texts: Sequence[str]) -> torch.Tensor:
        """(n, D) embeddings."""
        return model.embedder.embed(model.embedder.tokens(texts))

    @torch.no_grad()
    def topk(self, model: Current, x_ND: torch.Tensor, k: int) -> Found:
        """The best of this process's labels."""
        scores, rows = model.labels.topk(x_ND, k)
        return scores.float().cpu().numpy(), rows.cpu().numpy()

    @staticmethod
    def answers(model: Current, found: Found, counts: Sequence[tuple[int, int, int]]) -> list[list[list[dict[str, Any]]]]:
        """What to tell each request: ``counts`` has its texts, its k and its neighbours, in the order of ``found``'s rows."""
        files, order = model.files, model.files.order
        labels, scores = order.label_at(found[1]), files.calibration(found[0])
        names, done, at = files.names.rows(labels), [], 0
        for texts, k, neighbours in counts:
            done.append(
                [
                    [
                        {
                            "label": label,
                            "text": name,
                            "score": score,
                            "group": int(row - order.head_rows) // order.group_size if row >= order.head_rows else None,
                            "neighbours": files.names.of(order.neighbours(label)[:neighbours]) if neighbours else [],
                        }
                        for label, name, score, row in itertools.islice(
                            zip(labels[i].tolist(), names[i], scores[i].tolist(), found[1][i].tolist(), strict=False), k
                        )
                    ]
                    for i in range(at, at + texts)
                ]
            )
            at += texts
        return done


def wanted(folder: Path, name: str) -> str:
    """The version that ``name`` (best, last or one checkpoint) means now. Raises CheckpointError."""
    return EXPORTED if is_export(folder) else checkpoint.resolve(folder / checkpoint.CHECKPOINTS, name).name


def told(error: Exception, what: str) -> str:
    """In one line: a HasteError says it all; of others the type says most, and ``what`` says what they kept from being done."""
    inner = getattr(error, "cause", None)  # what another process raised, out of Ray's wrapping
    raised = inner if isinstance(inner, Exception) else error
    if isinstance(raised, HasteError):
        return str(raised)
    return f"{what} ({type(raised).__name__}: {first_line(raised)}); the model that answers stays, and this is tried again"


def asked_for(k: int) -> int:
    """How many labels to look for where ``k`` are wanted: one of few numbers, since GPU kernels are compiled for each."""
    return max(8, 1 << (k - 1).bit_length())


def batch_sizes(most: int) -> list[int]:
    """Numbers of texts, of which each number up to ``most`` has one that takes the same compiled kernels: those of its power of two,
    for sizes that 16 divides or not, and for 1. Largest first."""
    top = 1 << (most - 1).bit_length()
    powers = {1 << i for i in range(top.bit_length())}
    return sorted(powers | {power - 1 for power in powers if power > 16}, reverse=True)


def text_lengths(longest: int) -> list[int]:
    """Tokens of texts, of which each text of up to ``longest`` has one that takes the same compiled kernels of the encoder."""
    return sorted({longest, *itertools.takewhile(lambda tokens: tokens < longest, TILES)})


@torch.no_grad()
def compile_kernels(labels: Classifier, dtype: torch.dtype, most: int) -> None:
    """Compiles what answers up to ``most`` texts at once with few labels each, so that no request waits for it (seconds on a GPU)."""
    if labels.device.type == "cuda":
        for n in batch_sizes(most):
            labels.topk(torch.zeros(n, labels.width, dtype=dtype, device=labels.device), asked_for(1))


def merged(found: Sequence[Found], k: int) -> Found:
    """The ``k`` best of what several processes found; of equal ones the lower row."""
    if len(found) == 1:
        return found[0]
    scores, rows = (torch.from_numpy(np.concatenate([one[i] for one in found], axis=1)) for i in (0, 1))
    best, at = merge_topk(scores, rows, k)
    return best.numpy(), at.numpy()
