"""The Triton top-k in the interpreter, float32: exact, ties by lower row, padding, odd scores, chunks, shards, beyond 2^31 rows."""

import pytest

pytest.importorskip("triton")

import torch
from torch import Tensor

from haste_kernels import HeadState, TailState, merge_topk, random_features, reference, triton_maxima, triton_topk
from haste_kernels.triton_choose import LIST, choose, rank
from haste_kernels.triton_maxima import HeadTiles, TailTiles

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU tests cover this where there is no interpreter")
CONFIGS = {"tail_tiles": TailTiles(16, 4, 1), "head_tiles": HeadTiles(16, 64, 4, 1)}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.empty gives NaN, or a number that means nothing: a value that no one writes is seen."""
    with torch.device("cpu"):
        torch.ones(0)  # torch keeps for good the factories that it finds when it first needs a default device
    empty = torch.empty

    def fill(*shape: int, **how: object) -> Tensor:
        made = empty(*shape, **how)
        return made.fill_(torch.nan if made.is_floating_point() else 12345)

    monkeypatch.setattr(torch, "empty", fill)


def whole(levels: int, *shape: int) -> Tensor:
    """Whole numbers, few of them: many scores are equal, and all are exact in float32."""
    return torch.randint(-levels, levels + 1, shape).float()


def make(groups: int, size: int, padded: int, head_rows: int, width: int, fan_in: int, n: int, levels: int, bias: bool = True):
    torch.manual_seed(groups + size + n)
    head = HeadState(whole(levels, head_rows, width), None, whole(levels, head_rows) if bias else None, None, 2**33)
    tail = TailState(
        whole(levels, groups, size, fan_in), random_features(0, groups, width, fan_in, 1), None,
        whole(levels, groups, size) if bias else None, None, 2**33 + 5000, groups * size - padded, 0,
    )  # fmt: skip
    return whole(levels, n, width), whole(levels, n, width), head, tail


def expected(x_head: Tensor, x_tail: Tensor, head: HeadState, tail: TailState, k: int) -> tuple[Tensor, Tensor]:
    dense = reference.dense_tail(tail.weight, tail.index, x_tail.shape[1])
    z_tail = reference.logits(x_tail, dense, None if tail.bias is None else tail.bias.view(-1))[:, : tail.rows]
    z = torch.cat([reference.logits(x_head, head.weight, head.bias), z_tail], 1)
    rows = torch.cat([head.first_row + torch.arange(len(head.weight)), tail.first_row + torch.arange(tail.rows)])
    scores, best = reference.topk(z, rows, k)
    return scores.float(), best


@pytest.mark.parametrize(
    ("shape", "n", "k", "levels", "bias", "chunk"),
    [
        ((20, 16, 5, 300, 20, 16), 37, 9, 1, True, 4096),
        ((40, 16, 15, 0, 40, 20), 17, 5, 30, False, 2),  # no head, fan-in not whole, chunks
        ((33, 32, 31, 0, 48, 48), 20, 128, 1, True, 4096),
        ((9, 64, 3, 257, 33, 33), 18, 1, 30, True, 2),  # a chunk that holds the head's end and the tail's start
        ((3, 128, 100, 300, 70, 70), 17, 60, 0, False, 2),  # all scores are equal
        ((0, 16, 0, 20, 9, 4), 3, 40, 3, True, 4096),  # no tail, fewer rows than k
        ((1, 16, 15, 0, 20, 16), 1, 3, 3, True, 4096),  # one real row
    ],
)
def test_equals_reference(shape, n, k, levels, bias, chunk, monkeypatch) -> None:
    monkeypatch.setattr(triton_topk, "CHUNK_SPANS", chunk)
    parts = make(*shape, n, levels, bias)
    scores, rows = triton_topk.topk(*parts, k, **CONFIGS)
    true_scores, true_rows = expected(*parts, k)
    assert (scores.dtype, rows.dtype) == (torch.float32, torch.int64)
    assert torch.equal(rows, true_rows)
    assert torch.equal(scores, true_scores)


@pytest.mark.parametrize("tail_tiles", [TailTiles(16, 4, 1, spans=3, phase=1), TailTiles(32, 4, 2, spans=2, phase=2)])
def test_any_order_of_work_gives_the_same(tail_tiles) -> None:
    x, _, head, tail = make(36, 16, 5, 300, 20, 16, 20, 2)
    usual = triton_topk.topk(x, x, head, tail, 7, **CONFIGS)
    other = triton_topk.topk(x, x, head, tail, 7, tail_tiles, HeadTiles(16, 128, 4, 2, phase=1))
    assert torch.equal(usual[0], other[0])
    assert torch.equal(usual[1], other[1])


def test_shards_give_the_same_bits() -> None:
    """Scores of many values, exact in float32. A shard of fewer rows than k returns all of them; their best are the whole's."""
    torch.manual_seed(1)
    tail = TailState(
        whole(500, 9, 16, 24) / 16, random_features(0, 9, 50, 24, 0).int(), None, whole(500, 9, 16) / 16, None, 7, 137, 0
    )  # fmt: skip
    x = whole(100, 18, 50) / 16
    best = triton_topk.topk(None, x, None, tail, 50, **CONFIGS)
    found = []
    for g in range(0, 9, 3):
        part = tail.weight[g : g + 3], tail.index[g : g + 3], None, tail.bias[g : g + 3], None, 7 + 16 * g, min(48, 137 - 16 * g), g
        found.append(triton_topk.topk(None, x, None, TailState(*part), 50, **CONFIGS))
    merged = merge_topk(torch.cat([f[0] for f in found], 1), torch.cat([f[1] for f in found], 1), 50)
    assert torch.equal(best[1], merged[1])
    assert torch.equal(best[0], merged[0])
    z = reference.logits(x, reference.dense_tail(tail.weight, tail.index, 50), tail.bias.view(-1))[:, :137]
    assert torch.equal(best[0].double(), z.topk(50).values)


