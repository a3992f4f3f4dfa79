"""What watches the numbers of a run: tensors that are not finite, losses that jump, groups of labels that have died.

No step waits for the device. The largest magnitude of each watched tensor is computed there and read a step or a few later, when its copy
has arrived; NaN and infinity survive a maximum. A rank that finds one asks all ranks to stop, and they raise the same error together,
before anything of that state is saved. Logits are never kept, but none can be wrong unseen: their gradient is, and dx with it.

``train.skip_batches`` passes over a batch instead, where that is exact: if its embeddings are not finite, nothing has been updated by
it yet, and the ranks, which have all of them, see the same; replicas of the labels ask each other. The host must wait for them. What
turns bad later has changed the output layer.

Letters: B padded rows of this rank, N rows of the global batch, D width, T tail groups of this rank.
"""

import math
import statistics
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from haste_dist.agreement import exchange
from haste_dist.classifier import Classifier
from haste_dist.collectives import sum_over_ranks
from haste_dist.errors import DataError, HasteError
from haste_dist.loader import Batch
from haste_dist.tensor_file import write_tensors
from haste_dist.world import World

FOLDER = "bad-batches"
LATE = 4  # steps after which a value is waited for
SHOWN = 8  # ids of texts in the error
SPIKE, HISTORY, FEWEST = 2.0, 32, 8
DEAD = 0.01
GROUPS_AT_ONCE = 2**15
ADVICE = "resume with lower encoder.lr or output.lr"


@dataclass
class Look:
    """The largest magnitudes of one step's tensors, on their way to the host."""

    step: int
    batch: Batch
    names: list[str]
    largest: Tensor
    arrived: torch.cuda.Event | None


