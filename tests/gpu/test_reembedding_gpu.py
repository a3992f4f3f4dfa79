"""rewire.grow=embeddings on a GPU: as on a CPU, whatever weights are kept in; and a run that is stopped goes on as one that is not."""

import copy
from pathlib import Path

import pytest
import torch
from test_reembedding import GROW, parts
from tiny import make_prepared, read_losses, train_all

from haste_dist.config import Config
from haste_dist.reembedding import reembed
from haste_dist.world import join_world

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

pytestmark = pytest.mark.gpu


def renewed(config: Config, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    world = join_world("cpu" if device == "cpu" else "cuda")
    prepared, engine, classifier = parts(config, world)
    reembed(config, prepared, engine, classifier, world, 0.6)
    return classifier.tail.index.cpu(), classifier.tail.weight.cpu().float()


@pytest.mark.parametrize(("dtype", "atol"), [("float32", 1e-3), ("bfloat16", 2e-3), ("float8", 0.035)])
def test_features_and_weights_are_those_of_a_cpu(tmp_path: Path, dtype: str, atol: float) -> None:
    # Frozen, for DeepSpeed moves an encoder to the GPU wherever there is one.
    words = [*GROW, "encoder.frozen=true", "encoder.precision=float32", f"output.weight_dtype={dtype}", "output.momentum=0"]
    config = make_prepared(tmp_path, overrides=words)
    # The GPU first: the process group is that of whoever joins first, and gloo, a CPU's, makes later tests of GPUs wait for it.
    (fast_TF, fast_TGF), (slow_TF, slow_TGF) = (renewed(config, device) for device in ("cuda", "cpu"))
    same_T = (slow_TF == fast_TF).all(1)  # embeddings differ by rounding, and so may which of two nearly equal features is taken
    assert same_T.float().mean() > 0.7
    torch.testing.assert_close(fast_TGF[same_T], slow_TGF[same_T], rtol=0, atol=atol)


def test_it_resumes_to_the_bit(tmp_path: Path) -> None:
    words = [
        *GROW,
        "rewire.head=true",
        "train.max_steps=16",
        "rewire.interval=5",
        "launch.device=cuda",
        "output.weight_dtype=float8",
        "output.momentum=0",
    ]
    one = make_prepared(tmp_path, overrides=[*words, "run.deterministic=true"])
    broken = copy.deepcopy(one)
    broken.run.folder += "-broken"
    try:
        train_all(join_world("cuda"), [one])
        for steps in (9, 16):
            broken.train.max_steps = steps
            train_all(join_world("cuda"), [broken])
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cuda.enable_mem_efficient_sdp(True)
    assert len(read_losses(one.run.folder)) == 16
    assert read_losses(broken.run.folder) == read_losses(one.run.folder)
