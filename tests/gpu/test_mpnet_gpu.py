"""MPNet through fused attention in bfloat16: as exact as transformers' own, and the same where its passes are recorded.

Run on a GPU host: python -m pytest tests/gpu
"""

import copy

import pytest
import torch
from transformers import AutoConfig, AutoModel

from haste_dist.encoder import Encoder
from haste_dist.graphs import LEAST_TOKENS, GraphedModule

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

pytestmark = pytest.mark.gpu
SIZES = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 256, "vocab_size": 100}


def make_texts(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(5, 99, (5, tokens), device="cuda")
    mask = torch.ones_like(ids)
    mask[0, 7:] = mask[1, tokens - 3 :] = 0
    return ids, mask


def means_of(model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    keep = mask.unsqueeze(-1)
    return (model(input_ids=ids, attention_mask=mask).last_hidden_state * keep).sum(1) / keep.sum(1)


@pytest.mark.parametrize("tokens", [24, 61, 256])
def test_bfloat16_is_as_exact_as_attention_written_out(tokens: int) -> None:
    """Embeddings and the gradient of all weights at once, against float64: an error of at most 1.5 times that of transformers."""
    torch.manual_seed(tokens)
    truth = AutoModel.from_config(AutoConfig.for_model("mpnet", **SIZES), add_pooling_layer=False).cuda().eval()
    with torch.no_grad():
        truth.encoder.relative_attention_bias.weight.normal_()
    truth.to(torch.bfloat16).double()  # what bfloat16 holds
    plain, fused = copy.deepcopy(truth).bfloat16(), Encoder(copy.deepcopy(truth).bfloat16())
    ids, mask = make_texts(tokens)
    results = [means_of(truth, ids, mask), means_of(plain, ids, mask), fused(ids, mask)]
    given = torch.randn(5, 128, device="cuda")
    gradients = []
    for x_BD, model in zip(results, (truth, plain, fused.model), strict=True):
        x_BD.backward(given.to(x_BD.dtype))
        gradients.append(torch.cat([p.grad.double().flatten() for p in model.parameters()]))
    for name, (exact, own, ours) in {"embeddings": results, "gradients": gradients}.items():
        errors = [((x.double() - exact).norm() / exact.norm()).item() for x in (own, ours)]
        print(f"{tokens} tokens, {name}: {errors[0]:.2e} written out, {errors[1]:.2e} fused")
        assert 0 < errors[1] <= 1.5 * errors[0]


def test_recorded_passes_are_launched_ones() -> None:
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model("mpnet", **SIZES), add_pooling_layer=False).cuda().bfloat16().eval()
    launched, recorded = (GraphedModule(Encoder(copy.deepcopy(model)), most).train() for most in (0, LEAST_TOKENS))
    for module in (launched, recorded):
        for part in module.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.0
    for tokens in (24, 61, 24, 61, 24, 61):
        ids, mask = make_texts(tokens)
        one, other = launched(ids, mask), recorded(ids, mask)
        assert torch.equal(one, other)
        given = torch.randn_like(one)
        gradients = [torch.autograd.grad(x, module.flat, given)[0] for x, module in ((one, launched), (other, recorded))]
        torch.testing.assert_close(gradients[1], gradients[0], rtol=0.02, atol=1e-3)
    assert recorded.replays == 4
