"""The memory plan against what real steps hold, its numbers against the kernels' own, and the settings that it says would fit."""

import gc
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import run_ranks

from haste_dist import memory, replicas
from haste_dist.classifier import KERNELS, Classifier
from haste_dist.config import Config, load_config
from haste_dist.dry_run import _as_on_a_gpu, dry_run
from haste_dist.encoder import build_encoder
from haste_dist.engine import EncoderEngine
from haste_dist.errors import ConfigError
from haste_dist.fits import check_fits, nearest_that_fit
from haste_dist.label_groups import head_size
from haste_dist.live_bytes import LiveBytes
from haste_dist.memory import (
    COPIES_BYTES,
    GIB,
    HEAD_BESIDE,
    HEAD_BYTES,
    HEAD_ROWS,
    PLAIN_BYTES,
    RUN,
    SCRATCH_BYTES,
    SLABS_BYTES,
    SLABS_LEAST,
    SLABS_MOST,
    TOPK_BYTES,
    TOPK_LIST,
    TOPK_SPAN,
    TOPK_SPANS,
    Facts,
    memory_plan,
    room,
    shard_sizes,
)
from haste_dist.replicas import summed_over
from haste_dist.schedule import pace
from haste_dist.sharding import label_shard
from haste_dist.step import train_step
from haste_dist.synthetic import LabelLaw, synthetic_batch
from haste_dist.world import World, join_world, split_world

LAW = LabelLaw()
BERT = ["encoder.name=scratch", "encoder.width=768", "encoder.layers=12", "encoder.heads=12", "train.batch_size=512"]


def config(*words: str) -> Config:
    return load_config(None, list(words))


def test_the_plan_knows_the_kernels_numbers() -> None:
    from haste_kernels import chunks

    assert {"cuda": chunks.CUDA_BYTES, "cpu": chunks.CPU_BYTES} == PLAIN_BYTES
    pytest.importorskip("triton")
    from haste_kernels import slab_tail
    from haste_kernels import triton_dx as dx
    from haste_kernels import triton_head as head
    from haste_kernels import triton_maxima as maxima
    from haste_kernels import triton_topk as topk

    assert slab_tail.LEAST_ROWS == SLABS_LEAST
    for width, most in SLABS_MOST:
        assert slab_tail.cut(most, width, 132, 226 << 10) is not None
        assert slab_tail.cut(most, width + 1, 132, 226 << 10) is None
        assert slab_tail.cut(most + 1, width, 132, 226 << 10) is None
        for n, d in itertools.product((1, 64, 65, 193, 257, most), (1, 64, width)):
            cut = slab_tail.cut(n, d, 132, 226 << 10)
            assert cut is not None
            assert 4 * cut.ranges * d * cut.rows + 8 * slab_tail.ring_words(cut) <= SLABS_BYTES
    assert (dx.RUN, dx.COPIES_BYTES, dx.SCRATCH_BYTES) == (RUN, COPIES_BYTES, SCRATCH_BYTES)
    assert (head.CHUNK_BYTES, head.MOST_ROWS, head.LEAST_BESIDE) == (HEAD_BYTES, HEAD_ROWS, HEAD_BESIDE)
    for tiles in (head.FLOAT, *head.CANDIDATES):
        assert HEAD_ROWS % tiles.rows == 0
        assert tiles.beside >= HEAD_BESIDE
    assert (topk.CHUNK_BYTES, topk.CHUNK_SPANS, topk.LIST, maxima.SPAN) == (TOPK_BYTES, TOPK_SPANS, TOPK_LIST, TOPK_SPAN)


