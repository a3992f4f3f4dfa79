"""Numbers that are not finite are found with step, rank, tensor and batch; spikes and dead groups are counted; the same bits twice."""

import copy
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from test_checkpoint import classifier
from tiny import make_prepared, run_ranks

from haste_dist.checkpoint import newest
from haste_dist.config import Config
from haste_dist.engine import EncoderEngine
from haste_dist.errors import DataError, HasteError
from haste_dist.guards import Guard, LossSpikes, dead_groups, load_batch, save_batch
from haste_dist.loader import Batch
from haste_dist.runlog import read_events
from haste_dist.sealed import unseal
from haste_dist.train import train
from haste_dist.world import World, join_world


def batch(first: int) -> Batch:
    ids = torch.arange(first, first + 6).reshape(2, 3)
    return Batch(ids, torch.ones_like(ids), torch.tensor([[first], [-1]]), np.array([first, first + 1]), 4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_number_is_found_a_step_later_with_its_batch(tmp_path: Path, bad: float) -> None:
    guard = Guard(tmp_path, join_world("cpu"))
    for step in range(1, 4):
        x, dx = torch.randn(4, 8).bfloat16(), torch.randn(4, 8)
        if step == 2:
            dx[3, 7] = bad
        guard.watch(step, batch(10 * step), x=x, dx=dx)
        assert guard.tripped() == (step == 3)
    with pytest.raises(HasteError, match=r"first seen at step 2 in dx \((nan|inf)\) on rank 0; its texts \(positions 20, 21 ") as caught:
        guard.settle()
    assert "\n" not in str(caught.value)
    again = load_batch(tmp_path / "bad-batches" / "step-00000002-rank-00000.safetensors")
    for name in ("input_ids", "attention_mask", "label_rows"):
        assert torch.equal(getattr(again, name), getattr(batch(20), name))
    assert (again.texts.tolist(), again.rows) == ([20, 21], 4)
    with pytest.raises(DataError, match="no saved batch"):
        load_batch(tmp_path)


def test_nothing_is_said_while_all_is_finite(tmp_path: Path) -> None:
    guard = Guard(tmp_path, join_world("cpu"))
    for step in range(1, 20):
        guard.watch(step, batch(step), x=torch.full((4, 8), 3e38))
    guard.settle()
    assert not guard.tripped()
    assert not list(tmp_path.iterdir())
    with pytest.raises(HasteError, match=r"the loss became nan at step 19; its texts .*; resume with lower"):
        guard.settle("the loss became nan at step 19")


def poison_one_rank(world: World, config: Config) -> None:
    """A weight of rank 1's labels turns to NaN in step 6; every rank stops with the same words, and no such state is saved."""
    from haste_dist import classifier as module

    real = module.Classifier.step

    def step(self: module.Classifier, *words: object, **more: object) -> object:
        if world.rank == 1 and words[3] == 5:
            self.tail.weight.view(-1)[0] = math.nan
        return real(self, *words, **more)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.Classifier, "step", step)
        with pytest.raises(HasteError) as caught:
            train(config, world)
    run = Path(config.run.folder)
    (run / f"said-{world.rank}").write_text(str(caught.value))


def test_all_ranks_stop_at_one_rank_s_bad_number(tmp_path: Path) -> None:
    words = ["encoder.frozen=true", "train.log_every=1000", "train.checkpoint_every=4", "train.evaluate_every=0", "rewire.interval=0"]
    config = make_prepared(tmp_path, overrides=words)
    run_ranks(2, poison_one_rank, config)
    run = Path(config.run.folder)
    said = [(run / f"said-{rank}").read_text() for rank in (0, 1)]
    for one in said:
        assert one.startswith(
            "a number was not finite at step 6; first seen at step 6 in dx (their gradient) (nan) on rank 1; its texts (positions "
        )
    batches = [load_batch(run / "bad-batches" / f"step-00000006-rank-0000{rank}.safetensors") for rank in (0, 1)]
    assert [b.rows for b in batches] == [16, 16]
    assert len({*batches[0].texts, *batches[1].texts}) == 16
    assert (found := newest(run / "checkpoints")) is not None
    assert found.name == "step-00000004"


def bad_embeddings(patch: pytest.MonkeyPatch, world: World, steps: set[int], rank: int) -> None:
    """The encoder gives NaN in these steps of a run, on one rank."""
    real, calls = EncoderEngine.forward, []

    def forward(self: EncoderEngine, *words: object) -> torch.Tensor:
        calls.append(1)
        x = real(self, *words)  # type: ignore[arg-type]
        return x * math.nan if len(calls) in steps and world.rank == rank else x

    patch.setattr(EncoderEngine, "forward", forward)


def train_past_bad_batches(world: World, config: Config) -> None:
    with pytest.MonkeyPatch.context() as patch:
        bad_embeddings(patch, world, {5, 9}, rank=1)
        train(config, world)


def files_of(config: Config, step: int) -> dict:
    return unseal((Path(config.run.folder) / f"checkpoints/step-{step:08d}/state.json").read_bytes())["files"]


