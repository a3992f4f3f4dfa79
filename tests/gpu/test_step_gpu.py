"""The training step on a GPU: the host launches it and waits for nothing.

Run on a GPU host: python -m pytest tests/gpu
"""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import make_prepared

from haste_dist.engine import EncoderEngine
from haste_dist.guards import Guard
from haste_dist.label_groups import LabelOrder
from haste_dist.loader import BatchMaker, open_texts
from haste_dist.model import make_classifier, make_encoder, open_prepared
from haste_dist.step import seed_generators, train_step
from haste_dist.world import alone, join_world

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

pytestmark = pytest.mark.gpu


def refuse(*_: object) -> None:
    raise AssertionError("a step waits for the GPU")


def turned(order: LabelOrder) -> LabelOrder:
    return dataclasses.replace(order, basis=torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0)))[0].half())


@pytest.mark.parametrize(
    "words", [("encoder.zero=0",), ("encoder.zero=2", "encoder.clip=0"), ("encoder.precision=float32",), ("encoder.graphs=false",)], ids=str
)
@pytest.mark.parametrize("basis", ["embedding", "labels"])
@pytest.mark.parametrize("kernels", ["auto", "torch"])
def test_no_step_waits_for_the_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], kernels: str, basis: str
) -> None:
    """Two steps an update and two passes a step; the loss too, for reading it is the caller's."""
    monkeypatch.setenv("HASTE_KERNELS", kernels)
    config = make_prepared(
        tmp_path, overrides=["launch.device=cuda", "encoder.graphs=true", "output.tail_dropout=0.2", "output.fan_in=16", *words]
    )
    config.output.basis = basis
    world, prepared = join_world("cuda"), open_prepared(config)
    encoder = make_encoder(config, prepared.manifest)
    engine = EncoderEngine(encoder, config.encoder, world)
    classifier = make_classifier(config, turned(prepared.order), encoder.width, world)
    texts = open_texts(prepared.folder, prepared.manifest, "train", 0.0, 0)
    maker = BatchMaker(texts, prepared.order.row_of_label, prepared.manifest.splits["train"].max_labels, 0, 1, 0, pin=True)
    batches = [maker.make(np.arange(13 * i, 13 * i + 13)) for i in range(8)]
    guard = Guard(tmp_path, world)
    for step, batch in enumerate(3 * batches):
        if step == 16:  # all is compiled, allocated, recorded and set up
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            monkeypatch.setattr(torch.cuda, "synchronize", refuse)  # which that mode does not see
        try:
            more = {"passes": 2, "accumulation": 2, "want_loss": step % 2 == 0, "keep": True, "guard": guard}
            loss = train_step(engine, classifier, batch, world, lr_encoder=1e-3, lr_output=0.1, step=step, seed=0, **more)
        except BaseException:
            torch.cuda.set_sync_debug_mode("default")
            raise
    torch.cuda.set_sync_debug_mode("default")
    assert loss is None
    guard.settle()


def test_a_tail_in_a_basis_is_that_of_the_cpu(tmp_path: Path) -> None:
    """Gradient and scores in bfloat16 beside float32 ones of the CPU."""
    config = make_prepared(tmp_path, overrides=["output.tail_dropout=0", "output.head_fraction=0", "output.fan_in=16"])
    config.output.basis = "labels"
    order, (x_ND, rows_NM) = turned(open_prepared(config).order), (torch.randn(24, 32).bfloat16(), torch.arange(72).view(24, 3))
    found = {}
    for device in ("cpu", "cuda"):
        layer = make_classifier(config, order, 32, alone(device))
        x = x_ND.to(device) if device == "cuda" else x_ND.float()
        scores = layer.topk(x, 5)[0].cpu().float()
        dx, _ = layer.step(x, rows_NM.to(device), lr=0.1, step=3)
        found[device] = (scores, dx.cpu())
    for ours, expected in zip(found["cuda"], found["cpu"], strict=True):
        assert (ours - expected).norm() < 0.02 * expected.norm()


def test_nothing_grows_with_steps(tmp_path: Path) -> None:
    """Two thousand steps of the real loop's step, batches of every length: what lives on the GPU and on the host stays what it was."""
    config = make_prepared(tmp_path, overrides=["launch.device=cuda", "encoder.graphs=true", "output.tail_dropout=0.2", "output.fan_in=16"])
    world, prepared = join_world("cuda"), open_prepared(config)
    encoder = make_encoder(config, prepared.manifest)
    engine, classifier = EncoderEngine(encoder, config.encoder, world), make_classifier(config, prepared.order, encoder.width, world)
    texts = open_texts(prepared.folder, prepared.manifest, "train", 0.0, 0)
    maker = BatchMaker(texts, prepared.order.row_of_label, prepared.manifest.splits["train"].max_labels, 0, 1, 0, pin=True)
    batches = [maker.make(np.arange(13 * i, 13 * i + 13)) for i in range(8)]
    guard, seen = Guard(tmp_path, world), []
    for step in range(2001):
        if step % 400 == 0:
            guard.settle()
            torch.cuda.synchronize()
            host = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
            seen.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved(), host))
            torch.cuda.reset_peak_memory_stats()
        train_step(engine, classifier, batches[step % 8], world, lr_encoder=1e-4, lr_output=0.1, step=step, seed=0, guard=guard)
    print("allocated, reserved, host:", seen)
    device = [allocated for allocated, _, _ in seen[1:]]
    assert max(device) - min(device) <= 1 << 16
    assert len({reserved for _, reserved, _ in seen[1:]}) == 1
    assert seen[-1][2] - seen[1][2] <= 16 << 20


def test_generators_are_seeded_as_torch_does_it() -> None:
    for device in (torch.device("cuda"), torch.device("cuda", 0)):
        torch.manual_seed(2**62 + 7)
        expected = torch.rand(5), torch.rand(5, device=device)
        torch.manual_seed(0)
        seed_generators(2**62 + 7, device)
        assert torch.equal(torch.rand(5), expected[0])
        assert torch.equal(torch.rand(5, device=device), expected[1])
