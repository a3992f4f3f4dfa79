"""Sparse linear layers on a GPU: half precision against float64 and plain torch, every choice of tiles, large offsets, torch.compile."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from haste_kernels import backend, linear, random_features, reference, slab_linear, slabs
from haste_kernels.linear import FixedFanInLinear, GroupSharedLinear, grad_weight, grad_x, group_shared_linear

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

pytestmark = pytest.mark.gpu
triton_linear = pytest.importorskip("haste_kernels.triton_linear")
CUDA = torch.device("cuda")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty gives NaN: a value that no one writes is seen."""
    empty = torch.empty

    def fill(*shape: Any, **how: Any) -> Tensor:
        made = empty(*shape, **how)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", fill)


def make(n: int, width: int, rows: int, fan_in: int, size: int, dtype: torch.dtype, weight: torch.dtype) -> dict[str, Any]:
    torch.manual_seed(n + rows)
    groups = -(-rows // size)
    return {
        "x": torch.randn(n, width, device=CUDA).to(dtype),
        "weight": torch.randn(groups, size, fan_in, device=CUDA).to(weight),
        "index": random_features(0, groups, width, fan_in, 7, CUDA),
        "bias": torch.randn(rows, device=CUDA),
        "dz": torch.randn(n, rows, device=CUDA).to(dtype),
    }


def through_kernels(given: dict[str, Any], forward: Any = None, dx: Any = None, dw: Any = None) -> tuple[Tensor, ...]:
    x, weight, index, bias, dz = (given[name] for name in ("x", "weight", "index", "bias", "dz"))
    assert backend.use_triton(x)
    z = triton_linear.forward(x, weight, index, bias, dz.shape[1], forward)
    return (
        z,
        triton_linear.grad_x(dz, weight, index, x.shape[1], dx),
        *triton_linear.grad_weight(dz, x, index, torch.empty_like(weight), dw),
    )


def dense(given: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Logits, dx, dW and the biases' gradient by a masked dense layer, every value in ``dtype``."""
    x, weight, index, bias, dz = (given[name] for name in ("x", "weight", "index", "bias", "dz"))
    (groups, size, _), rows = weight.shape, dz.shape[1]
    w = reference.dense_tail(weight, index, x.shape[1])[:rows].to(dtype)
    x, dz = x.to(dtype), dz.to(dtype)
    dw = nn.functional.pad(dz.T @ x, (0, 0, 0, groups * size - rows)).view(groups, size, -1)
    dw = dw.gather(2, index.long()[:, None].expand(-1, size, -1))
    return nn.functional.linear(x, w, bias.to(dtype)), dz @ w, dw, dz.sum(0)


def check(given: dict[str, Any], got: tuple[Tensor, ...]) -> None:
    """Errors at most 1.5 times those of plain torch at the precision of x."""
    truth, naive = dense(given, torch.float64), dense(given, given["x"].dtype)
    assert [value.dtype for value in got] == [given["x"].dtype, given["x"].dtype, given["weight"].dtype, FP32]
    for name, mine, plain, exact in zip(("z", "dx", "dw", "db"), got, naive, truth, strict=True):
        assert mine.shape == exact.shape
        assert not mine.isnan().any(), f"{name}: something was left unwritten"
        error, allowed = (float((value.double() - exact).norm() / exact.norm()) for value in (mine, plain))
        assert error <= 1.5 * allowed + 1e-6, f"{name}: {error:.2e}, plain torch {allowed:.2e}"


@pytest.mark.parametrize(
    ("n", "width", "rows", "fan_in", "size"),
    [
        (300, 384, 5000, 64, 16),
        (256, 768, 4096, 64, 32),
        (512, 768, 8192, 64, 64),
        (77, 384, 3001, 64, 128),  # labels of no multiple of anything
        (1, 384, 1000, 32, 16),
        (200, 200, 999, 33, 24),
        (129, 1024, 2000, 128, 16),
        (100, 1024, 2000, 256, 32),
        (64, 300, 7, 16, 5),
        (130, 384, 1001, 64, 1),
    ],
)
@pytest.mark.parametrize(("dtype", "weight"), [(BF16, BF16), (FP16, FP16), (BF16, FP32), (FP32, FP32)])
def test_kernels_are_as_exact_as_plain_torch(
    n: int, width: int, rows: int, fan_in: int, size: int, dtype: torch.dtype, weight: torch.dtype
) -> None:
    given = make(n, width, rows, fan_in, size, dtype, weight)
    assert triton_linear.supported(given["x"], given["weight"]) or dtype == FP32
    x, index, dz = given["x"], given["index"], given["dz"]
    z = group_shared_linear(x, given["weight"], index, given["bias"], rows)
    check(given, (z, grad_x(dz, given["weight"], index, width), *grad_weight(dz, x, index, size, weight)))


@pytest.mark.parametrize("size", [16, 64])
@pytest.mark.parametrize("op", ["forward", "grad_x", "grad_weight"])
def test_every_choice_of_tiles_gives_the_same(op: str, size: int) -> None:
    given = make(200, 384, 3000, 64, size, BF16, BF16)
    argument = {"forward": "forward", "grad_x": "dx", "grad_weight": "dw"}[op]
    for config in triton_linear.CONFIGS[op]:
        check(given, through_kernels(given, **{argument: config}))


@pytest.mark.skipif(torch.cuda.get_device_capability() < slabs.CAPABILITY, reason="an older GPU")
@pytest.mark.parametrize(
    ("n", "width", "rows", "fan_in", "size"),
    [
        (300, 384, 5000, 64, 16),
        (100, 768, 8180, 64, 32),  # padding, and labels of no multiple of eight
        (33, 768, 3001, 64, 48),  # of no multiple of anything
        (512, 768, 8192, 128, 64),
        (1, 200, 1000, 16, 128),
        (70, 1500, 4100, 32, 16),  # one part a slab of dx
        (129, 904, 2000, 128, 112),
    ],
)
@pytest.mark.parametrize(("dtype", "weight"), [(BF16, BF16), (FP16, FP16), (BF16, FP32), (FP16, FP32)])
def test_kernels_on_slabs(n: int, width: int, rows: int, fan_in: int, size: int, dtype: torch.dtype, weight: torch.dtype) -> None:
    given = make(n, width, rows, fan_in, size, dtype, weight)
    x, w, index, bias, dz = (given[name] for name in ("x", "weight", "index", "bias", "dz"))
    w.view(-1, fan_in)[rows:] = torch.nan  # padding may hold anything
    assert slab_linear.takes("forward", x, w, width)
    assert slab_linear.takes("grad_x", dz, w, width)
    z, dx = slab_linear.forward(x, w, index, bias, rows), slab_linear.grad_x(dz, w, index, width)
    assert torch.equal(dx, slab_linear.grad_x(dz, w, index.int(), width))  # the same bits each time
    w.view(-1, fan_in)[rows:] = 0
    check(given, (z, dx, *grad_weight(dz, x, index, size, weight)))
    z = slab_linear.forward(x, w, index, None, rows)
    given["bias"] = torch.zeros_like(bias)
    assert float((z.double() - dense(given, torch.float64)[0]).norm()) < 0.01 * float(z.double().norm())
    strange = torch.empty(n, rows + 3, dtype=dtype, device=CUDA)[:, 3:].copy_(dz)  # neither whole nor aligned
    assert torch.equal(dx, slab_linear.grad_x(strange, w, index, width))
    shifted = torch.empty(w.numel() + 1, dtype=weight, device=CUDA)[1:].view_as(w).copy_(w)
    assert torch.equal(dx, slab_linear.grad_x(dz, shifted, index.long(), width))


@pytest.mark.skipif(torch.cuda.get_device_capability() < slabs.CAPABILITY, reason="an older GPU")
def test_slabs_through_autograd_in_other_threads() -> None:
    given = make(512, 384, 160_000, 64, 16, BF16, BF16)
    x, w, index, dz = given["x"].requires_grad_(), given["weight"].requires_grad_(), given["index"], given["dz"]
    assert slab_linear.serves("forward", x, w, 384)
    assert slab_linear.serves("grad_x", dz, w, 384)
    exact = dense(given, torch.float64)
    found: list[tuple[Tensor, ...]] = []

    def work() -> None:
        z = group_shared_linear(x, w, index, given["bias"], dz.shape[1])
        found.append((z, *torch.autograd.grad(z, (x, w), dz)))

    torch.use_deterministic_algorithms(True)  # slabs serve all the same
    try:
        for _ in range(2):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(found) == 2
    for mine, again, truth in zip(*found, exact[:3], strict=True):
        assert torch.equal(mine, again)
        assert float((mine.double() - truth).norm() / truth.norm()) < 0.005


def test_slabs_serve_where_they_pay() -> None:
    x, weight = torch.zeros(512, 768, dtype=BF16, device=CUDA), torch.zeros(20_000, 16, 64, dtype=BF16, device=CUDA)
    new = torch.cuda.get_device_capability() >= slabs.CAPABILITY
    assert slab_linear.serves("forward", x, weight, 768) == slab_linear.serves("grad_x", x, weight, 768) == new
    for op in ("forward", "grad_x"):
        assert not slab_linear.serves(op, x[:40], weight, 768)
        assert not slab_linear.serves(op, x.float(), weight, 768)
        assert not slab_linear.serves(op, x, weight[:, :8], 768)
        assert not slab_linear.takes(op, x, weight, 4096)  # not even one part fits
    assert not slab_linear.serves("grad_x", x, weight.view(2500, 128, 64), 768)  # few additions


def test_the_fast_kernels_are_what_runs() -> None:
    given = make(64, 384, 3000, 64, 16, BF16, BF16)
    for op in triton_linear.CONFIGS:
        assert triton_linear.default_config(op, 16, 64, given["x"]).gluon == (op != "grad_x")


@pytest.mark.parametrize(("size", "fan_in"), [(16, 64), (1, 4)])
def test_offsets_beyond_31_bits(size: int, fan_in: int) -> None:
    """More than 2^31 logits: the last rows and labels are right, forwards and backwards."""
    n, rows, width = 4100, 524_303, 128
    torch.manual_seed(0)
    groups = -(-rows // size)
    x = torch.randn(n, width, device=CUDA).bfloat16()
    weight = torch.randn(groups, size, fan_in, device=CUDA).bfloat16()
    index = random_features(0, groups, width, fan_in, 7, CUDA)
    z = group_shared_linear(x, weight, index, None, rows)
    assert z.numel() > 2**31
    some = slice(groups - 40, groups)
    first = (groups - 40) * size
    w = reference.dense_tail(weight[some], index[some], width)[: rows - first]
    torch.testing.assert_close(z[-50:, first:].double(), x[-50:].double() @ w.T, rtol=0.02, atol=0.05)
    z[:, :first] = 0
    z[:-50] = 0
    dw, db = grad_weight(z, x, index, size, BF16)
    exact = z[-50:, first:].double().T @ x[-50:].double()
    exact = nn.functional.pad(exact, (0, 0, 0, 40 * size - len(exact))).view(40, size, -1)
    torch.testing.assert_close(dw[some].double(), exact.gather(2, index[some].long()[:, None].expand(-1, size, -1)), rtol=0.02, atol=0.5)
    assert not dw[: groups - 40].any()
    torch.testing.assert_close(db, z[-50:].float().sum(0))
    dx = grad_x(z, weight, index, width)
    torch.testing.assert_close(dx[-50:].double(), z[-50:, first:].double() @ w, rtol=0.02, atol=2.0)
    assert not dx[:-50].any()


def test_deterministic_torch_gives_the_same_bits() -> None:
    given = make(200, 384, 20_000, 64, 16, BF16, BF16)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (grad_x(given["dz"], given["weight"], given["index"], 384) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(first, second)


@pytest.mark.parametrize("layer", [lambda: GroupSharedLinear(384, 3001, device=CUDA), lambda: FixedFanInLinear(384, 3001, 32, device=CUDA)])
@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_autocast_and_compile(layer: Callable[[], GroupSharedLinear], dtype: torch.dtype) -> None:
    module = layer()
    compiled = torch.compile(module, fullgraph=True)
    for n in (70, 131):
        x = torch.randn(n, 384, device=CUDA, requires_grad=True)
        found = []
        for run in (module, compiled):
            with torch.autocast("cuda", dtype):
                z = run(x)
            assert z.dtype == dtype  # one process runs both types: their graphs must not be mixed up
            found.append((z, *torch.autograd.grad(z.float().square().mean(), [x, module.weight, module.bias])))
        for mine, other in zip(*found, strict=True):
            assert float((mine - other).norm() / mine.norm()) < 1e-2  # dx sums in any order


@pytest.mark.parametrize("size", [8, 1])
def test_torch_accepts_the_operations(size: int) -> None:
    given = make(5, 40, 61, 16, size, BF16, BF16)
    x, weight, bias, dz = (given[name].requires_grad_() for name in ("x", "weight", "bias", "dz"))
    torch.library.opcheck(group_shared_linear, (x, weight, given["index"], bias, 61))
    torch.library.opcheck(grad_x, (dz, weight, given["index"], 40))
    torch.library.opcheck(grad_weight, (dz, x, given["index"], size, BF16))


def test_tensors_must_share_a_device() -> None:
    given = make(5, 40, 61, 16, 8, BF16, BF16)
    with pytest.raises(ValueError, match="on one device"):
        linear._check(given["weight"], given["index"].cpu(), 61)


def test_a_layer_on_a_gpu_learns_as_on_a_cpu() -> None:
    losses: dict[str, list[float]] = {"cpu": [], "cuda": []}
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        layer = GroupSharedLinear(64, 500, 32)
        x, y = torch.randn(96, 64), torch.randint(0, 500, (96,))
        layer, x, y = layer.to(device), x.to(device), y.to(device)
        optimizer = torch.optim.SGD(layer.parameters(), lr=1.0, momentum=0.9)
        for _ in range(30):
            with torch.autocast(device, BF16):
                loss = nn.functional.cross_entropy(layer(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[device].append(loss.item())
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=0.05, abs=0.01)
    assert losses["cuda"][-1] < 0.01 * losses["cuda"][0]
