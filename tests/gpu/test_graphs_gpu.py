"""Recorded passes give what passes that are launched kernel by kernel give.

Run on a GPU host: python -m pytest tests/gpu
"""

import gc
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import make_prepared

from haste_dist.engine import EncoderEngine
from haste_dist.graphs import GraphedModule
from haste_dist.loader import Batch, BatchMaker, open_texts
from haste_dist.model import make_classifier, make_encoder, open_prepared
from haste_dist.step import train_step
from haste_dist.world import join_world

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("words", [(), ("encoder.precision=float32",), ("encoder.zero=2",), ("encoder.lora_rank=4",)], ids=str)
@pytest.mark.parametrize(("passes", "accumulation"), [(1, 1), (1, 2), (2, 1)])
def test_replayed_passes_train_as_launched_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], passes: int, accumulation: int
) -> None:
    """With dropout, on batches of several lengths and two sizes; padding and the first, launched pass of a shape are among them."""
    monkeypatch.setattr(Batch, "is_full", False)  # launched passes would take other attention kernels for full batches
    if "encoder.lora_rank=4" in words:
        pytest.importorskip("peft")
    more = ["launch.device=cuda", "encoder.dropout=0.2", "output.deterministic=true", "output.fan_in=16", "encoder.layers=2", *words]
    config, world = make_prepared(tmp_path, overrides=more), join_world("cuda")
    prepared = open_prepared(config)
    texts = open_texts(prepared.folder, prepared.manifest, "train", 0.0, 0)
    maker = BatchMaker(texts, prepared.order.row_of_label, prepared.manifest.splits["train"].max_labels, 0, 1, 0, pin=True)
    order = np.argsort(texts.lengths(), kind="stable")
    batches = [maker.make(order[13 * i : 13 * i + (12 if i % 5 == 0 else 13)]) for i in range(14)]
    assert len({batch.input_ids.shape[1] for batch in batches}) > 2
    losses, states = [], []
    for graphs in (False, True):
        config.encoder.graphs = graphs
        encoder = make_encoder(config, prepared.manifest)
        engine, classifier = EncoderEngine(encoder, config.encoder, world), make_classifier(config, prepared.order, encoder.width, world)
        module = engine._flat
        assert isinstance(module, GraphedModule) == graphs
        losses.append([])
        for step, batch in enumerate(3 * batches):
            batch = padded(batch) if not graphs else batch
            how = {"passes": passes, "accumulation": accumulation, "want_loss": True}
            loss = train_step(engine, classifier, batch, world, lr_encoder=1e-3, lr_output=0.1, step=step, seed=0, **how)
            losses[-1].append(loss.item())
        states.append(engine.state()[0])
        if isinstance(module, GraphedModule):
            assert module.replays >= 2 * len(batches)
            assert engine.held_bytes() > 0
    print("largest difference of a weight:", max((states[0][name] - states[1][name]).abs().max().item() for name in states[0]))
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5 if "encoder.precision=float32" in words else 2e-3)


def padded(batch: Batch) -> Batch:
    """As recorded passes pad it: dropout masks are drawn for all of a shape."""
    missing = min(-batch.input_ids.shape[1] % 8, 16 - batch.input_ids.shape[1])
    pad = torch.nn.functional.pad
    ids, mask = pad(batch.input_ids, (0, missing)), pad(batch.attention_mask, (0, missing))
    return Batch(ids, mask, batch.label_rows, batch.texts, batch.rows)


def test_a_backward_pass_that_comes_too_late_is_refused(tmp_path: Path) -> None:
    config, world = make_prepared(tmp_path, overrides=["launch.device=cuda", "encoder.graphs=true"]), join_world("cuda")
    engine = EncoderEngine(make_encoder(config, open_prepared(config).manifest), config.encoder, world)
    ids = torch.randint(2, 9, (4, 5), device="cuda")
    passes = [engine.forward(ids, torch.ones_like(ids)) for _ in range(3)]
    with pytest.raises(RuntimeError, match="a later forward pass"):
        engine.backward(passes[1], torch.ones_like(passes[1]))


