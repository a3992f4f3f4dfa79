"""The encoder in bfloat16 under DeepSpeed on a GPU: its state leaves and comes back, and the next update is the same."""

from pathlib import Path

import pytest
import torch
from tiny import make_prepared

from haste_dist.engine import EncoderEngine
from haste_dist.model import make_encoder, open_prepared
from haste_dist.world import join_world

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_a_restored_engine_takes_the_same_next_step(tmp_path: Path, zero: int) -> None:
    config = make_prepared(tmp_path, overrides=["launch.device=cuda", f"encoder.zero={zero}"])
    world = join_world("cuda")
    generator = torch.Generator(device="cuda").manual_seed(0)
    input_ids = torch.randint(2, 200, (4, 9), device="cuda", generator=generator)
    mask = torch.ones_like(input_ids)
    dx_BD = torch.randn(4, config.encoder.width, device="cuda", generator=generator)

    def engine() -> EncoderEngine:
        return EncoderEngine(make_encoder(config, open_prepared(config).manifest), config.encoder, world, 4)

    def step(one: EncoderEngine) -> None:
        one.backward(one.forward(input_ids, mask), dx_BD)
        one.step(1e-3)

    first = engine()
    for _ in range(3):
        step(first)
    weights, moments = first.state()
    assert all(w.dtype == torch.float32 for w in weights.values())
    assert moments["step"].item() == 3
    second = engine()
    second.load_state(weights, moments)
    step(first)
    step(second)
    for ours, theirs in zip(first.state(), second.state(), strict=True):
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")
