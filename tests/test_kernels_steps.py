"""head_step and tail_step against the reference: shapes, losses, dtypes, chunks, padding; and shards against the whole."""

import copy
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from haste_kernels import STORED, HeadState, Positives, StepArgs, TailState, chunks, head_step, random_features, reference, tail_step
from haste_kernels.rounding import ROUNDED

DTYPES = {None: None, **STORED, "float64": torch.float64}


@pytest.fixture(autouse=True)
def poison():
    """torch.empty gives NaN, so that a value that is read before it is written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make_head(rows, width, dtype, momentum, bias, first_row=3):
    weight = (0.3 * torch.randn(rows, width)).to(dtype)
    kept = None if momentum is None else (0.3 * torch.randn(rows, width)).to(momentum)
    return HeadState(weight, kept, torch.randn(rows) if bias else None, torch.randn(rows) if bias and momentum else None, first_row)


def make_tail(groups, size, fan_in, width, padded, dtype, momentum, bias, index=torch.int16):
    shape = (groups, size, fan_in)
    weight = (0.3 * torch.randn(shape)).to(dtype)
    kept = None if momentum is None else (0.3 * torch.randn(shape)).to(momentum)
    biases = [torch.randn(groups, size) if on else None for on in (bias, bias and momentum is not None)]
    features = random_features(2, groups, width, fan_in, 5).to(index)
    return TailState(weight, features, kept, *biases, 2**31 + 32, groups * size - padded, 2)


def make_positives(n, rows, share):
    row, batch = (torch.rand(rows, n) < share).nonzero(as_tuple=True)
    return Positives(batch, row)


def compare(step, slow, x, positives, state, args):
    """One step of both on equal states: dx, loss and every tensor of the state."""
    mine, truth = copy.deepcopy(state), copy.deepcopy(state)
    dx, loss = step(x, positives, mine, args, want_loss=True)
    expected_dx, expected_loss = slow(x, positives, truth, args)
    exact = x.dtype == state.weight.dtype == torch.float64
    rtol, atol = (1e-12, 1e-13) if exact else (2e-5, 2e-5 * max(1.0, float(expected_dx.abs().max())))
    assert dx.dtype == (torch.float64 if exact else torch.float32)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    torch.testing.assert_close(dx.double(), expected_dx, rtol=rtol, atol=atol)
    torch.testing.assert_close(loss.double(), expected_loss, rtol=1e-5, atol=1e-6)
    for name in ("weight", "momentum", "bias", "bias_momentum"):
        got, want = getattr(mine, name), getattr(truth, name)
        if want is None:
            assert got is None
        elif want.dtype in ROUNDED:
            # The same random bits: stored values differ only where float32 and float64 fall on two sides of a carry.
            assert (got.float() != want.float()).sum() <= 1 + want.numel() // 100
            step, least = (2**-7, 1e-5) if want.dtype == torch.bfloat16 else (2**-3, 2**-9)
            torch.testing.assert_close(got.float(), want.float(), rtol=step, atol=least)
        else:
            torch.testing.assert_close(
                got, want, rtol=rtol if want.dtype == torch.float64 else 2e-5, atol=1e-5 if want.dtype != torch.float64 else atol
            )


ARGS = st.builds(
    StepArgs,
    lr=st.sampled_from([0.0, 0.05, 1.0]),
    scale=st.sampled_from([1.0, 0.1]),
    momentum=st.sampled_from([0.0, 0.9]),
    weight_decay=st.sampled_from([0.0, 0.01]),
    loss=st.sampled_from(["bce", "squared_hinge"]),
    rounding=st.sampled_from(["stochastic", "nearest"]),
    seed=st.integers(0, 2**31 - 1),
    step=st.integers(0, 10**6),
)
DRAWN = {
    "args": ARGS,
    "n": st.integers(1, 9),
    "dtypes": st.sampled_from(
        [
            ("float64", "float64"),
            ("float32", None),
            ("float32", "float32"),
            ("bfloat16", None),
            ("bfloat16", "bfloat16"),
            ("bfloat16", "float32"),
            ("float8", None),
            ("float8", "bfloat16"),
            ("float8", "float8"),
        ]
    ),
    "x_dtype": st.sampled_from(["float32", "bfloat16"]),
    "bias": st.booleans(),
    "share": st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    "budget": st.sampled_from([1, 3000, 20_000, 8 << 20]),
    "masked": st.booleans(),
    "seed": st.integers(0, 1000),
}


def arrange(patch, budget, masked, seed):
    """Chunks as small as one item, and the way a GPU finds the positives, which is plain torch and runs here as well."""
    torch.manual_seed(seed)
    patch.setattr(chunks, "CPU_BYTES", budget)
    if masked:
        patch.setattr(chunks, "_split", chunks._mask)


@settings(max_examples=80, deadline=None)
@given(**DRAWN, rows=st.integers(0, 30), width=st.integers(1, 20))
def test_head_step_equals_reference(args, n, dtypes, x_dtype, bias, share, budget, masked, seed, rows, width):
    with pytest.MonkeyPatch.context() as patch:
        arrange(patch, budget, masked, seed)
        x = torch.randn(n, width).to(torch.float64 if dtypes[0] == "float64" else DTYPES[x_dtype])
        head = make_head(rows, width, DTYPES[dtypes[0]], DTYPES[dtypes[1]], bias)
        compare(head_step, reference.head_step, x, make_positives(n, rows, share), head, args)


@settings(max_examples=120, deadline=None)
@given(
    **DRAWN,
    groups=st.integers(0, 6),
    size=st.sampled_from([1, 3, 16]),
    fan_in=st.integers(1, 9),
    extra=st.integers(0, 9),
    padded=st.integers(0, 15),
    wide=st.booleans(),
    spread=st.booleans(),
)
def test_tail_step_equals_reference(
    args, n, dtypes, x_dtype, bias, share, budget, masked, seed, groups, size, fan_in, extra, padded, wide, spread
):
    with pytest.MonkeyPatch.context() as patch:
        arrange(patch, budget, masked, seed)
        patch.setattr(sys.modules["haste_kernels.tail_step"], "_spreads", lambda *_: spread)  # what a GPU does where G is small
        width, padded = fan_in + extra, min(padded, size - 1) if groups else 0
        x = torch.randn(n, width).to(torch.float64 if dtypes[0] == "float64" else DTYPES[x_dtype])
        tail = make_tail(
            groups, size, fan_in, width, padded, DTYPES[dtypes[0]], DTYPES[dtypes[1]], bias, torch.int32 if wide else torch.int16
        )
        compare(tail_step, reference.tail_step, x, make_positives(n, tail.rows, share), tail, args)


@pytest.mark.parametrize("masked", [False, True])
def test_chunks_cover_every_positive_once(masked, monkeypatch):
    arrange(monkeypatch, 100, masked, 0)
    n, groups, size, rows = 7, 9, 4, 34
    positives = make_positives(n, rows, 0.3)
    seen = torch.zeros(rows * n)
    made = chunks.chunks(groups, size, rows, 40, positives, n)
    assert [(c.start, c.stop) for c in made] == [(0, 2), (2, 4), (4, 6), (6, 8), (8, 9)]
    for chunk in made:
        end = min(chunk.stop * size, rows) * n
        seen[chunk.start * size * n : end].index_add_(0, chunk.flat, torch.ones(len(chunk.flat)) if chunk.weight is None else chunk.weight)
    assert torch.equal(seen.view(rows, n).nonzero(), torch.stack([positives.row, positives.batch], 1))
    assert seen.max() == 1


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_shards_equal_the_whole_bit_for_bit(dtype, count):
    """Values are dyadic, so that sums are exact in any order; what is left to differ is rounding, keyed by global row."""
    torch.manual_seed(1)
    n, width, groups, size, fan_in = 8, 24, 11, 16, 6
    args = StepArgs(lr=2**-10 * 0.625, scale=2**-3, momentum=0.5, loss="squared_hinge", seed=4, step=9)
    x = torch.randint(-3, 4, (n, width)) / 4

    def grid(*shape):
        return (torch.randint(-8, 9, shape) / 8).to(DTYPES[dtype])

    tail = TailState(
        grid(groups, size, fan_in),
        random_features(2, groups, width, fan_in, 0),
        grid(groups, size, fan_in),
        None,
        None,
        2**33,
        groups * size - 5,
        2,
    )
    head = HeadState(grid(35, width), grid(35, width), None, None, 2**33 - 500)
    for step, state, items, per, rows in ((tail_step, tail, groups, size, tail.rows), (head_step, head, 35, 1, 35)):
        positives = make_positives(n, rows, 0.1)
        whole = copy.deepcopy(state)
        dx, loss = step(x, positives, whole, args, True)
        parts, sum_dx, sum_loss = [], torch.zeros_like(dx), torch.zeros(())
        for ids in torch.arange(items).tensor_split(count):
            a, b = int(ids[0]), int(ids[-1]) + 1
            mine = replace(
                state, weight=state.weight[a:b].clone(), momentum=state.momentum[a:b].clone(), first_row=state.first_row + a * per
            )
            if isinstance(mine, TailState):
                mine = replace(mine, index=tail.index[a:b], rows=min(b * per, rows) - a * per, first_group=2 + a)
            inside = (positives.row >= a * per) & (positives.row < b * per)
            part_dx, part_loss = step(x, Positives(positives.batch[inside], positives.row[inside] - a * per), mine, args, True)
            sum_dx, sum_loss = sum_dx + part_dx, sum_loss + part_loss
            parts.append(mine)
        assert torch.equal(torch.cat([p.weight for p in parts]).float(), whole.weight.float())
        assert torch.equal(torch.cat([p.momentum for p in parts]).float(), whole.momentum.float())
        assert torch.equal(sum_dx, dx)
        assert not torch.equal(state.weight.float(), whole.weight.float())
        torch.testing.assert_close(sum_loss, loss)


def test_padded_rows_have_no_part():
    """Neither loss nor dx sees what a padded row holds, and a zero row stays zero, rounding and all."""
    torch.manual_seed(2)
    tail = make_tail(2, 16, 4, 10, 5, torch.bfloat16, torch.bfloat16, True)
    x, args = torch.randn(6, 10), StepArgs(0.1, 1.0, weight_decay=0.1)
    positives = make_positives(6, tail.rows, 0.2)
    loud = copy.deepcopy(tail)
    loud.weight[1, 11:], loud.bias[1, 11:] = 1e4, 1e4
    for value in (tail.weight, tail.momentum, tail.bias, tail.bias_momentum):
        value[1, 11:] = 0
    dx, loss = tail_step(x, positives, tail, args, True)
    loud_dx, loud_loss = tail_step(x, positives, loud, args, True)
    assert torch.equal(dx, loud_dx)
    assert torch.equal(loss, loud_loss)
    assert all(value[1, 11:].abs().max() == 0 for value in (tail.weight, tail.momentum, tail.bias, tail.bias_momentum))


def test_loss_only_when_asked_and_x_untouched():
    head, tail = make_head(5, 6, torch.float32, None, False), make_tail(2, 4, 3, 6, 1, torch.float32, None, False)
    x = torch.randn(3, 6, requires_grad=True)
    before = x.detach().clone()
    for step, state in ((head_step, head), (tail_step, tail)):
        dx, loss = step(x, make_positives(3, 5, 0.3), state, StepArgs(0.1, 1.0))
        assert loss is None
        assert not dx.requires_grad
    assert torch.equal(x, before)


def test_extreme_logits_stay_finite():
    head = HeadState(torch.tensor([[1e4], [-1e4]]), None, None, None, 0)
    dx, loss = head_step(torch.tensor([[1.0], [-1.0]]), Positives(torch.tensor([0]), torch.tensor([1])), head, StepArgs(0.1, 1.0), True)
    assert loss.item() == pytest.approx(3e4)
    assert dx.isfinite().all()


def test_padding_in_an_inner_group_is_refused():
    tail = make_tail(3, 4, 2, 6, 0, torch.float32, None, False)
    with pytest.raises(ValueError, match="only the last"):
        tail_step(torch.randn(2, 6), make_positives(2, 4, 0.5), replace(tail, rows=8), StepArgs(0.1, 1.0))


def test_state_that_cannot_be_updated_in_place_is_refused():
    """A weight that is not contiguous would be copied, and the update lost: better an error."""
    tail = make_tail(3, 4, 2, 6, 0, torch.float32, None, False)
    tail.weight = tail.weight.transpose(0, 1).contiguous().transpose(0, 1)
    with pytest.raises(RuntimeError, match="view"):
        tail_step(torch.randn(2, 6), make_positives(2, 4, 0.5), tail, StepArgs(0.1, 1.0))
