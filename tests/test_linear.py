"""Sparse linear layers: plain torch against a dense layer, what torch expects of an operation, and the kernels in the interpreter."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from haste_kernels import index_dtype, linear, random_features, reference
from haste_kernels.linear import FixedFanInLinear, GroupSharedLinear, grad_weight, grad_x, group_shared_linear

no_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU tests cover this where there is no interpreter")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty gives NaN: a value that no one writes is seen."""
    with torch.device("cpu"):
        torch.ones(0)  # torch keeps for good the factories that it finds when it first needs a default device
    empty = torch.empty

    def fill(*shape: Any, **how: Any) -> Tensor:
        made = empty(*shape, **how)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", fill)


def make(n: int, width: int, rows: int, fan_in: int, size: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Inputs of the three operations."""
    torch.manual_seed(n + rows)
    groups = -(-rows // size)
    return {
        "x": torch.randn(n, width, dtype=dtype),
        "weight": torch.randn(groups, size, fan_in, dtype=dtype),
        "index": random_features(0, groups, width, fan_in, 7),
        "bias": torch.randn(rows, dtype=dtype),
        "dz": torch.randn(n, rows, dtype=dtype),
    }


def dense(x: Tensor, weight: Tensor, index: Tensor, bias: Tensor | None, dz: Tensor) -> tuple[Tensor, ...]:
    """Logits, dx, dW and the biases' gradient in float64 by a masked dense layer."""
    (groups, size, _), rows = weight.shape, dz.shape[1]
    w = reference.dense_tail(weight, index, x.shape[1])[:rows]
    dw = nn.functional.pad(dz.double().T @ x.double(), (0, 0, 0, groups * size - rows)).view(groups, size, -1)
    dw = dw.gather(2, index.long()[:, None].expand(-1, size, -1))
    return reference.logits(x, w, bias), dz.double() @ w, dw, dz.double().sum(0)


def assert_near(got: tuple[Tensor, ...], truth: tuple[Tensor, ...], tolerance: float = 2e-6) -> None:
    for mine, exact in zip(got, truth, strict=True):
        assert mine.shape == exact.shape
        assert not mine.isnan().any(), "something was left unwritten"
        assert float((mine.double() - exact).norm() / exact.norm()) < tolerance


def operations(x: Tensor, weight: Tensor, index: Tensor, bias: Tensor | None, dz: Tensor) -> tuple[Tensor, ...]:
    z = group_shared_linear(x, weight, index, bias, dz.shape[1])
    return z, grad_x(dz, weight, index, x.shape[1]), *grad_weight(dz, x, index, weight.shape[1], weight.dtype)


@pytest.mark.parametrize(("rows", "size"), [(100, 16), (96, 16), (37, 64), (50, 5), (23, 1)])
@pytest.mark.parametrize("budget", [8 << 20, 4000])
def test_plain_torch_is_the_masked_dense_layer(rows: int, size: int, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("haste_kernels.chunks.CPU_BYTES", budget)
    given = make(11, 40, rows, 9, size)
    assert_near(operations(**given), dense(**given))


@pytest.mark.parametrize(("kind", "size"), [(GroupSharedLinear, {"group_size": 4}), (FixedFanInLinear, {})])
def test_gradients_of_every_order_are_those_of_differences(kind: Any, size: dict[str, int]) -> None:
    layer = kind(12, 10, fan_in=5, dtype=torch.float64, **size)
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))

    leaves = (x, layer.weight.detach().requires_grad_(), layer.bias.detach().requires_grad_())
    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.parametrize("size", [8, 1])
def test_torch_accepts_the_operations(size: int) -> None:
    given = make(5, 20, 21, 6, size)
    x, weight, bias, dz = (given[name].requires_grad_() for name in ("x", "weight", "bias", "dz"))
    torch.library.opcheck(group_shared_linear, (x, weight, given["index"], bias, 21))
    torch.library.opcheck(group_shared_linear, (x, weight, given["index"], None, 21))
    torch.library.opcheck(grad_x, (dz, weight, given["index"], 20))
    torch.library.opcheck(grad_weight, (dz, x, given["index"], size, torch.float32))