def test_rows_that_are_infinite_or_nan() -> None:
    """+inf is first, -inf and NaN never appear, and a NaN does not hide its block or span."""
    weight = torch.zeros(600, 1)
    weight[:, 0] = torch.arange(600) / 1000
    weight[599], weight[500], weight[7], weight[550:566] = torch.nan, -torch.inf, torch.inf, torch.nan
    head = HeadState(weight, None, None, None, 10)
    scores, rows = triton_topk.topk(torch.ones(18, 1), None, head, None, 4, **CONFIGS)
    assert rows.tolist() == [[17, 608, 607, 606]] * 18
    assert (scores[:, 0] == torch.inf).all()
    scores, rows = triton_topk.topk(torch.full((18, 1), torch.nan), None, head, None, 4, **CONFIGS)
    assert (rows == -1).all()
    assert (scores == -torch.inf).all()


def test_padded_rows_and_features_of_no_use() -> None:
    """Padded rows hold infinities, and so does a feature of x that no group reads: neither is seen, nor beyond a ragged fan-in."""
    x, _, _, tail = make(5, 16, 6, 0, 20, 10, 18, 2)
    tail.index[:] = torch.arange(1, 11)
    empty = HeadState(torch.zeros(0, 20), None, None, None, 0)
    true_scores, true_rows = expected(x, x, empty, tail, 20)
    tail.weight[-1, 10:], tail.bias[-1, 10:], x[:, 0] = torch.inf, torch.inf, torch.nan
    scores, rows = triton_topk.topk(None, x, None, tail, 20, **CONFIGS)
    assert torch.equal(rows, true_rows)
    assert torch.equal(scores, true_scores)


@pytest.mark.parametrize("levels", [0, 1, 1000])
@pytest.mark.parametrize(("count", "k"), [(300, 7), (300, 128), (5, 9)])
def test_choice_of_columns_and_of_members(levels, count, k) -> None:
    torch.manual_seed(count + k + levels)
    values = torch.randint(-levels, levels + 1, (count, 6)).float()
    values[torch.rand(count, 6) < 0.1] = torch.nan
    values[torch.rand(count, 6) < 0.1] = -torch.inf
    _, best = reference.topk(values.T.double(), torch.arange(count), k)
    chosen = choose(values, k, 5, None, count=count)
    for line, true in zip(chosen.tolist(), best[:5].tolist(), strict=True):
        assert [c for c in line if c >= 0] == sorted(c for c in true if c >= 0)
    members = torch.randn(count * LIST, 6).round(decimals=1)
    inner = choose(members, k, 5, None, parents=chosen)
    lists = members.T[:5].reshape(5, count, LIST)
    scores = lists.gather(1, chosen.clamp(min=0).long()[:, :, None].expand(-1, -1, LIST))
    scores[chosen < 0] = torch.nan
    last = choose(scores.flatten(1), k, 5, None, parents=chosen, by_column=True)
    numbers = (chosen[:, :, None] * LIST + torch.arange(LIST)).flatten(1)
    assert torch.equal(numbers.gather(1, last.clamp(min=0).long())[last >= 0], inner[inner >= 0].long())
    _, rows = rank(scores.flatten(1), chosen, last, None, 3, 100, 10_000)
    for n in range(5):
        ranked = sorted((-float(members[r, n]), int(r)) for r in inner[n] if r >= 0)
        assert [r for r in rows[n].tolist() if r >= 0] == [100 + r if r < 3 * LIST else 10_000 + r - 3 * LIST for _, r in ranked]


def test_only_what_beats_the_floor_is_chosen() -> None:
    values = torch.arange(40.0)[:, None].repeat(1, 2)
    floor = torch.tensor([[50.0, 37.0], [50.0, -torch.inf]])
    assert choose(values, 2, 2, floor, count=40).tolist() == [[38, 39], [38, 39]]
    floor[:, 1] = torch.tensor([38.0, 39.0])
    assert choose(values, 2, 2, floor, count=40).tolist() == [[39, -1], [-1, -1]]


def test_what_is_not_takes() -> None:
    x, _, head, tail = make(3, 16, 0, 20, 9, 4, 3, 1)
    assert triton_topk.takes(x, x, head, tail, 128)
    assert not triton_topk.takes(x, x, head, tail, 129)
    assert not triton_topk.takes(x.double(), None, head, None, 3)
    odd = TailState(tail.weight[:, :4], tail.index, None, None, None, 0, 12, 0)
    assert not triton_topk.takes(None, x, None, odd, 3)
    with pytest.raises(ValueError, match="no Triton kernel"):
        triton_topk.topk(None, x, None, odd, 3)
    for scores, rows in (triton_topk.topk(x, x, None, None, 2), triton_topk.topk(None, x, None, make(0, 16, 0, 0, 9, 4, 3, 1)[3], 2)):
        assert rows.tolist() == [[-1, -1]] * 3
        assert (scores == -torch.inf).all()


def test_default_tiles_divide_a_span() -> None:
    for config in triton_maxima.HEAD_CANDIDATES:
        assert triton_maxima.SPAN % config.rows == 0
    for n in (1, 17, 512):
        for dtype in (torch.float32, torch.bfloat16):
            assert triton_maxima.default_tail(n, 128, dtype).batch >= 16
            assert triton_maxima.SPAN % triton_maxima.default_head(n, dtype).rows == 0