@settings(max_examples=25)
@given(
    st.integers(1, 3000),
    st.integers(1, 5),
    st.sampled_from([0.0, 0.1, 1.0]),
    st.sampled_from([16, 64]),
    st.sampled_from(["float32", "bfloat16", "float8"]),
    st.sampled_from(["auto", "float32", "bfloat16", "none"]),
    st.booleans(),
    st.sampled_from(["embedding", "labels"]),
)
def test_the_output_layers_bytes_are_exact(
    labels: int, ranks: int, head: float, group: int, weight: str, momentum: str, bias: bool, basis: str
) -> None:
    words = [f"output.head_fraction={head}", f"output.group_size={group}", "output.fan_in=8", f"output.weight_dtype={weight}"]
    words += ["output.momentum=0"] if momentum == "none" else [f"output.momentum_dtype={momentum}"]
    words += [f"output.bias={bias}", f"output.basis={basis}"]
    page = config(*words, "encoder.width=32", "encoder.heads=2", "encoder.layers=1", "data.max_length=4")
    rows = head_size(labels, head, group)
    groups = -(-(labels - rows) // group)
    shards = [label_shard(rows, groups, group, labels, ranks, rank) for rank in range(ranks)]
    assert shard_sizes(labels, head, group, ranks) == (max(s.head_stop - s.head_start for s in shards), max(s.groups for s in shards))
    held = memory_plan(page, Facts(labels, 4, 40, 0, ranks, "cpu")).held
    counted = sum(size for name, size in held.items() if not name.startswith("encoder"))
    assert counted == max(
        Classifier(page.output, shard, 32, 0, torch.device("cpu"), basis=torch.eye(32).half()).bytes() for shard in shards
    )


@pytest.mark.parametrize("project", [0, 24])
def test_a_dry_run_keeps_what_a_real_forward_pass_keeps(project: int) -> None:
    """On a CPU, without dropout: attention there is fused too, and the mask hides something, as in real batches."""
    page = config("encoder.width=64", "encoder.heads=4", "encoder.layers=3", "encoder.dropout=0", f"encoder.project={project}").encoder
    needs = dry_run(page, 100, 0, 8, 32, torch.float32)
    encoder = build_encoder(page, 100, 0, 32)
    assert (needs.width, needs.parameters) == (project or 64, sum(p.numel() for p in encoder.parameters()))
    ids, mask = torch.randint(5, 100, (8, 32)), torch.ones(8, 32, dtype=torch.int64)
    mask[0, 20:] = 0
    with LiveBytes([*encoder.parameters(), *encoder.buffers(), ids, mask]) as live:
        before = live.now
        x_BD = encoder(ids, mask)
        gc.collect()
        kept = live.now - before
        live.restart()
        x_BD.backward(torch.ones_like(x_BD))
        backward = live.peak - before
    assert abs(needs.kept / kept - 1) < 0.05
    assert abs(needs.backward / backward - 1) < 0.05
    twice = dry_run(page, 100, 0, 16, 32, torch.float32)
    for name in ("kept", "forward", "backward", "scoring"):
        assert abs(getattr(needs.of_rows(16), name) / getattr(twice, name) - 1) < 0.02


def step_within_plan(world: World, words: list[str], tolerance: float) -> None:
    """Real steps: the most bytes of tensors alive, against the plan."""
    page = config(*words)
    made = pace(page.train)
    labels, n, s, vocabulary = 40_000, made.texts, page.data.max_length, 300
    encoder = build_encoder(page.encoder, vocabulary, 0, s)
    engine = EncoderEngine(encoder, page.encoder, world)
    head = head_size(labels, page.output.head_fraction, page.output.group_size)
    groups = -(-(labels - head) // page.output.group_size)
    world = split_world(world, page.launch.label_parallel)
    shard = label_shard(head, groups, page.output.group_size, labels, world.shards.size, world.shards.rank)
    steps = summed_over(world.copies) if world.copies.size > 1 else KERNELS
    classifier = Classifier(page.output, shard, encoder.width, 0, world.device, steps, basis=torch.eye(encoder.width).half())
    batch = synthetic_batch(LAW, labels, head, n, s, vocabulary, 0, 0, world.size, world.rank)

    def step(number: int) -> None:
        train_step(engine, classifier, batch, world, lr_encoder=1e-4, lr_output=1e-4, step=number, seed=0, passes=made.passes)

    for number in range(2):
        step(number)
    with LiveBytes([*encoder.parameters(), *(t for t, _ in classifier.tensors().values())]) as live:
        for number in range(2, 4):
            step(number)
    planned = memory_plan(page, Facts(labels, LAW.most, vocabulary, 0, world.size, "cpu")).step_peak
    assert abs(planned / live.peak - 1) < tolerance, f"{planned / 2**20:.2f} MiB planned, {live.peak / 2**20:.2f} held"


SMALL = ["encoder.width=64", "encoder.heads=4", "encoder.layers=4", "encoder.dropout=0", "data.max_length=32", "output.fan_in=16"]


BATCHES = [["train.batch_size=64"], ["train.batch_size=8"], ["train.batch_size=32", "output.tail_dropout=0.1"]]


@pytest.mark.parametrize("more", [*BATCHES, ["train.batch_size=2", "encoder.width=256"]])  # the last: the encoder's weights are most of it
def test_a_step_holds_what_was_planned(more: list[str]) -> None:
    step_within_plan(join_world("cpu"), [*SMALL, *more], 0.1)


@pytest.mark.parametrize(
    "more",
    [
        ["train.batch_size=16", "train.accumulation=4"],
        ["train.batch_size=8", "train.accumulation=64", "output.tail_dropout=0.1"],  # the output layer's part is most of it
        ["train.batch_size=32", "train.accumulation=4", "encoder.precision=bfloat16"],
        ["train.batch_size=2", "train.accumulation=4", "encoder.width=256"],
    ],
)
def test_a_step_of_several_passes_holds_what_was_planned(more: list[str]) -> None:
    step_within_plan(join_world("cpu"), [*SMALL, "train.classifier_step=global", *more], 0.1)


def test_the_output_layer_of_several_passes_is_planned_as_of_one_large_batch() -> None:
    words = [*BERT[:-1], "output.tail_dropout=0.1", "rewire.grow=gradient"]
    passes = config(*words, "train.batch_size=512", "train.accumulation=16", "train.classifier_step=global")
    several, one = (memory_plan(page, Facts(1_000_000, 100, 30_522)) for page in (passes, config(*words, "train.batch_size=8192")))
    for name in ("batch", "embeddings and their gradient", "dropout of the head's or tail's input", "kernel workspace", "kept batches"):
        assert several.phases["output layer"][name] == one.phases["output layer"][name]
    assert several.phases["output layer"]["activations"] * 15 < one.phases["output layer"]["activations"]
    micro = memory_plan(config(*words, "train.batch_size=512"), Facts(1_000_000, 100, 30_522))
    assert several.phases["evaluation"]["activations"] == micro.phases["evaluation"]["activations"]


def test_a_step_in_a_basis_holds_what_was_planned() -> None:
    """A wide embedding and little else, so that the basis is 6% of it."""
    small = ["encoder.frozen=true", "encoder.width=1024", "encoder.layers=1", "output.head_fraction=0", "output.momentum=0"]
    step_within_plan(join_world("cpu"), [*SMALL, *small, "output.basis=labels", "train.batch_size=64", "data.max_length=4"], 0.02)


def test_two_ranks_hold_what_was_planned() -> None:
    run_ranks(2, step_within_plan, [*SMALL, "train.batch_size=64"], 0.1)


def replica_within_plan(world: World, cases: list[list[str]]) -> None:
    """In chunks of fewer weights than a shard has; the gradients of two of them are there at once."""
    replicas.ELEMENTS = memory.ELEMENTS = 2**17
    for words in cases:
        step_within_plan(world, words, 0.1)


def test_replicas_hold_what_was_planned() -> None:
    words = [*SMALL, "train.batch_size=64", "launch.label_parallel=1"]
    run_ranks(2, replica_within_plan, [words, [*words, "output.weight_dtype=bfloat16", "train.batch_size=4"]])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_partitioned_optimizers_hold_what_was_planned(precision: str) -> None:
    step_within_plan(join_world("cpu"), [*SMALL, "train.batch_size=8", "encoder.zero=1", f"encoder.precision={precision}"], 0.1)


# What would fit


def test_what_does_not_fit_is_refused_with_settings_that_do() -> None:
    page, facts = config(*BERT), Facts(400_000_000, 20, 30_522, 0, 2)
    with pytest.raises(ConfigError) as refused:
        check_fits(page, facts, 79, "NVIDIA H100")
    line = str(refused.value)
    assert "\n" not in line
    plan = memory_plan(page, facts)
    found = nearest_that_fit(page, facts, plan, 79)
    assert found
    assert all(word in line for word in found)
    for words in found:
        settings_of = [word for word in words.split() if not word.startswith("launch.ranks")]
        ranks = next((int(word.split("=")[1]) for word in words.split() if word.startswith("launch.ranks")), 2)
        changed = config(*BERT, *settings_of)
        assert memory_plan(changed, Facts(400_000_000, 20, 30_522, 0, ranks)).peak <= room(79) * 1.001, words


def test_several_settings_are_changed_where_one_is_not_enough() -> None:
    page = config(*BERT[:-1], "train.batch_size=64", "output.momentum_dtype=float32")
    facts = Facts(10_000_000_000, 20, 30_522, 0, 8)
    (words,) = nearest_that_fit(page, facts, memory_plan(page, facts), 79)
    assert "launch.ranks=" in words
    assert "output.momentum=0" in words
    assert nearest_that_fit(page, facts, memory_plan(page, facts), 2) == []


def test_what_fits_is_let_through() -> None:
    plan = check_fits(config(*BERT), Facts(10_000_000, 20, 30_522), 79, "NVIDIA H100")
    assert 20 * GIB < plan.peak < 30 * GIB
    assert plan.peak_phase == "encoder backward"


def test_biases_that_leave_labels_out_are_planned_for_an_evaluation() -> None:
    page, facts = config(*BERT, "evaluate.labels=seen"), Facts(10_000_000, 20, 30_522)
    layer = Classifier(
        config("output.group_size=16", "output.fan_in=6").output, label_shard(32, 6, 16, 120, 1, 0), 24, 0, torch.device("cpu")
    )
    with LiveBytes([t for t, _ in layer.tensors().values()]) as live:
        before = live.now
        with layer.leaving_out(torch.tensor([3, 40])):
            taken = live.now - before
    assert 4 * (32 + 96) <= taken < 1.2 * 4 * (32 + 96)
    plan, plain = (memory_plan(one, facts).phases["evaluation"] for one in (page, config(*BERT)))
    rows, groups = shard_sizes(10_000_000, page.output.head_fraction, page.output.group_size, 1)
    assert sum(plan.values()) - sum(plain.values()) == 4 * (rows + groups * page.output.group_size)


def test_a_mask_that_is_trained_has_a_gradient_in_a_dry_run() -> None:
    """As the distances of MPNet have."""
    q, mask = (torch.ones(2, 4, 6, width, device="meta", requires_grad=True) for width in (8, 6))
    with _as_on_a_gpu():
        torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=mask).sum().backward()
    assert mask.grad is not None
    assert mask.grad.shape == mask.shape