@pytest.mark.parametrize("autocast", [False, True])
def test_compiled_layer_is_the_same(autocast: bool) -> None:
    torch.manual_seed(0)
    layer = GroupSharedLinear(20, 37, 6, 8)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for n in (4, 6):  # the second shape compiles for any
        x = torch.randn(n, 3, 20, requires_grad=True)
        found = []
        for run in (layer, compiled):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                z = run(x)
            assert z.dtype == (torch.bfloat16 if autocast else torch.float32)
            found.append((z, *torch.autograd.grad(z.float().square().sum(), [x, layer.weight, layer.bias])))
        for mine, other in zip(*found, strict=True):
            torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_autocast_takes_its_own_type_and_gradients_keep_the_parameters(half: torch.dtype) -> None:
    layer = GroupSharedLinear(20, 37, 6, 8)
    x = torch.randn(5, 20, requires_grad=True)
    with torch.autocast("cpu", half):
        z = layer(x)
    assert z.dtype == half
    torch.testing.assert_close(z.float(), layer(x), rtol=0.05, atol=0.05)
    z.float().sum().backward()
    assert [value.grad.dtype for value in (x, *layer.parameters()) if value.grad is not None] == [torch.float32] * 3
    with torch.autocast("cpu", half):
        assert layer.double()(x.double()).dtype == torch.float64  # as torch.nn.Linear


def test_types_follow_the_input_and_the_parameters() -> None:
    layer = GroupSharedLinear(20, 37, 6, 8).bfloat16()
    assert layer.index.dtype == torch.int16
    x = torch.randn(5, 20, requires_grad=True)
    z = layer(x)
    assert z.dtype == torch.float32
    z.sum().backward()  # an expanded gradient
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert layer.weight.grad is not None
    assert layer.weight.grad.dtype == torch.bfloat16


