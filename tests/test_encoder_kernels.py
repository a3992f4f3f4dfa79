"""The kernels of a transformer's layer in Triton's interpreter, in float32, against float64; and the definitions that those are.

No size is a multiple of its tile, and each backward kernel has more tiles than programs.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from haste_kernels import encoder_ops as ops
from haste_kernels import encoder_reference as reference

SEED = torch.tensor([2**61 + 12345])
needs_interpreter = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the kernels themselves")


def poisoned(*shape: int) -> Tensor:
    return torch.full(shape, float("nan"))


def close(found: Tensor, expected: Tensor, what: str) -> None:
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5, msg=lambda text: f"{what}: {text}")


def gradients(call, inputs: list[Tensor], given: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """What the definition gives in float64, and its gradients."""
    exact = [x.double().requires_grad_() for x in inputs]
    y = call(*exact)
    return y.detach(), torch.autograd.grad(y, exact, given.double())


@needs_interpreter
@pytest.mark.parametrize(("rows", "width", "p"), [(101, 48, 0.3), (70, 96, 0.0), (3, 8, 0.5), (1, 1000, 0.1)])
def test_dropout_add_norm(rows: int, width: int, p: float) -> None:
    triton_norm = pytest.importorskip("haste_kernels.triton_norm")
    torch.manual_seed(rows)
    x, r, dy = (torch.randn(rows, width) for _ in range(3))
    b, w, c = (torch.randn(width) for _ in range(3))
    y, (dx, db, dr, dw, dc) = gradients(lambda *i: reference.dropout_add_norm(*i, p, 1e-5, SEED), [x, b, r, w, c], dy)
    h, mine, mean, rstd = poisoned(rows, width), poisoned(rows, width), poisoned(rows), poisoned(rows)
    triton_norm.norm_forward(x, b, r, w, c, p, 1e-5, SEED, h, mine, mean, rstd)
    close(mine, y, "y")
    to_r = poisoned(rows, width)
    to_x = poisoned(rows, width) if p else to_r
    sums = triton_norm.norm_backward(dy, h, w, mean, rstd, p, SEED, to_r, to_x)
    for what, found, expected in zip("xrbwc", (to_x, to_r, *sums), (dx, dr, db, dw, dc), strict=True):
        close(found, expected, f"gradient of {what}")


@needs_interpreter
@pytest.mark.parametrize(
    ("texts", "tokens", "width", "ids", "p", "padding"),
    [(7, 33, 48, 300, 0.3, 0), (30, 20, 300, 6, 0.0, None), (1, 5, 8, 9, 0.5, 3), (4, 32, 16, 1, 0.0, None), (2, 320, 16, 3, 0.1, 1)],
)
def test_embed(texts: int, tokens: int, width: int, ids: int, p: float, padding: int | None) -> None:
    """Ids that no token has, and ids of more tokens than a chunk has, several chunks together."""
    triton_embed = pytest.importorskip("haste_kernels.triton_embed")
    torch.manual_seed(tokens)
    tokens_BS = torch.randint(0, ids, (texts, tokens)).minimum(torch.randint(0, ids, (texts, tokens)))
    tables = [torch.randn(ids + 2, width), torch.randn(tokens, width), *(torch.randn(width) for _ in range(3))]
    dy = torch.randn(texts, tokens, width)
    y, expected = gradients(lambda *i: reference.embed(tokens_BS, *i, padding, p, 1e-5, SEED), tables, dy)
    mine, mean, rstd = poisoned(texts, tokens, width), poisoned(texts * tokens), poisoned(texts * tokens)
    triton_embed.embed_forward(tokens_BS, *tables, p, 1e-5, SEED, mine, mean, rstd)
    close(mine, y, "y")
    dh, to_word = poisoned(texts, tokens, width), torch.zeros(ids + 2, width)
    sums = triton_embed.embed_backward(dy, tokens_BS, *tables[:4], mean, rstd, p, SEED, dh)
    triton_embed.table_gradient(dh, tokens_BS, to_word, padding)
    for what, found, exact in zip("wpkwc", (to_word, dh.sum(0), *sums), expected, strict=True):
        close(found, exact, f"gradient of {what}")


@needs_interpreter
@pytest.mark.parametrize(("rows", "width"), [(101, 300), (1, 256), (40, 8)])
def test_bias_gelu(rows: int, width: int) -> None:
    triton_gelu = pytest.importorskip("haste_kernels.triton_gelu")
    torch.manual_seed(rows)
    z, dy, b = 3 * torch.randn(rows, width), torch.randn(rows, width), torch.randn(width)
    y, (dz, db) = gradients(reference.bias_gelu, [z, b], dy)
    mine, to_z = poisoned(rows, width), poisoned(rows, width)
    triton_gelu.gelu_forward(z, b, mine)
    close(mine, y, "y")
    close(triton_gelu.gelu_backward(dy, z, b, to_z), db, "gradient of b")
    close(to_z, dz, "gradient of z")


@needs_interpreter
def test_small_values_of_gelu_keep_their_digits() -> None:
    triton_gelu = pytest.importorskip("haste_kernels.triton_gelu")
    z = torch.linspace(-5, -1, 64)[None]
    mine = poisoned(1, 64)
    triton_gelu.gelu_forward(z, torch.zeros(64), mine)
    exact = -z.double() * torch.special.erfc(-z.double() / 2**0.5) / -2
    assert ((mine.double() - exact) / exact).abs().max() < 2e-3  # bfloat16 keeps 4e-3


ATTENTION = [  # texts, tokens, heads, width, p, whether some keys are hidden, whether pairs of places have scores of their own
    (2, 24, 3, 16, 0.2, True, True),
    (3, 16, 2, 32, 0.0, False, False),
    (2, 5, 2, 16, 0.5, True, False),
    (5, 40, 1, 16, 0.5, False, True),
    (7, 9, 3, 16, 0.0, False, True),
    (1, 100, 1, 16, 0.3, True, False),
]


@needs_interpreter
@pytest.mark.parametrize(("texts", "tokens", "heads", "width", "p", "hides", "paired"), ATTENTION)
def test_attention(texts: int, tokens: int, heads: int, width: int, p: float, hides: bool, paired: bool) -> None:
    triton_attention = pytest.importorskip("haste_kernels.triton_attention")
    torch.manual_seed(tokens)
    size = heads * width
    qkv, do = torch.randn(texts, tokens, 3 * size), torch.randn(texts, tokens, size)
    seen = None
    if hides:
        seen = torch.rand(texts, tokens) < 0.7
        seen[:, 0] = True
    pair = torch.randn(heads, tokens, tokens) if paired else None
    inputs = [qkv] if pair is None else [qkv, pair]
    o, [dqkv, *dpair] = gradients(lambda qkv, pair=None: reference.attention(qkv, seen, heads, p, SEED, pair), inputs, do)
    mine, lse, to_qkv = poisoned(texts, tokens, size), poisoned(texts, heads, tokens), poisoned(texts, tokens, 3 * size)
    triton_attention.attention_forward(qkv, pair, seen, heads, p, SEED, mine, lse)
    close(mine, o, "answer")
    to_b, to_pair = triton_attention.attention_backward(do, qkv, pair, seen, lse, heads, p, SEED, to_qkv)
    close(to_qkv, dqkv, "gradient of qkv")
    close(to_b, dqkv.sum((0, 1)), "gradient of the biases")
    assert (to_pair is None) == (pair is None)
    if to_pair is not None:
        close(to_pair, dpair[0], "gradient of the pairs")


@needs_interpreter
def test_a_text_of_padding_alone_answers_zero() -> None:
    """As torch's own attention does; no NaN, and nothing flows back."""
    triton_attention = pytest.importorskip("haste_kernels.triton_attention")
    qkv, seen = torch.randn(2, 6, 48), torch.tensor([[True] * 6, [False] * 6])
    out, lse, to_qkv = poisoned(2, 6, 16), poisoned(2, 1, 6), poisoned(2, 6, 48)
    triton_attention.attention_forward(qkv, None, seen, 1, 0.1, SEED, out, lse)
    triton_attention.attention_backward(torch.randn(2, 6, 16), qkv, None, seen, lse, 1, 0.1, SEED, to_qkv)
    assert out[0].isfinite().all()
    assert to_qkv[0].isfinite().all()
    assert not out[1].any()
    assert not to_qkv[1].any()
    assert not reference.attention(qkv, seen, 1, 0.1, SEED)[1].any()
    q, k, v = qkv.view(2, 6, 3, 16).unbind(2)
    assert not torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None].expand(-1, 6, -1))[1].any()


