"""The fused top-k on a GPU: exact on whole numbers, the same bits for any sharding and tiles, memory, beyond 2^31 weights."""

import pytest
import torch
from torch import Tensor

from haste_kernels import HeadState, TailState, merge_topk, random_features, reference

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

from haste_kernels import triton_topk
from haste_kernels.triton_maxima import HEAD_CANDIDATES, TAIL_CANDIDATES, HeadTiles, TailTiles

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch):
    """torch.empty gives NaN: a value that no one writes is seen."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def make(groups: int, size: int, padded: int, head_rows: int, width: int, fan_in: int, n: int, dtype: torch.dtype, levels: int, bias: bool):
    """Whole numbers up to ``levels``, whose scores are exact and often equal; 0: normal ones."""
    torch.manual_seed(groups + size + n)

    def values(*shape: int) -> Tensor:
        if not levels:
            return torch.randn(*shape, device=CUDA)
        return torch.randint(-levels, levels + 1, shape, device=CUDA).float()

    head_bias, tail_bias = (values(head_rows), values(groups, size)) if bias else (None, None)
    head = HeadState(values(head_rows, width).to(dtype), None, head_bias, None, 2**33)
    index = random_features(0, groups, width, fan_in, 1, CUDA)
    first = 2**33 + 100_000
    tail = TailState(values(groups, size, fan_in).to(dtype), index, None, tail_bias, None, first, groups * size - padded, 0)
    return values(n, width).to(dtype), head, tail


def all_scores(x: Tensor, head: HeadState, tail: TailState) -> tuple[Tensor, Tensor]:
    """(N, rows) float64 and their global rows."""
    dense = reference.dense_tail(tail.weight, tail.index, x.shape[1])
    z_tail = reference.logits(x, dense, None if tail.bias is None else tail.bias.view(-1))[:, : tail.rows]
    row_head = head.first_row + torch.arange(len(head.weight), device=CUDA)
    row_tail = tail.first_row + torch.arange(tail.rows, device=CUDA)
    return torch.cat([reference.logits(x, head.weight, head.bias), z_tail], 1), torch.cat([row_head, row_tail])


def check_exact(x: Tensor, head: HeadState, tail: TailState, k: int, **configs: object) -> None:
    z, rows = all_scores(x, head, tail)
    scores, at = z.sort(dim=1, descending=True, stable=True)
    got = triton_topk.topk(x, x, head, tail, k, **configs)  # type: ignore[arg-type]
    assert torch.equal(got[1], rows[at[:, :k]])
    assert torch.equal(got[0].double(), scores[:, :k])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("shape", "n", "k", "bias"),
    [
        ((700, 16, 5, 3000, 200, 64), 300, 100, True),
        ((700, 16, 15, 0, 768, 64), 65, 128, False),
        ((300, 32, 31, 257, 128, 96), 17, 1, True),
        ((150, 64, 3, 1000, 384, 256), 130, 50, False),
        ((80, 128, 100, 5000, 100, 16), 1, 100, True),
        ((40, 16, 0, 300, 70, 20), 1000, 10, True),
    ],
)
def test_whole_numbers_are_exact(shape, n, k, bias, dtype) -> None:
    check_exact(*make(*shape, n, dtype, 3, bias), k)


def test_chunks_and_zero_weights(monkeypatch) -> None:
    monkeypatch.setattr(triton_topk, "CHUNK_SPANS", 5)
    check_exact(*make(700, 16, 5, 3000, 200, 64, 300, torch.bfloat16, 2, True), 100)
    x, head, tail = make(300, 16, 5, 3000, 200, 64, 70, torch.bfloat16, 2, False)
    head.weight.zero_()
    tail.weight.zero_()
    check_exact(x, head, tail, 128)


def test_rows_that_are_left_out() -> None:
    """By a bias far below all scores (Classifier.leaving_out): what is left is exact."""
    x, head, tail = make(700, 16, 5, 3000, 200, 64, 300, torch.bfloat16, 3, True)
    head.bias[::3] = tail.bias[::2, 5:] = -1e30
    check_exact(x, head, tail, 100)
    head.bias[3:] = tail.bias[:] = -1e30  # two rows are left
    check_exact(x, head, tail, 100)


@pytest.mark.parametrize("n", [16, 200])  # the two kinds of tensor core instructions
@pytest.mark.parametrize("size", [16, 64, 128])
def test_same_bits_for_any_sharding(size: int, n: int) -> None:
    """Shards of 128 rows return all their scores, so this is torch.topk on the same scores."""
    x, head, tail = make(2560 // size, size, 3, 1500, 320, 96, n, torch.bfloat16, 0, True)
    whole = triton_topk.topk(x, x, head, tail, 128)
    found = []
    for start in range(0, 1500, 128):
        stop = min(start + 128, 1500)
        part = HeadState(head.weight[start:stop], None, head.bias[start:stop], None, head.first_row + start)
        found.append(triton_topk.topk(x, None, part, None, 128))
    for start in range(0, 2560, 128):
        a, b = start // size, (start + 128) // size
        part = TailState(
            tail.weight[a:b], tail.index[a:b], None, tail.bias[a:b], None, tail.first_row + start, min(128, tail.rows - start), a
        )  # fmt: skip
        found.append(triton_topk.topk(None, x, None, part, 128))
    scores, rows = torch.cat([f[0] for f in found], 1), torch.cat([f[1] for f in found], 1)
    assert int((rows >= 0).sum()) == n * (1500 + tail.rows)
    merged = merge_topk(scores, rows, 128)
    assert torch.equal(whole[0], scores.topk(128).values)
    assert torch.equal(whole[0], merged[0])
    assert torch.equal(whole[1], merged[1])
    truth, _ = all_scores(x, head, tail)
    naive = torch.cat([x @ head.weight.T + head.bias.bfloat16(), truth[:, 1500:].bfloat16()], 1).double()  # the tail's rounding alone
    best = truth.topk(128).values
    assert (whole[0].double() - best).norm() <= 1.5 * (naive.topk(128).values - best).norm()


def test_all_tiles_give_the_same_bits() -> None:
    x, head, tail = make(900, 16, 5, 2000, 384, 64, 500, torch.bfloat16, 0, True)
    usual = triton_topk.topk(x, x, head, tail, 100)
    for config in TAIL_CANDIDATES:
        tail_best = triton_topk.topk(x, x, head, tail, 100, tail_tiles=config)
        assert torch.equal(usual[0], tail_best[0]), config
        assert torch.equal(usual[1], tail_best[1]), config
    for config in HEAD_CANDIDATES:
        head_best = triton_topk.topk(x, x, head, tail, 100, head_tiles=config)
        assert torch.equal(usual[0], head_best[0]), config
        assert torch.equal(usual[1], head_best[1]), config


def test_logits_take_no_memory() -> None:
    x, _, tail = make(10_000, 16, 5, 1, 256, 64, 512, torch.bfloat16, 0, False)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    triton_topk.topk(None, x, None, tail, 100)
    assert torch.cuda.max_memory_allocated() - before < 160_000 * 512 * 4 / 8


def test_not_a_number_and_infinities() -> None:
    x, head, tail = make(300, 16, 5, 600, 200, 64, 70, torch.bfloat16, 2, False)
    x = x.abs() + 1
    head.weight[7] = torch.inf
    head.weight[20:36] = torch.nan
    tail.weight[9, 3] = -torch.inf
    scores, rows = triton_topk.topk(x, x, head, tail, 5)
    z, true_rows = all_scores(x, head, tail)
    at = z.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf).sort(dim=1, descending=True, stable=True).indices
    assert torch.equal(rows, true_rows[at[:, :5]])
    assert (scores[:, 0] == torch.inf).all()
    scores, rows = triton_topk.topk(
        x, None, HeadState(torch.full((40, 200), -torch.inf, device=CUDA).bfloat16(), None, None, None, 0), None, 5
    )
    assert (rows == -1).all()
    assert (scores == -torch.inf).all()


def test_beyond_2_31_weights() -> None:
    """2.2 million groups of 16 rows and 64 features: 2.25 billion weights, the best rows among the last."""
    groups, n = 2_200_000, 20
    torch.manual_seed(0)
    index = torch.arange(64, device=CUDA, dtype=torch.int16).repeat(groups, 1)
    weight = torch.zeros(groups, 16, 64, device=CUDA, dtype=torch.bfloat16)
    tail = TailState(weight, index, None, None, None, 2**40, groups * 16 - 3, 0)
    x = torch.ones(n, 64, device=CUDA, dtype=torch.bfloat16)
    best = torch.randperm(groups // 50, device=CUDA)[:10] + groups - groups // 50
    weight[best, 7, 0] = torch.arange(10, 0, -1, device=CUDA).bfloat16()
    scores, rows = triton_topk.topk(None, x, None, tail, 10, TailTiles(64, 4, 1, 4), HeadTiles(64, 64, 4, 2))
    assert torch.equal(rows, (2**40 + best * 16 + 7).expand(n, 10))
    assert torch.equal(scores[0], torch.arange(10.0, 0.0, -1.0, device=CUDA))