def test_a_model_that_uses_a_layer_twice_learns() -> None:
    torch.manual_seed(1)
    layer = GroupSharedLinear(24, 24, 8, 4)
    out = FixedFanInLinear(24, 9, 12)
    model = nn.Sequential(layer, nn.GELU(), layer, nn.GELU(), out)
    x, y = torch.randn(64, 24), torch.randint(0, 9, (64,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_a_layer_is_an_ordinary_module() -> None:
    layer = GroupSharedLinear(300, 37, 6, 8, seed=3)
    assert set(layer.state_dict()) == {"weight", "bias", "index"}
    assert layer.weight.shape == (5, 8, 6)
    assert layer.index.dtype == index_dtype(300)
    assert not layer.weight.detach().view(-1, 6)[37:].any()
    x = torch.randn(2, 3, 300)
    other = GroupSharedLinear(300, 37, 6, 8, seed=4)
    assert not torch.equal(other.index, layer.index)
    other.load_state_dict(layer.state_dict())
    for twin in (other, copy.deepcopy(layer)):
        assert torch.equal(twin(x), layer(x))
    assert layer(x).shape == (2, 3, 37)
    assert layer(x[0, 0]).shape == (37,)
    assert layer(x[:0]).shape == (0, 3, 37)
    layer(x[:0]).sum().backward()
    assert not layer.weight.grad.any()
    assert GroupSharedLinear(300, 37, 6, bias=False).bias is None
    assert "group_size=1" in repr(FixedFanInLinear(300, 37, 6))


def test_a_layer_can_start_without_memory() -> None:
    layer = GroupSharedLinear(300, 10**9, 64, 16, device="meta")
    assert layer.weight.shape == (62_500_000, 16, 64)
    assert layer(torch.empty(7, 300, device="meta")).shape == (7, 10**9)
    small = GroupSharedLinear(300, 37, 6, 8, device="meta", seed=3).to_empty(device="cpu")
    small.reset_parameters()
    assert torch.equal(small.index, GroupSharedLinear(300, 37, 6, 8, seed=3).index)
    assert not small(torch.randn(2, 300)).isnan().any()


def test_mistakes_are_told() -> None:
    with pytest.raises(ValueError, match="fan-in at most"):
        GroupSharedLinear(8, 10, fan_in=9)
    with pytest.raises(ValueError, match="the input has 7 features"):
        GroupSharedLinear(8, 10, 4)(torch.randn(2, 7))
    given = make(3, 20, 21, 6, 8)
    with pytest.raises(ValueError, match="only the last may be padded"):
        group_shared_linear(given["x"], given["weight"], given["index"], None, 8)
    with pytest.raises(ValueError, match="one row of features"):
        group_shared_linear(given["x"], given["weight"], given["index"][:2], None, 21)


# ---- Kernels


def through_kernels(given: dict[str, Any], forward: Any, dx: Any, dw: Any) -> tuple[Tensor, ...]:
    from haste_kernels import triton_linear

    x, weight, index, bias, dz = (given[name] for name in ("x", "weight", "index", "bias", "dz"))
    z = triton_linear.forward(x, weight, index, bias, dz.shape[1], forward)
    return (
        z,
        triton_linear.grad_x(dz, weight, index, x.shape[1], dx),
        *triton_linear.grad_weight(dz, x, index, torch.empty_like(weight), dw),
    )


@no_interpreter
@pytest.mark.parametrize(
    ("n", "width", "rows", "fan_in", "size", "units", "bias"),
    [
        (70, 40, 100, 20, 16, (4, 4), True),
        (128, 40, 96, 32, 16, (8, 4), False),  # nothing ragged
        (200, 40, 50, 16, 16, (2, 2), True),  # more batch tiles than the interpreter has multiprocessors
        (133, 40, 70, 33, 24, (3, 2), True),  # labels and fan-in that are no power of two
        (65, 90, 130, 64, 64, (2, 2), True),
        (3, 40, 4, 8, 5, (4, 4), True),  # less than one group
    ],
)
def test_tensor_core_kernels(n: int, width: int, rows: int, fan_in: int, size: int, units: tuple[int, ...], bias: bool) -> None:
    pytest.importorskip("triton")
    from haste_kernels.triton_linear import LinearConfig

    given = make(n, width, rows, fan_in, size)
    if not bias:
        given["bias"] = None
    labels = 32 if size > 16 else 16
    got = through_kernels(
        given,
        LinearConfig(64, labels, 1 << units[0].bit_length() - 1, 1, 255),
        LinearConfig(32, gluon=False),
        LinearConfig(64 if n > 64 else 32, labels, units[1], 1),
    )
    assert_near(got, dense(**given))


@no_interpreter
@pytest.mark.parametrize(
    ("n", "rows", "fan_in", "size"), [(70, 100, 20, 16), (130, 96, 32, 32), (65, 70, 33, 24), (130, 75, 10, 1), (64, 128, 8, 1)]
)
def test_kernels_for_any_type_and_for_labels_of_their_own(n: int, rows: int, fan_in: int, size: int) -> None:
    pytest.importorskip("triton")
    from haste_kernels.triton_linear import PLAIN

    given = make(n, 40, rows, fan_in, size)
    assert_near(through_kernels(given, PLAIN, PLAIN, PLAIN), dense(**given))


@no_interpreter
def test_a_layer_over_the_kernels_differentiates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strided gradients, an input in another order, infinities that nobody reads, and the second derivative."""
    pytest.importorskip("triton")
    layer = GroupSharedLinear(20, 37, 6, 8)
    x = torch.randn(20, 70).T.requires_grad_()
    mine, truth = [], []
    for found, kernels in ((truth, False), (mine, True)):
        monkeypatch.setattr(linear, "use_triton", lambda x, on=kernels: on)
        z = layer(x)
        (dx,) = torch.autograd.grad(z[:, ::2].square().sum(), x, create_graph=True)
        found += [z, dx, *torch.autograd.grad(dx.square().sum(), [x, layer.weight])]
    for a, b in zip(mine, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    unread = next(d for d in range(20) if d not in layer.index[0])
    with torch.no_grad():
        x[:, unread] = torch.inf
        assert layer(x)[:, :8].isfinite().all()


@no_interpreter
def test_every_choice_of_tiles_is_possible() -> None:
    pytest.importorskip("triton")
    from haste_kernels import triton_linear

    for configs in triton_linear.CONFIGS.values():
        assert len(set(configs)) == len(configs)
        for config in configs:
            assert config.units % config.warps == 0 or not config.gluon
            assert 32 * config.warps * (config.registers or 0) * config.resident <= triton_linear.REGISTERS
    for op, configs in triton_linear.CONFIGS.items():
        for size in (2, 16, 32, 64, 128):
            assert triton_linear.default_config(op, size, 64, torch.zeros(4, 4)).batch in {c.batch for c in configs}


@no_interpreter
def test_a_bias_may_be_one_number_expanded() -> None:
    triton_linear = pytest.importorskip("haste_kernels.triton_linear")
    given = make(40, 30, 50, 16, 16)
    one = torch.ones(()).expand(50)
    assert one.stride() == (0,)
    z = triton_linear.forward(given["x"], given["weight"], given["index"], one, 50)
    torch.testing.assert_close(z, triton_linear.forward(given["x"], given["weight"], given["index"], torch.ones(50), 50))
