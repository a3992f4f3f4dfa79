"""The whole loop on a GPU: a run that is stopped and resumed goes on as an unbroken one."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import WORDS, make_prepared, read_losses

from haste_dist.encoder import build_encoder
from haste_dist.runlog import read_events
from haste_dist.train import train
from haste_dist.world import join_world

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_resumed_run_goes_on_as_the_unbroken_one(tmp_path: Path, accumulation: int) -> None:
    """From pretrained weights in bfloat16, with dropout and rewiring; stops fall inside epochs, before and after an evaluation."""
    words = [
        "launch.device=cuda",
        "encoder.graphs=true",
        "encoder.dropout=0.2",
        "output.tail_dropout=0.1",
        "output.deterministic=true",
        "rewire.until=1",
    ]
    unbroken = make_prepared(tmp_path, overrides=[*words, f"train.accumulation={accumulation}"])
    build_encoder(unbroken.encoder, WORDS + 2, 0).model.save_pretrained(tmp_path / "encoder")
    unbroken.encoder.name = str(tmp_path / "encoder")
    world = join_world("cuda")
    train(unbroken, world)
    broken = copy.deepcopy(unbroken)
    broken.run.folder += "-broken"
    for stop in (8, 20, 0):
        broken.train.max_steps = stop
        train(broken, world)
    assert [e["step"] for e in read_events(broken.run.folder) if e["event"] == "start"] == [0, 8, 20]
    # The encoder's own kernels may add in another order: bfloat16 noise is 1e-3, dropout left off after a resume is 1e-2 and more.
    np.testing.assert_allclose(read_losses(broken.run.folder), read_losses(unbroken.run.folder), rtol=2e-3)
