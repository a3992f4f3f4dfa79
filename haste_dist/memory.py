"""What one rank holds and when: every tensor of a run counted from the settings, before anything is made.

Held always: the output layer's and the encoder's state. On top of it each phase of a step has its own, and the peak is the largest
phase. Each term says what in the code makes it; tests hold them against runs. Pure but for the encoder, which runs without memory
(dry_run.py). On a GPU the Triton kernels are counted, on a CPU plain torch.

Letters: L labels, W ranks, N texts of the global batch (or of a replica of the labels), B of one rank, A of one pass of its encoder, S
tokens, D width, M most labels of a text, H head rows, T tail groups, G rows a group, F fan-in (H and T of the rank that has most), P
parameters of the encoder, NP = N padded to a tile.
"""

from dataclasses import dataclass

import torch

from haste_dist.classifier import INT16_WIDTH, feature_slice, stored_dtypes
from haste_dist.config import Config
from haste_dist.dry_run import EncoderNeeds, dry_run
from haste_dist.graphs import padded_length
from haste_dist.label_groups import head_size
from haste_dist.reembedding import NUMBERS
from haste_dist.replicas import ELEMENTS
from haste_dist.schedule import pace
from haste_dist.sharding import label_parts, label_shard

GIB = 1 << 30
STEP_PHASES = ("encoder forward", "output layer", "encoder backward", "optimizer")
HALF = 2  # bytes of bfloat16
# Numbers of the kernels, which cannot be imported where Triton is not installed; tests/test_memory.py compares them.
TILE = 64  # most batch rows of a tile
RUN, COPIES_BYTES, SCRATCH_BYTES = 128, 24 << 20, 256 << 20  # triton_dx.py: float16 copies of dx, the deterministic mode
SLABS_BYTES = 39 << 20  # slab_tail.py: dx and the ring of all programs, one a multiprocessor of an H100's or H200's 132
SLABS_WORTH, SLABS_WIDTH = 1 << 23, 784  # its batch rows times groups but in the deterministic mode, its features
HEAD_BYTES, HEAD_ROWS = 64 << 20, 128  # triton_head.py: a chunk's dz, most rows of a tile
TOPK_BYTES, TOPK_SPANS, TOPK_LIST, TOPK_SPAN = 128 << 20, 4096, 16, 256  # triton_topk.py: block maxima of a chunk
ROUNDING = 22  # update.py and rounding.py: of each weight, where it is rounded at random by plain torch
PLAIN_BYTES = {"cuda": 1 << 30, "cpu": 8 << 20}  # chunks.py: a chunk of plain torch
# Not counted: the CUDA context, NCCL's buffers, gaps between blocks of the allocator. This much is kept free for them.
RESERVE_GIB, RESERVE_SHARE = 1.0, 0.03


