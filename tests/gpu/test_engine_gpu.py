"""The encoder in bfloat16 under DeepSpeed on a GPU: its state leaves and comes back, and the next update is the same."""

from pathlib import Path

import pytest
import torch
from tiny import check_restored_engine, make_prepared

from haste_dist.world import join_world

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_a_restored_engine_takes_the_same_next_step(tmp_path: Path, zero: int) -> None:
    config = make_prepared(tmp_path, overrides=["launch.device=cuda", f"encoder.zero={zero}"])
    check_restored_engine(config, join_world("cuda"))
