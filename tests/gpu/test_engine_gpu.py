"""The encoder in bfloat16 under DeepSpeed on a GPU: its state leaves and comes back, and the next update is the same."""

from pathlib import Path

import pytest
import torch
from tiny import check_restored_engine, make_prepared

from haste_dist.config import EncoderConfig
from haste_dist.encoder import build_encoder
from haste_dist.engine import EncoderEngine
from haste_dist.world import join_world

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_a_restored_engine_takes_the_same_next_step(tmp_path: Path, zero: int) -> None:
    config = make_prepared(tmp_path, overrides=["launch.device=cuda", f"encoder.zero={zero}"])
    check_restored_engine(config, join_world("cuda"))


def test_compiled_blocks_draw_the_masks_of_eager_ones() -> None:
    """So a run can be compiled, or no more, and stays the run it was; other masks would change every number."""
    world, embedded = join_world("cuda"), []
    ids = torch.randint(5, 99, (16, 32), generator=torch.Generator().manual_seed(0)).cuda()
    for compiled in (False, True):
        torch.manual_seed(3)
        config = EncoderConfig(width=64, heads=2, layers=2, dropout=0.3, precision="float32", compile=compiled, graphs=False)
        engine = EncoderEngine(build_encoder(config, 100, 0, 32), config, world)
        torch.manual_seed(4)
        x_BD = engine.forward(ids, None)
        engine.backward(x_BD, torch.ones_like(x_BD))
        embedded.append((x_BD.detach(), engine.step(1e-3)))
    torch.testing.assert_close(embedded[0], embedded[1], rtol=1e-3, atol=1e-4)