@dataclass(frozen=True)
class Facts:
    """What a run's memory depends on beside its settings."""

    labels: int  # L
    most_labels: int  # M
    vocabulary: int
    pad_id: int = 0
    ranks: int = 1  # W
    device: str = "cuda"
    varied: bool = False  # texts are of many lengths, so that there are short batches, too
    one_shape: bool = False  # every batch has the same rows and tokens


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by what holds them: ``held`` always, ``phases`` on top of that."""

    held: dict[str, int]
    phases: dict[str, dict[str, int]]
    encoder: EncoderNeeds

    @property
    def state(self) -> int:
        return sum(self.held.values())

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak(self) -> int:
        return self.state + sum(self.phases[self.peak_phase].values())

    @property
    def step_peak(self) -> int:
        """Of a training step alone, without start, rewiring and evaluation."""
        return self.state + max(sum(self.phases[name].values()) for name in STEP_PHASES)


def memory_plan(config: Config, facts: Facts, known: EncoderNeeds | None = None) -> MemoryPlan:
    """The rank with the most labels. ``known``: of the same encoder with another batch. Raises ConfigError where it cannot be built."""
    cuda = facts.device == "cuda"
    output, step = config.output, pace(config.train)
    whole = step.texts
    b = -(-whole // facts.ranks)
    a = -(-b // min(step.passes, b))
    parts = label_parts(config.launch.label_parallel, facts.ranks)
    n = min(whole, parts * b)
    precision = config.encoder.precision if config.encoder.precision != "auto" else ("bfloat16" if cuda else "float32")
    x_dtype: torch.dtype = getattr(torch, precision)
    s = config.data.max_length
    needs = known.of_rows(a) if known else dry_run(config.encoder, facts.vocabulary, facts.pad_id, a, s, x_dtype, cuda)
    d, x_bytes = needs.width, x_dtype.itemsize
    head_width, tail_width = feature_slice(output.head_features, d).width, feature_slice(output.tail_features, d).width
    turned = output.basis == "labels"
    h, t = shard_sizes(facts.labels, output.head_fraction, output.group_size, parts)
    weight, momentum = (dtype.itemsize for dtype in stored_dtypes(output, cuda))
    momentum = momentum if output.momentum else 0
    weights = h * head_width + t * output.group_size * output.fan_in
    biases = (h + t * output.group_size) * 4 * output.bias
    held = {
        "output weights": weights * weight,
        "output momentum": weights * momentum,
        "output biases": biases * (2 if momentum else 1),
        "tail indices": t * output.fan_in * (2 if tail_width <= INT16_WIDTH else 4),
        "basis": HALF * tail_width**2 * turned,
        "encoder weights": needs.parameters * x_bytes,
        **_optimizer_state(config, needs, x_bytes, facts.ranks),
    }
    batch = {
        "batch": b * s * 16 + (b + n) * facts.most_labels * 8,
        "embeddings and their gradient": n * d * (x_bytes + 4) + b * d * (x_bytes + 16),
    }
    dropped = max(head_width * bool(output.head_dropout), tail_width * bool(output.tail_dropout))
    masked = {"dropout of the head's or tail's input": (2 * n * (x_bytes + 2) + (whole - n) * x_bytes) * dropped}
    rows, groups = h, t
    summed = update = 0
    if parts < facts.ranks:  # replicas.py takes the layer by chunks, two of whose gradients there are at once
        rows, groups = min(h, max(1, ELEMENTS // head_width)), min(t, max(1, ELEMENTS // (output.group_size * output.fan_in)))
        chunk = max(rows * head_width, groups * output.group_size * output.fan_in)
        summed = 4 * chunk * (1 if (rows, groups) == (h, t) else 2) + 4 * n * max(head_width, tail_width)
        update = ROUNDING * chunk if {1, HALF} & {weight, momentum} else 0
    head_work = _head_workspace(cuda, n, rows, head_width, weight, x_bytes)
    in_basis = n * (x_bytes + 4) * tail_width * turned  # what the tail reads, and its gradient turned back
    work = max(head_work, in_basis + _tail_workspace(config, cuda, n, groups, tail_width, weight, x_bytes), update)
    joined, gradients, stepping = _gradients(config, needs, x_bytes, facts.ranks)
    most = needs.recorded_tokens if cuda and config.encoder.graphs else 0  # ``needs`` may be of another page
    varied = (facts.varied or config.data.label_texts > 0) and not facts.one_shape  # label texts are short
    short = varied and config.data.length_buckets > 1 and a * padded_length(1, s) <= most
    recorded = a if a * needs.tokens <= most else most // needs.tokens * short
    forward, between, backward = needs.forward, needs.kept, needs.backward
    if recorded:  # activations of the largest batch that is, for good, and a gradient; the first of a shape runs beside them
        largest = needs.of_rows(recorded)  # rows of the most tokens, as many tokens in all
        held["recorded passes"] = max(largest.forward, largest.backward) + 2 * joined
        if facts.one_shape and step.passes == 1:  # the first batch runs before anything is recorded
            forward = between = backward = 0
    phases = {
        "encoder forward": {"activations": forward, "batch": batch["batch"]},
        "output layer": {**batch, **masked, "activations": between, "kernel workspace": work + 32 * n * facts.most_labels},
        "encoder backward": {**batch, "activations": backward, "flat gradient": joined},
        "optimizer": {**batch, "gradients": gradients, "update": stepping},
        "evaluation": _scoring(config, facts, cuda, needs, d, x_bytes, h, t * output.group_size, tail_width * turned),
        "making the initial weights": {"random numbers": min(1 << 28, 16 * weights) + min(PLAIN_BYTES[facts.device], 64 * t * tail_width)},
    }
    if summed:
        phases["output layer"]["gradients summed over replicas"] = summed
    if step.passes > 1:
        phases["encoder forward"]["embeddings of earlier passes"] = (b - a) * d * x_bytes
    if step.passes > 1 and joined:  # a pass that is run again, or its gradient beside what it is joined from; and that of earlier ones
        phases["encoder backward"]["activations"] = max(needs.forward, needs.backward, 2 * joined)
    if step.accumulation > 1:  # gradients of earlier micro-batches
        for name in ("encoder forward", "output layer"):
            phases[name]["gradients"] = gradients
    if config.rewire.interval and config.rewire.grow == "embeddings":
        phases["rewiring"] = {"label embeddings of some groups": 16 * min(NUMBERS, t * output.group_size * tail_width + h * d)}
    elif config.rewire.interval:
        each = 64 * tail_width + output.fan_in * (16 * output.group_size + 32)  # a group's random keys, scores and moved weights
        phases["rewiring"] = {"scores, keys and moved weights of some groups": min(PLAIN_BYTES[facts.device], each * t)}
    if config.rewire.interval and config.rewire.grow == "gradient":
        kept = {"kept batches": config.rewire.batches * whole * (tail_width * x_bytes + facts.most_labels * 8)}
        phases = {name: {**phase, **kept} for name, phase in phases.items()}
    return MemoryPlan(held, phases, needs)


def shard_sizes(labels: int, head_fraction: float, group_size: int, ranks: int) -> tuple[int, int]:
    """H and T of the rank that has most of them."""
    head = head_size(labels, head_fraction, group_size)
    groups = -(-(labels - head) // group_size)
    last = label_shard(head, groups, group_size, labels, ranks, ranks - 1)  # of near-equal ranges the last is the longest
    return last.head_stop - last.head_start, last.groups


def room(gib: float) -> int:
    """Bytes of a GPU with ``gib`` GiB that a plan may fill."""
    return int((gib - max(RESERVE_GIB, RESERVE_SHARE * gib)) * GIB)


def _optimizer_state(config: Config, needs: EncoderNeeds, x_bytes: int, ranks: int) -> dict[str, int]:
    """AdamW's two moments in float32, and at ZeRO 1 and 2 (which bfloat16 always is) float32 weights; of one rank's partition."""
    if config.encoder.frozen:
        return {}
    partitioned = config.encoder.zero > 0 or x_bytes == HALF
    each, parts = (12, ranks) if partitioned else (8, 1)
    return {"encoder optimizer": each * needs.trained // parts}


def _gradients(config: Config, needs: EncoderNeeds, x_bytes: int, ranks: int) -> tuple[int, int, int]:
    """The flat gradient beside those it is joined from; what of it waits for the update; what the update makes of it.

    At ZeRO 1 and 2 the update copies a partition's gradient and casts it to float32.
    """
    if config.encoder.frozen:
        return 0, 0, 0
    p = needs.trained
    partitioned = config.encoder.zero > 0 or x_bytes == HALF
    own = p // ranks if partitioned else p
    return x_bytes * p, x_bytes * own, (x_bytes + 4 * (x_bytes == HALF)) * own if partitioned else 0


def _head_workspace(cuda: bool, n: int, rows: int, width: int, weight: int, x_bytes: int) -> int:
    if not rows:
        return 0
    if not cuda:
        return _chunk("cpu", rows, 4 * (3 * n + 8 * width), 4 * (n + (1 if weight == 4 else 7) * width)) + 4 * n * width
    item = HALF if x_bytes == HALF and weight <= HALF else 4
    most = max(HEAD_ROWS, HEAD_BYTES // (item * n))
    r = min(most, rows)
    operand = 0 if item == weight else item * r * width  # weights are cast where they are not of x's type
    parts = 4 * n * width * (2 if rows > most else 1)  # dx of a chunk beside the sum
    return parts + operand + r * (item * n + 4 * -(-n // 32)) + 4 * rows // 32


def _tail_workspace(config: Config, cuda: bool, n: int, groups: int, width: int, weight: int, x_bytes: int) -> int:
    if not groups:
        return 0
    g, f = config.output.group_size, config.output.fan_in
    half = x_bytes == HALF and weight <= HALF
    fused = cuda and g >= 16 and 16 <= f <= 256
    if not fused:
        each = 4 * (2 * f * n + 3 * g * n + 8 * g * f)
        used = 4 * (2 * f * n + g * n + (1 if weight == 4 else 7) * g * f) + 8 * f
        return _chunk("cuda" if cuda else "cpu", groups, each, used) + 12 * n * width
    padded = -(-n // TILE) * TILE
    fixed = padded * width * (HALF if half else 4) + 4 * n * width + 16 * groups + 4 * groups  # x transposed, dx, bounds, loss
    pays = config.output.deterministic or n * groups >= SLABS_WORTH
    taken = half and config.output.half_sums and config.output.loss == "bce" and (g, f) == (16, 64) and width <= SLABS_WIDTH
    slabs = SLABS_BYTES if taken and pays else 0
    if config.output.deterministic:  # on an older GPU Triton's
        slots = min(max(1, SCRATCH_BYTES // (4 * f * padded)), groups) * f
        return fixed + max(4 * width * padded + 4 * slots * padded + 28 * slots, slabs)
    if not (half and config.output.half_sums):
        return fixed + 4 * width * padded
    needed = -(-groups * f // (width * RUN))
    copies = max(1, min(needed, COPIES_BYTES // (2 * width * padded))) * 2 * width * padded
    return fixed + max(copies, slabs)


def _chunk(device: str, count: int, allowed: int, used: int) -> int:
    """Plain torch takes as many rows or groups at once as ``allowed`` bytes each let fit; what lives of them is less."""
    return max(1, min(count, PLAIN_BYTES[device] // allowed)) * used


def _scoring(
    config: Config, facts: Facts, cuda: bool, needs: EncoderNeeds, d: int, x_bytes: int, head: int, tail: int, turned: int
) -> dict[str, int]:
    """Activations grow with the rows; of ``turned`` features in a basis there is a float32 product, and its copy; top-k keeps block maxima
    of a chunk (Triton), or a chunk's logits and keys (plain torch)."""
    n, k = config.evaluate.batch_size, 100
    rows = -(-n // facts.ranks)
    activations = needs.scoring * rows // needs.rows
    if cuda:
        padded = -(-n // TILE) * TILE
        spans = min(-(-(head + tail) // TOPK_SPAN), TOPK_SPANS, max(1, TOPK_BYTES // (4 * TOPK_LIST * padded)))
        chunk = 4 * padded * (spans + 4) * (1 + TOPK_LIST)
    else:
        chunk = min(16 << 20, 4 * n * (head + tail)) * 3
    return {
        "activations": activations,
        "embeddings": n * (2 * d * x_bytes + (4 + x_bytes) * turned),
        "top-k workspace": chunk + n * k * TOPK_LIST * 8,
        "biases that leave labels out": 4 * (head + tail) if config.evaluate.labels == "seen" else 0,
    }
