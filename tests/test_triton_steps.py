"""The Triton kernels of both steps in the interpreter, in float32, against the float64 reference; and what chooses them.

Batch tiles of 32 or 64 make two or more of every batch here, and no size is a multiple of its tile.
"""

import copy
import json
from dataclasses import asdict, replace

import pytest
import torch

pytest.importorskip("triton")

from haste_kernels import STORED, HeadState, Positives, StepArgs, TailState, backend, random_features, reference, tuning
from haste_kernels.triton_head import head_step
from haste_kernels.triton_tail import CANDIDATES, TABLE, TailConfig, default_config, tail_step, takes

ARGS = StepArgs(lr=0.05, scale=0.5, momentum=0.9, weight_decay=1e-3, seed=2**40 + 5, step=9)
FIRST_ROW = 2**33 + 3
ROWS_FIRST, BATCH_FIRST = TailConfig(32, True, 4, 1), TailConfig(32, False, 4, 1)

if torch.cuda.is_available():
    pytest.skip("the interpreter is for machines without a GPU: tests/gpu runs the kernels themselves", allow_module_level=True)


@pytest.fixture(autouse=True)
def poison():
    """torch.empty gives NaN, so that a value that nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make_tail(groups, size, fan_in, width, padded, bias=True, momentum=True, index=torch.int16):
    def normal(*shape):
        return 0.1 * torch.randn(*shape)

    features = random_features(3, groups, width, fan_in, 1).to(index)
    kept = normal(groups, size, fan_in) if momentum else None
    biases = (normal(groups, size) if bias else None, normal(groups, size) if bias and momentum else None)
    return TailState(normal(groups, size, fan_in), features, kept, *biases, FIRST_ROW, groups * size - padded, 3)


def make_positives(rows, n, share):
    row, batch = (torch.rand(rows, n) < share).nonzero(as_tuple=True)
    return Positives(batch, row)


def compare(dx, loss, mine, true_dx, true_loss, truth):
    torch.testing.assert_close(dx.double(), true_dx, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(loss.double(), true_loss, rtol=1e-5, atol=1e-5)
    for name in ("weight", "momentum", "bias", "bias_momentum"):
        if getattr(truth, name) is None:
            assert getattr(mine, name) is None
        else:
            torch.testing.assert_close(getattr(mine, name), getattr(truth, name), rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


TAILS = [  # n, width, groups, size, fan_in, padded, share of positives, loss, bias, momentum, index
    (70, 96, 4, 16, 32, 3, 0.02, "bce", True, True, torch.int16),
    (64, 96, 3, 16, 48, 15, 0.3, "squared_hinge", False, True, torch.int32),
    (33, 70, 2, 64, 64, 63, 1.0, "bce", True, False, torch.int16),
    (65, 40, 2, 32, 16, 0, 0.0, "squared_hinge", False, False, torch.int16),
    (1, 300, 1, 128, 256, 1, 0.5, "bce", True, True, torch.int16),
    (170, 60, 5, 16, 16, 0, 0.003, "bce", True, True, torch.int16),  # few positives a group: most tiles have none
    (130, 60, 2, 32, 16, 0, 0.003, "squared_hinge", True, False, torch.int32),
]


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("config", [ROWS_FIRST, BATCH_FIRST], ids=["rows_first", "batch_first"])
@pytest.mark.parametrize("case", TAILS, ids=str)
def test_tail_step_is_the_reference(case, config, deterministic):
    n, width, groups, size, fan_in, padded, share, loss, bias, momentum, index = case
    torch.manual_seed(n)
    tail, x_ND = make_tail(groups, size, fan_in, width, padded, bias, momentum, index), torch.randn(n, width)
    positives = make_positives(tail.rows, n, share)
    args = replace(ARGS, loss=loss, deterministic=deterministic)
    truth = copy.deepcopy(tail)
    dx, value = tail_step(x_ND, positives, tail, args, want_loss=True, config=config)
    compare(dx, value, tail, *reference.tail_step(x_ND, positives, truth, args), truth)


@pytest.mark.parametrize("step", [tail_step, head_step])
def test_positives_outside_the_shard_are_passed_over(step):
    """Before its first row, in the padding of its last group, behind its last row; such pairs may repeat."""
    torch.manual_seed(0)
    tail, x_ND = make_tail(3, 16, 32, 50, 5), torch.randn(40, 50)
    head = HeadState(torch.randn(43, 50), None, torch.randn(43), None, FIRST_ROW)  # as many rows as the tail's 43
    state = tail if step is tail_step else head
    mine = make_positives(43, 40, 0.1)
    outside = torch.tensor([-FIRST_ROW - 1, -FIRST_ROW - 1, -1, 43, 44, 48, 2**33])
    row = torch.cat([outside[:3], mine.row, outside[3:]])
    every = Positives(torch.cat([torch.zeros(3, dtype=torch.int64), mine.batch, torch.arange(4)]), row)
    expected = copy.deepcopy(state)
    args = replace(ARGS, deterministic=True)
    wanted, got = step(x_ND, mine, expected, args, want_loss=True), step(x_ND, every, state, args, want_loss=True)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert torch.equal(state.weight, expected.weight)
    assert torch.equal(state.bias, expected.bias)


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_shards_store_the_same_bits(shards):
    torch.manual_seed(0)
    tail, x_ND = make_tail(4, 16, 32, 50, 0), torch.randn(40, 50)
    tail.weight, tail.momentum = tail.weight.bfloat16(), tail.momentum.bfloat16()
    positives, expected = make_positives(64, 40, 0.1), copy.deepcopy(tail)
    dx, _ = tail_step(x_ND, positives, expected, ARGS, config=BATCH_FIRST)
    each, total = 4 // shards, torch.zeros_like(dx)
    for i in range(shards):
        part, mine = slice(i * each, (i + 1) * each), positives.row // (16 * each) == i
        state = TailState(
            *(t[part].clone() for t in (tail.weight, tail.index, tail.momentum, tail.bias, tail.bias_momentum)),
            FIRST_ROW + i * each * 16, each * 16, 3 + i * each,
        )  # fmt: skip
        local = Positives(positives.batch[mine], positives.row[mine] - i * each * 16)
        total += tail_step(x_ND, local, state, ARGS, config=BATCH_FIRST)[0]
        for name in ("weight", "momentum", "bias"):
            assert torch.equal(getattr(state, name), getattr(expected, name)[part]), name
    torch.testing.assert_close(total, dx, rtol=1e-4, atol=1e-5)


SHORT = [("bfloat16", "bfloat16", "nearest")]
SHORT += [(weight, momentum, "stochastic") for weight in ("bfloat16", "float8") for momentum in ("bfloat16", "float8")]


@pytest.mark.parametrize(("weight", "momentum", "rounding"), SHORT)
@pytest.mark.parametrize("step", ["head", "tail"])
def test_what_is_stored_short_is_rounded_as_the_definition_does(step, weight, momentum, rounding):
    args = replace(ARGS, rounding=rounding)
    torch.manual_seed(0)
    tail, x_ND = make_tail(3, 16, 32, 50, 0), torch.randn(40, 50)
    head = HeadState(0.1 * torch.randn(48, 50), 0.1 * torch.randn(48, 50), torch.randn(48), torch.randn(48), FIRST_ROW)
    state = tail if step == "tail" else head
    state.weight, state.momentum = state.weight.to(STORED[weight]), state.momentum.to(STORED[momentum])
    positives, truth = make_positives(48, 40, 0.1), copy.deepcopy(state)
    if step == "tail":
        dx, _ = tail_step(x_ND, positives, state, args, config=ROWS_FIRST)
        true_dx, _ = reference.tail_step(x_ND, positives, truth, args)
    else:
        dx, _ = head_step(x_ND, positives, state, args)
        true_dx, _ = reference.head_step(x_ND, positives, truth, args)
    torch.testing.assert_close(dx.double(), true_dx, rtol=1e-4, atol=1e-5)
    for got, want in ((state.weight, truth.weight), (state.momentum, truth.momentum)):
        assert got.dtype == want.dtype
        assert float((got.float() == want.float()).float().mean()) > 0.999  # but for a value whose float32 sums lie on two sides of a step


def test_deterministic_parts_are_added_in_chunks(monkeypatch):
    monkeypatch.setattr("haste_kernels.triton_dx.SCRATCH_BYTES", 4 * 32 * 64 * 2)  # two groups at once
    torch.manual_seed(0)
    tail, x_ND = make_tail(5, 16, 32, 50, 3), torch.randn(40, 50)
    positives, truth = make_positives(tail.rows, 40, 0.1), copy.deepcopy(tail)
    args = replace(ARGS, deterministic=True)
    dx, loss = tail_step(x_ND, positives, tail, args, want_loss=True, config=ROWS_FIRST)
    compare(dx, loss, tail, *reference.tail_step(x_ND, positives, truth, args), truth)


def test_a_pair_that_stands_twice_counts_once():
    torch.manual_seed(0)
    tail, x_ND = make_tail(3, 16, 32, 50, 3), torch.randn(40, 50)
    once = make_positives(tail.rows, 40, 0.1)
    other = copy.deepcopy(tail)
    tail_step(x_ND, once, tail, ARGS, config=ROWS_FIRST)
    tail_step(x_ND, Positives(once.batch.repeat_interleave(2), once.row.repeat_interleave(2)), other, ARGS, config=ROWS_FIRST)
    assert torch.equal(tail.weight, other.weight)


def test_a_tail_without_groups_has_no_gradient():
    tail = make_tail(0, 16, 32, 50, 0)
    dx, loss = tail_step(torch.randn(5, 50), make_positives(0, 5, 0.0), tail, ARGS, want_loss=True)
    assert torch.equal(dx, torch.zeros(5, 50))
    assert float(loss) == 0


def test_what_the_tail_kernel_leaves_to_plain_torch():
    x_ND = torch.randn(5, 50)
    assert takes(x_ND, make_tail(1, 16, 32, 50, 0))
    assert not takes(x_ND.double(), make_tail(1, 16, 32, 50, 0))
    assert not takes(x_ND, make_tail(1, 8, 32, 50, 0))
    assert not takes(x_ND, make_tail(1, 16, 8, 50, 0))


def test_padding_beyond_the_last_group_is_refused():
    tail = make_tail(2, 16, 32, 50, 16)
    with pytest.raises(ValueError, match="only the last of 2 groups of 16 may hold padding"):
        tail_step(torch.randn(5, 50), make_positives(16, 5, 0.0), tail, ARGS)


HEADS = [(300, 100, 137, 0.01, "bce", True, True), (130, 72, 16, 1.0, "squared_hinge", True, False), (3, 65, 50, 0.0, "bce", False, True)]


@pytest.mark.parametrize("chunk_bytes", [1, 48 << 20])
@pytest.mark.parametrize("case", HEADS, ids=str)
def test_head_step_is_the_reference(case, chunk_bytes, monkeypatch):
    n, width, rows, share, loss, bias, momentum = case
    monkeypatch.setattr("haste_kernels.triton_head.CHUNK_BYTES", chunk_bytes)
    torch.manual_seed(n)

    def normal(*shape, wanted=True):
        return 0.1 * torch.randn(*shape) if wanted else None

    head = HeadState(
        normal(rows, width), normal(rows, width, wanted=momentum), normal(rows, wanted=bias),
        normal(rows, wanted=bias and momentum), FIRST_ROW,
    )  # fmt: skip
    x_ND, positives, args = torch.randn(n, width), make_positives(rows, n, share), replace(ARGS, loss=loss)
    truth = copy.deepcopy(head)
    dx, value = head_step(x_ND, positives, head, args, want_loss=True)
    compare(dx, value, head, *reference.head_step(x_ND, positives, truth, args), truth)


def test_a_pair_of_the_head_that_stands_twice_counts_once():
    torch.manual_seed(0)
    head = HeadState(torch.randn(43, 50), None, torch.randn(43), None, FIRST_ROW)
    once, x_ND, other = make_positives(43, 40, 0.3), torch.randn(40, 50), copy.deepcopy(head)
    twice = Positives(once.batch.repeat_interleave(2), once.row.repeat_interleave(2))
    wanted, got = head_step(x_ND, once, head, ARGS, want_loss=True), head_step(x_ND, twice, other, ARGS, want_loss=True)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(other.bias, head.bias)


def test_the_table_has_every_group_size_and_its_tiles_fit_small_batches():
    assert sorted(TABLE) == [16, 32, 64, 128]
    assert default_config(16, 64, 5).batch == 16
    assert default_config(16, 256, 512).registers is None


def test_a_tuned_tile_is_remembered_on_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("HASTE_CACHE", str(tmp_path))
    tuning.forget()
    assert tuning.chosen("tail_step", "G=16", CANDIDATES) is None
    tuned = tuning.tune("tail_step", "G=16", CANDIDATES, lambda c: 1.0 if c in (CANDIDATES[5], CANDIDATES[9]) else 2.0)
    assert (tuned.best, tuned.times[tuned.best], len(tuned.times)) == (CANDIDATES[5], 1.0, len(CANDIDATES))
    assert tuning.chosen("tail_step", "G=16", CANDIDATES) == CANDIDATES[5]
    tuning.forget()  # as a new process would
    assert tuning.chosen("tail_step", "G=16", CANDIDATES) == CANDIDATES[5]
    tuning.path().write_text("{broken")
    tuning.forget()
    assert tuning.chosen("tail_step", "G=16", CANDIDATES) is None
    tuning.path().write_text(json.dumps({"tail_step G=16": {"batch": 7}}))
    tuning.forget()
    assert tuning.chosen("tail_step", "G=16", CANDIDATES) is None


def test_a_tile_that_fails_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setenv("HASTE_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def milliseconds(config):
        if config != CANDIDATES[3]:
            raise RuntimeError("out of shared memory")
        return 1.0

    assert tuning.tune("tail_step", "x", CANDIDATES, milliseconds).best == CANDIDATES[3]
    with pytest.raises(RuntimeError, match="none of 1 tiles runs here: RuntimeError: out of shared memory"):
        tuning.tune("tail_step", "x", CANDIDATES[:1], milliseconds)
    tuning.forget()


def test_what_another_process_tuned_meanwhile_is_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("HASTE_CACHE", str(tmp_path))
    tuning.forget()
    tuning.remember("tail_step", "a", CANDIDATES[1])
    assert tuning.chosen("tail_step", "a", CANDIDATES) == CANDIDATES[1]  # the file has been read
    tuning.path().write_text(json.dumps({**json.loads(tuning.path().read_text()), "tail_step b": asdict(CANDIDATES[2])}))
    tuning.remember("tail_step", "c", CANDIDATES[3])
    assert [tuning.chosen("tail_step", key, CANDIDATES) for key in "abc"] == list(CANDIDATES[1:4])
    tuning.forget()


def test_a_step_looks_its_tile_up_without_reading_or_comparing(monkeypatch, tmp_path):
    monkeypatch.setenv("HASTE_CACHE", str(tmp_path))
    tuning.forget()
    assert tuning.chosen("tail_step", "G=16", CANDIDATES) is None
    monkeypatch.setattr(tuning, "_read", None)
    monkeypatch.setattr(TailConfig, "__hash__", None)
    assert tuning.chosen("tail_step", "G=16", CANDIDATES) is None
    monkeypatch.undo()
    tuning.forget()


class OnGpu:
    """What ``use_triton`` asks of a tensor."""

    is_cuda = True
    device = torch.device("cuda:0")


@pytest.mark.parametrize(
    ("version", "capability", "reason"),
    [
        ("3.5.1", (9, 0), "Triton 3.5.1 is too old"),
        (None, (9, 0), "Triton is not installed"),
        ("3.6.0", (7, 5), "older than the kernels need"),
    ],
)
def test_a_gpu_without_kernels_is_told_once(version, capability, reason, monkeypatch, recwarn):
    def found(name):
        if version is None:
            raise backend.importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(backend.importlib.metadata, "version", found)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "GPU")
    backend._missing.cache_clear()
    assert [backend.use_triton(OnGpu()) for _ in range(3)] == [False] * 3
    backend._missing.cache_clear()
    told = [str(w.message) for w in recwarn if "plain torch does the kernels' work" in str(w.message)]
    assert len(told) == 1
    assert reason in told[0]


def test_kernels_are_used_on_a_gpu_unless_switched_off(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    backend._missing.cache_clear()
    assert backend.use_triton(OnGpu())
    monkeypatch.setenv("HASTE_KERNELS", "torch")
    assert not backend.use_triton(OnGpu())
    assert not backend.use_triton(torch.zeros(1))
    backend._missing.cache_clear()