def strided(*shape: int) -> Tensor:
    return torch.randn(*shape[:-2], shape[-1], shape[-2]).mT


@needs_interpreter
def test_inputs_may_have_any_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(ops, "has_kernels", lambda _: True)
    x, r, seen = strided(2, 5, 16), strided(10, 16), (torch.rand(5, 2) < 0.8).T
    w, b = torch.randn(48, 16), torch.randn(48)
    close(ops.attend(x, w, b, seen, 1, 0.0, None)[0], reference.attention(x @ w.T + b, seen, 1, 0.0, None).double(), "attend")
    one = torch.randn(16)
    y = ops.dropout_add_norm(strided(10, 16).copy_(r * 2), one, r, one, one, 0.0, 1e-5, None)
    close(y, reference.dropout_add_norm(r * 2, one, r, one, one, 0.0, 1e-5, None).double(), "norm")
    close(ops.widen(r, w, b)[0], reference.bias_gelu(r @ w.T, b).double(), "widen")


@pytest.mark.parametrize("rows", [2**21, 40])
def test_no_grid_is_larger_than_a_gpu_takes(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In its second and third axis that is 65,535."""
    triton = pytest.importorskip("triton")
    grids: list[tuple[int, ...]] = []
    monkeypatch.setattr(triton.runtime.interpreter.InterpretedFunction, "run", lambda self, *_, grid, **__: grids.append(grid))

    def made(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, device="meta", dtype=dtype)

    from haste_kernels import triton_attention, triton_embed, triton_gelu, triton_norm

    x, w, row, z, b = made(rows, 768), made(768), made(rows), made(rows, 3072), made(3072)
    qkv, out, lse = made(rows // 8, 8, 2304), made(rows // 8, 8, 768), made(rows // 8, 12, 8)
    ids = made(rows // 8, 8, dtype=torch.int64)
    triton_embed.embed_forward(ids, x, x[:8], w, w, w, 0.1, 1e-5, SEED, x, row, row)
    triton_embed.embed_backward(x, ids, x, x[:8], w, w, row, row, 0.1, SEED, x)
    triton_embed.table_gradient(x, ids, x, 0)
    triton_norm.norm_forward(x, w, x, w, w, 0.1, 1e-5, SEED, x, x, row, row)
    triton_norm.norm_backward(x, x, w, row, row, 0.1, SEED, x, x)
    triton_gelu.gelu_forward(z, b, z)
    triton_gelu.gelu_backward(z, z, b, z)
    triton_attention.attention_forward(qkv, None, None, 12, 0.1, SEED, out, lse)
    triton_attention.attention_backward(out, qkv, None, None, lse, 12, 0.1, SEED, qkv)
    assert len(grids) == 14
    assert all(0 < size <= (2**31 - 1, 65_535, 65_535)[axis] for grid in grids for axis, size in enumerate(grid))


@needs_interpreter
def test_ids_that_a_table_does_not_have_touch_nothing_else() -> None:
    """Their embeddings are no numbers, which the guard of a run sees."""
    triton_embed = pytest.importorskip("haste_kernels.triton_embed")
    torch.manual_seed(0)
    ids = torch.tensor([[1, 12, 3], [-1, 2, 11], [13, 13, 4]]).repeat(1, 20)
    memory, place, w = torch.randn(16, 8), torch.randn(60, 8), torch.ones(8)  # the table is its first 10 rows
    y, mean, rstd = poisoned(3, 60, 8), poisoned(180), poisoned(180)
    triton_embed.embed_forward(ids, memory[:10], place, None, w, w, 0.0, 1e-5, None, y, mean, rstd)
    known = (ids >= 0) & (ids < 10)
    assert torch.equal(y.isnan().any(-1), ~known)
    gradient, dh = torch.zeros(16, 8), torch.randn(3, 60, 8)
    triton_embed.table_gradient(dh, ids, gradient[:10], None)
    assert gradient[1:5].any(1).all()
    assert not gradient[10:].any()
    assert not gradient[0].any()


def test_a_text_longer_than_the_table_of_places_is_refused() -> None:
    w = torch.ones(8)
    with pytest.raises(ValueError, match="texts of 5 tokens, places of 4"):
        ops.embed(torch.zeros(2, 5, dtype=torch.int64), torch.ones(3, 8), torch.ones(4, 8), None, w, w, None, 0.0, 1e-5, None)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_the_first_token_attends_as_all_do(p: float) -> None:
    """Its embedding and all gradients; of the dropped probabilities the mean, for other bits drop them."""
    torch.manual_seed(0)
    inputs = [torch.randn(5, 9, 32), torch.randn(96, 32), torch.randn(96)]
    seen = torch.rand(5, 9) < 0.7
    seen[3] = False  # a text of padding alone
    given = torch.randn(5, 1, 32)

    def first(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return reference.attention(x @ w.T + b, seen, 4, 0.0, None)[:, :1]

    expected, exact = gradients(first, inputs, given)
    leaves = [x.double().requires_grad_() for x in inputs]
    draws = 4000 if p else 1
    many = [ops.attend_first(*leaves, seen, 4, p) for _ in range(draws)]
    found = torch.stack(many).mean(0)
    off = 5 * torch.stack(many).std(0) / draws**0.5 if p else 1e-9
    assert ((found - expected).abs() <= off + 1e-9).all()
    assert not found[3].any()
    if not p:
        for ours, own in zip(torch.autograd.grad(found, leaves, given.double()), exact, strict=True):
            torch.testing.assert_close(ours, own)


def test_all_may_be_dropped() -> None:
    assert not reference.drop(torch.ones(3, 8), 1.0, SEED).any()


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_keeps_its_share_and_the_mean(p: float) -> None:
    """Within 4 standard errors; rows, neighbours and seeds have nothing to do with each other."""
    x = torch.ones(2000, 64)
    one, other = reference.drop(x, p, SEED), reference.drop(x, p, SEED + 1)
    kept, again = one > 0, other > 0
    error = (p * (1 - p) / x.numel()) ** 0.5
    assert abs(kept.double().mean() - (1 - p)) < 4 * error
    assert abs(one.double().mean() - 1) < 4 * error / (1 - p)
    for a, b in ((kept, again), (kept[:, 1:], kept[:, :-1]), (kept[1:], kept[:-1]), (kept[:, 4:], kept[:, :-4])):
        both = (a & b).double().mean()
        assert abs(both - (1 - p) ** 2) < 5 * error


@given(st.integers(1, 70), st.integers(1, 5))
def test_the_order_of_lanes_is_its_own_inverse(columns: int, rows: int) -> None:
    x = torch.arange(rows * columns).view(rows, columns)
    ordered = reference._by_lanes(x)
    assert ordered.shape[1] % 32 == 0
    assert torch.equal(reference._by_lanes(ordered)[:, :columns], x)


@given(st.integers(1, 4096))
def test_a_tile_holds_the_text_and_no_more_than_needed(tokens: int) -> None:
    tile = ops.tile_tokens(tokens)
    assert tile >= tokens
    assert tile == 32 or tile < 2 * tokens


def test_plain_torch_does_it_where_there_are_no_kernels() -> None:
    torch.manual_seed(0)
    x, w, b = torch.randn(2, 7, 32), torch.randn(96, 32), torch.randn(96)
    seen = torch.rand(2, 7) < 0.8
    c, same = ops.attend(x, w, b, seen, 2, 0.1, SEED)
    assert same is x
    assert torch.equal(c, reference.attention(x @ w.T + b, seen, 2, 0.1, SEED))
    y, same = ops.widen(x[0], w, b)
    assert same.data_ptr() == x.data_ptr()
    torch.testing.assert_close(y, torch.nn.functional.gelu(x[0] @ w.T + b))


@pytest.mark.parametrize(
    ("tokens", "width", "takes"), [(128, 64, True), (129, 64, False), (128, 48, False), (128, 128, True), (20, 32, True)]
)
def test_attention_of_short_texts_and_common_heads_has_kernels(tokens: int, width: int, takes: bool) -> None:
    x = torch.empty(2, tokens, 4 * width, device="meta", dtype=torch.bfloat16)
    assert ops.takes_heads(x, width) is takes


def test_on_the_meta_device_there_are_gradients_of_all() -> None:
    def made(*shape: int) -> Tensor:
        return torch.empty(*shape, device="meta", requires_grad=True)

    x, w, b, seed = made(2, 7, 32), made(96, 32), made(96), torch.empty(1, dtype=torch.int64, device="meta")
    c, x2 = ops.attend(x, w, b, None, 2, 0.1, seed)
    y = ops.dropout_add_norm(c.flatten(0, 1), made(32), x2.flatten(0, 1), made(32), made(32), 0.1, 1e-5, seed)
    z, y2 = ops.widen(y, made(64, 32), made(64))
    found = torch.autograd.grad((z.sum(), y2.sum()), (x, w, b))
    assert [g.shape for g in found] == [x.shape, w.shape, b.shape]