def test_recordings_share_their_memory_in_whatever_order_lengths_come(tmp_path: Path) -> None:
    config, world = make_prepared(tmp_path, overrides=["launch.device=cuda", "encoder.graphs=true"]), join_world("cuda")
    held = []
    for lengths in ([16], [16, 8], [8, 16, 8]):
        gc.collect()  # what other tests left is not this one's
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        engine = EncoderEngine(make_encoder(config, open_prepared(config).manifest), config.encoder, world)
        for length in lengths:
            ids = torch.randint(2, 9, (512, length), device="cuda")
            for _ in range(3):
                x_BD = engine.forward(ids, torch.ones_like(ids))
                engine.backward(x_BD, torch.ones_like(x_BD))
        held.append(engine.held_bytes())
        # Of the device this process has taken no more than that since; recording must not be counted beside what it holds.
        assert held[-1] < engine.peak_bytes() <= torch.cuda.max_memory_reserved()
    print("held:", held)
    assert max(held) <= 1.1 * held[0] + (4 << 20)


class Asking(torch.nn.Module):
    """A part whose forward pass makes the host wait for the GPU, which a recording does not allow."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (1 + 0 * x.sum().item())


def memory_pools() -> set[tuple[int, int]]:
    """Of recordings, those that hold memory."""
    gc.collect()
    torch.cuda.empty_cache()
    return {segment["segment_pool_id"] for segment in torch.cuda.memory_snapshot()} - {(0, 0)}


def test_a_run_goes_on_where_recording_fails(tmp_path: Path) -> None:
    """With dropout, whose generator must be as it was."""
    config, world = make_prepared(tmp_path, overrides=["launch.device=cuda", "encoder.dropout=0.2"]), join_world("cuda")
    losses, before = [], memory_pools()
    for graphs in (True, False):
        config.encoder.graphs = graphs
        encoder = make_encoder(config, open_prepared(config).manifest)
        encoder.project = Asking()
        engine = EncoderEngine(encoder, config.encoder, world)
        ids = torch.randint(2, 9, (4, 8), device="cuda", generator=torch.Generator("cuda").manual_seed(0))
        losses.append([])
        for step in range(4):
            torch.manual_seed(step)
            if graphs and step == 1:
                with pytest.warns(UserWarning, match="cannot be recorded and are launched as ever"):
                    x_BD = engine.forward(ids, torch.ones_like(ids))
            else:
                x_BD = engine.forward(ids, torch.ones_like(ids))
            engine.backward(x_BD, torch.ones_like(x_BD))
            engine.step(1e-3)
            losses[-1].append(x_BD.float().sum().item())
        assert engine.held_bytes() == 0 or not graphs
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
        assert memory_pools() <= before
    assert losses[0] == losses[1]


def test_what_is_recorded_can_be_given_up(tmp_path: Path) -> None:
    config, world = make_prepared(tmp_path, overrides=["launch.device=cuda", "encoder.dropout=0"]), join_world("cuda")
    engine = EncoderEngine(make_encoder(config, open_prepared(config).manifest), config.encoder, world)
    ids = torch.randint(2, 9, (256, 16), device="cuda")
    found = []
    for _ in range(2):
        for _ in range(3):
            x_BD = engine.forward(ids, torch.ones_like(ids))
            engine.backward(x_BD, torch.ones_like(x_BD))
            found.append(x_BD.detach().clone())
        assert engine.held_bytes() > 0
        engine.forget_recorded()
        assert engine.held_bytes() == 0
    assert all(torch.equal(x_BD, found[0]) for x_BD in found)


def test_passes_are_recorded_after_a_profile(tmp_path: Path) -> None:
    config, world = make_prepared(tmp_path, overrides=["launch.device=cuda", "encoder.dropout=0.2"]), join_world("cuda")
    engine = EncoderEngine(make_encoder(config, open_prepared(config).manifest), config.encoder, world)
    for length in (8, 16):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]):
            torch.zeros(1, device="cuda").add_(1)
        for _ in range(3):
            ids = torch.randint(2, 9, (4, length), device="cuda")
            x_BD = engine.forward(ids, torch.ones_like(ids))
            engine.backward(x_BD, torch.ones_like(x_BD))
    module = engine._flat
    assert isinstance(module, GraphedModule)
    assert module.replays == 4