class Guard:
    """Watches the tensors of each step of this rank."""

    def __init__(self, run: Path, world: World, allowed: int = 0, skipped: int = 0):
        """``allowed``: batches that may be passed over, of which ``skipped`` were."""
        self.run, self.world, self.allowed, self.skipped = run, world, allowed, skipped
        self.skipped_steps: deque[int] = deque(maxlen=1024)
        self._looks: deque[Look] = deque()
        self._batches: deque[tuple[int, Batch]] = deque(maxlen=LATE + 2)
        self._found: dict[str, object] = {}

    def watch(self, step: int, batch: Batch, **tensors: Tensor) -> None:
        """Looks at ``tensors`` of a step without waiting, and reads what earlier looks found."""
        tensors = {name: t for name, t in tensors.items() if t.numel()}  # a replica without rows has no gradient to them
        largest = torch.stack([torch.linalg.vector_norm(t.detach(), ord=math.inf).float() for t in tensors.values()])
        arrived = None
        if largest.device.type == "cuda":
            largest = torch.empty(largest.shape, pin_memory=True).copy_(largest, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self._looks.append(Look(step, batch, list(tensors), largest, arrived))
        self._batches.append((step, batch))
        while len(self._looks) > 1 and (len(self._looks) > LATE or _is_there(self._looks[0])):
            self._read()

    def skips(self, step: int, batch: Batch, x_ND: Tensor) -> bool:
        """Whether the batch of ``step`` is passed over; then it is kept. The same on each rank. Waits for the device if any may be."""
        if self.skipped >= self.allowed:
            return False
        if not bool(sum_over_ranks((~x_ND.isfinite().all()).int(), self.world.copies)):
            return False
        self._batches.append((step, batch))
        self._keep(step)
        self.skipped += 1
        self.skipped_steps.append(step)
        return True

    def skipped_since(self, step: int) -> int:
        """How many batches after ``step`` were passed over."""
        return sum(one > step for one in self.skipped_steps)

    def tripped(self) -> bool:
        """Whether this rank has found a tensor that is not finite."""
        return bool(self._found)

    def settle(self, known: str = "") -> None:
        """Reads every look, and raises HasteError on all ranks if one of them found something, or if ``known`` says what is wrong.

        Every rank calls it, before a state is saved; waits for the device. Each rank writes its part of the batch that was the first.
        """
        while self._looks:
            self._read()
        pages = [{**page, "rank": rank} for rank, page in enumerate(exchange(self._found, self.world)) if page]
        if not pages and not known:
            return
        step = min((page["step"] for page in pages), default=self._batches[-1][0] if self._batches else 0)
        first = [page for page in pages if page["step"] == step]
        seen = ", ".join(f"{page['tensor']} ({page['value']}) on rank {page['rank']}" for page in first[:4])
        known = known or f"a number was not finite at step {step}"
        where = f"; first seen at step {step} in {seen}" if seen else ""
        raise HasteError(f"{known}{where}; {self._keep(step)}{ADVICE}")

    def _read(self) -> None:
        look = self._looks.popleft()
        if look.arrived is not None:
            look.arrived.synchronize()
        for name, value in zip(look.names, look.largest.tolist(), strict=True):
            if not math.isfinite(value) and not self._found:
                self._found = {"step": look.step, "tensor": name, "value": str(value)}

    def _keep(self, step: int) -> str:
        """Writes this rank's part of the batch of ``step``, where it is still known; says where, and which texts they are."""
        batch = dict(self._batches).get(step)
        if batch is None:
            return ""
        texts = ", ".join(str(i) for i in batch.texts[:SHOWN]) + (", ..." if len(batch.texts) > SHOWN else "")
        path = self.run / FOLDER / f"step-{step:08d}-rank-{self.world.rank:05d}.safetensors"
        try:
            save_batch(path, batch, step)
        except OSError as error:
            return f"its texts are {texts} on this rank (not saved: {error.strerror or error}); "
        return f"its texts (positions {texts} on this rank) are in {path.parent}; "


def save_batch(path: Path, batch: Batch, step: int) -> None:
    """Writes one rank's part of a batch. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        "input_ids": batch.input_ids.contiguous(),
        "attention_mask": batch.attention_mask.contiguous(),
        "label_rows": batch.label_rows.contiguous(),
        "texts": torch.from_numpy(batch.texts.astype("int64")),
    }
    write_tensors(path, tensors, {"step": str(step), "rows": str(batch.rows)})


def load_batch(path: Path) -> Batch:
    """What ``save_batch`` wrote, to step a model on it again. Raises DataError."""
    try:
        tensors = load_file(path)
        with safe_open(path, framework="pt") as file:
            rows = int(file.metadata()["rows"])
        return Batch(tensors["input_ids"], tensors["attention_mask"], tensors["label_rows"], tensors["texts"].numpy(), rows)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: no saved batch ({error})") from None


class LossSpikes:
    """Counts logged losses above twice the median of the last ones, since this process began."""

    def __init__(self) -> None:
        self._last: deque[float] = deque(maxlen=HISTORY)
        self.count = 0

    def add(self, loss: float) -> int:
        """Takes a loss and returns the count."""
        if len(self._last) >= FEWEST and loss > SPIKE * statistics.median(self._last):
            self.count += 1
        self._last.append(loss)
        return self.count


@torch.no_grad()
def dead_groups(classifier: Classifier, world: World) -> int:
    """Tail groups, over all ranks, whose mean |w| is under a hundredth of the tail's: what they answer hardly depends on the text."""
    weight_TGF = classifier.tail.weight
    parts = [weight_TGF[at : at + GROUPS_AT_ONCE].float().abs().mean(dim=(1, 2)) for at in range(0, len(weight_TGF), GROUPS_AT_ONCE)]
    mean_T = torch.cat(parts) if parts else weight_TGF.new_zeros(0, dtype=torch.float32)
    total = sum_over_ranks(torch.stack([mean_T.double().sum(), mean_T.new_tensor(len(mean_T)).double()]), world.shards)
    return int(sum_over_ranks((mean_T < DEAD * total[0] / total[1].clamp(min=1)).sum().reshape(1), world.shards))


def _is_there(look: Look) -> bool:
    return look.arrived is None or look.arrived.query()