def test_a_bad_batch_is_passed_over_and_changes_nothing(tmp_path: Path) -> None:
    """One rank's embeddings are NaN in steps 5 and 9; both ranks pass over them, and all weights and moments stay bit for bit."""
    words = ["train.skip_batches=2", "train.checkpoint_every=1", "checkpoint.keep=20", "train.max_steps=12", "train.evaluate_every=0"]
    config = make_prepared(tmp_path, overrides=words)
    run_ranks(2, train_past_bad_batches, config)
    for step in (5, 9):
        assert files_of(config, step) == files_of(config, step - 1)
        assert files_of(config, step + 1) != files_of(config, step)
        assert load_batch(Path(config.run.folder) / f"bad-batches/step-{step:08d}-rank-00001.safetensors").rows == 16
    assert [(e["step"], e["left"]) for e in read_events(config.run.folder) if e["event"] == "skipped"] == [(5, 1), (9, 0)]
    whole = copy.deepcopy(config)
    whole.run.folder, whole.train.skip_batches = f"{config.run.folder}-whole", 0
    train(whole, join_world("cpu"))
    lost = {e["step"] for e in read_events(whole.run.folder) if e["event"] == "step"} - {
        e["step"] for e in read_events(config.run.folder) if e["event"] == "step"
    }
    assert lost == {5, 9}  # no loss is told of a batch that was passed over


def train_past_a_rewiring(world: World, config: Config) -> None:
    with pytest.MonkeyPatch.context() as patch:
        bad_embeddings(patch, world, {7}, rank=1)
        train(config, world)


def test_a_rewiring_whose_batches_were_all_passed_over_replaces_nothing(tmp_path: Path) -> None:
    """On two ranks, of which one has no group of the tail."""
    words = ["train.skip_batches=1", "rewire.grow=gradient", "rewire.batches=1", "train.max_steps=15", "train.evaluate_every=0"]
    config = make_prepared(tmp_path, labels=32, overrides=words)
    run_ranks(2, train_past_a_rewiring, config)
    found = [(e["step"], e["batches"], e["replaced"] > 0) for e in read_events(config.run.folder) if e["event"] == "rewire"]
    assert found == [(7, 0, False), (14, 1, True)]


def test_the_bound_holds_over_restarts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["train.skip_batches=2", "train.checkpoint_every=1", "train.max_steps=6", "train.evaluate_every=0"]
    config, world = make_prepared(tmp_path, overrides=words), join_world("cpu")
    bad_embeddings(monkeypatch, world, {2, 4, 8}, rank=0)
    train(config, world)
    config.train.max_steps = 12
    with pytest.raises(HasteError, match=r"the loss became nan at step 8; first seen at step 8 in x \(embeddings\)"):
        train(config, world)
    assert len(list(Path(config.run.folder).glob("bad-batches/*"))) == 3


def test_an_update_of_the_encoder_counts_the_sound_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two batches an update: of one update the second is bad, of the next both."""
    words = ["train.skip_batches=9", "train.accumulation=2", "train.checkpoint_every=2", "checkpoint.keep=9", "train.max_steps=8"]
    config, world = make_prepared(tmp_path, overrides=[*words, "train.evaluate_every=0"]), join_world("cpu")
    bad_embeddings(monkeypatch, world, {4, 5, 6}, rank=0)
    train(config, world)
    encoders = [files_of(config, step)["encoder.safetensors"]["sha256"] for step in (2, 4, 6, 8)]
    assert encoders[0] != encoders[1] == encoders[2] != encoders[3]
    assert files_of(config, 4) == files_of(config, 6)


@pytest.mark.parametrize(("frozen", "what"), [(False, "in the gradient of the encoder"), (True, "the loss became (nan|inf)")])
def test_the_error_of_a_run_names_its_batch(tmp_path: Path, frozen: bool, what: str) -> None:
    config = make_prepared(tmp_path, overrides=["output.lr=1e30", f"encoder.frozen={frozen}"])
    with pytest.raises(HasteError, match=r"at step \d+; (first seen .*; )?its texts .*bad-batches; resume with lower") as caught:
        train(config, join_world("cpu"))
    assert re.search(what, str(caught.value))


def test_loss_spikes_are_counted() -> None:
    spikes = LossSpikes()
    assert [spikes.add(loss) for loss in (100.0, *[10.0] * 12, 19.9, 21.0, 10.0, 90.0)][-4:] == [0, 1, 1, 2]


def test_groups_whose_weights_are_gone_are_counted() -> None:
    layer = classifier(1, 0, 1)
    assert dead_groups(layer, join_world("cpu")) == 0
    layer.tail.weight[[1, 3]] *= 1e-4
    assert dead_groups(layer, join_world("cpu")) == 2


@pytest.fixture
def torch_settings():
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.enable_mem_efficient_sdp(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]


@pytest.mark.usefixtures("torch_settings")
def test_a_deterministic_run_gives_the_same_bits_twice(tmp_path: Path) -> None:
    words = [
        "run.deterministic=true",
        "train.max_steps=12",
        "encoder.dropout=0.1",
        "output.tail_dropout=0.1",
        "output.weight_dtype=bfloat16",
    ]
    first = make_prepared(tmp_path, overrides=words)
    second = copy.deepcopy(first)
    second.run.folder += "-again"
    pages = []
    for config in (first, second):
        train(config, join_world("cpu"))
        assert torch.are_deterministic_algorithms_enabled()
        assert "deterministic: true" in (Path(config.run.folder) / "config.yaml").read_text().split("output:")[1]
        pages.append(unseal((Path(config.run.folder) / "checkpoints/step-00000012/state.json").read_bytes())["files"])
    assert pages[0] == pages[1]  # the checksums of all weights and moments
    events = [e for e in read_events(first.run.folder) if e["event"] == "eval"]
    assert all(e["dead_groups"] == 0 for e in events)


def test_a_batch_is_saved_or_the_reason_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises((FileExistsError, NotADirectoryError)):
        save_batch(tmp_path / "file" / "x", batch(0), 1)
