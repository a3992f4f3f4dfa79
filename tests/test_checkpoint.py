"""Checkpoints: another number of ranks can read them, damage is named, a failed save leaves the earlier one."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny import haste, make_prepared, run_ranks

from haste_dist import checkpoint
from haste_dist.checkpoint import RunState
from haste_dist.classifier import Classifier
from haste_dist.config import CheckpointConfig, load_config
from haste_dist.engine import EncoderEngine
from haste_dist.errors import CheckpointError
from haste_dist.model import make_encoder, open_prepared
from haste_dist.saver import Saver
from haste_dist.sealed import seal, unseal
from haste_dist.sharding import label_shard
from haste_dist.train import train
from haste_dist.world import World, join_world

LABELS, HEAD, GROUPS, SIZE, WIDTH = 90, 16, 5, 16, 32


def classifier(ranks: int, rank: int, seed: int) -> Classifier:
    config = load_config(None, ["output.group_size=16", "output.fan_in=8", "output.bias=true"]).output
    return Classifier(config, label_shard(HEAD, GROUPS, SIZE, LABELS, ranks, rank), WIDTH, seed, torch.device("cpu"))


def keep_some(layer: Classifier) -> Classifier:
    """Two batches kept for a rewiring, the same on every rank."""
    for step in (5, 6):
        generator = torch.Generator().manual_seed(step)
        layer.keep(torch.randn(4, WIDTH, generator=generator), torch.randint(-1, LABELS, (4, 3), generator=generator), step)
    return layer


def engine_for(folder: Path, world: World) -> EncoderEngine:
    config = make_prepared(folder, overrides=["encoder.frozen=true"]) if world.is_first else None
    if world.size > 1:
        torch.distributed.barrier()
    if config is None:
        config = make_prepared(folder / f"rank{world.rank}", overrides=["encoder.frozen=true"])
    return EncoderEngine(make_encoder(config, open_prepared(config).manifest), config.encoder, world)


def save_some(world: World, folder: Path) -> None:
    with Saver(folder / "saved", CheckpointConfig(), world, "order") as saver:
        saver.save(RunState(7, 0.5, 3, 1), engine_for(folder, world), keep_some(classifier(world.size, world.rank, 1)))


@pytest.mark.slow
def test_rows_saved_by_three_ranks_load_on_any_number(tmp_path: Path) -> None:
    run_ranks(3, save_some, tmp_path)
    path = checkpoint.newest(tmp_path / "saved")
    assert path is not None
    for ranks in (1, 2, 5):
        for rank in range(ranks):
            loaded, expected = classifier(ranks, rank, seed=2), classifier(ranks, rank, seed=1)
            state = checkpoint.load(path, None, loaded, "order")
            assert state == RunState(7, 0.5, 3, 1)
            for name, (tensor, _) in expected.tensors().items():
                assert torch.equal(loaded.tensors()[name][0], tensor), name
            for ours, theirs in zip(loaded.kept, keep_some(expected).kept, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def save_what_is_not_finite(world: World, folder: Path) -> None:
    layer = classifier(world.size, world.rank, 1)
    if world.rank == 1:
        layer.tail.bias[-1, -1] = float("nan")
    with (
        pytest.raises(CheckpointError, match=r"tail\.bias is not finite at step 7"),
        Saver(folder / "saved", CheckpointConfig(), world, "o") as saver,
    ):
        saver.save(RunState(7), engine_for(folder, world), layer)
    if world.is_first:  # who removes what was begun
        assert not list(folder.glob("saved/*"))


def test_numbers_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    run_ranks(2, save_what_is_not_finite, tmp_path)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of one rank."""
    save_some(join_world("cpu"), tmp_path)
    return tmp_path / "saved" / "step-00000007"


def refused(path: Path, said: str, fingerprint: str = "order", layer: Classifier | None = None) -> None:
    with pytest.raises(CheckpointError, match=said) as caught:
        checkpoint.load(path, None, layer or classifier(1, 0, 2), fingerprint)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["output-00000-of-00001.safetensors", "encoder.safetensors", "kept.safetensors"])
@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_named(saved: Path, name: str, damage: str) -> None:
    data = bytearray((saved / name).read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
    if damage == "remove":
        (saved / name).unlink()
    else:
        (saved / name).write_bytes(data[:-1] if damage == "truncate" else data)
    refused(saved, f"{name}: (damaged|missing)")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '{"schema_version": 1}', '{"schema_version": 2, "label_order": "", "state": {}, "files": {}}']
)
def test_a_damaged_page_is_named(saved: Path, text: str) -> None:
    (saved / "state.json").write_text(text)
    refused(saved, r"not a readable checkpoint \(state.json: ")


def test_other_versions(saved: Path) -> None:
    """Version 1, without sizes and a checksum of the page, is read; a later one is refused with what to do."""
    page = json.loads((saved / "state.json").read_text())
    del page["checksum"]
    old = {**page, "schema_version": 1, "files": {name: record["sha256"] for name, record in page["files"].items()}}
    (saved / "state.json").write_text(json.dumps(old))
    assert checkpoint.load(saved, None, classifier(1, 0, 2), "order") == RunState(7, 0.5, 3, 1)
    (saved / "state.json").write_bytes(seal({**page, "schema_version": 99}))
    refused(saved, "schema version 99, this program reads 1 to 2; update haste_dist")


def test_a_name_that_leads_out_of_the_folder_is_refused(saved: Path) -> None:
    page = unseal((saved / "state.json").read_bytes())
    for name in ("../../secret", "/etc/passwd", "a/../../b", ".", "", "x\ny"):
        page["files"] = {name: {"bytes": 1, "sha256": "0"}}
        (saved / "state.json").write_bytes(seal(page))
        refused(saved, "is no plain file name")


def test_another_label_order_or_shape_is_refused(saved: Path) -> None:
    refused(saved, "another label order", fingerprint="other")
    config = load_config(None, ["output.group_size=16", "output.fan_in=9", "output.bias=true"]).output
    wider = Classifier(config, label_shard(HEAD, GROUPS, SIZE, LABELS, 1, 0), WIDTH, 0, torch.device("cpu"))
    refused(saved, r"has rows of shape \[16, 8\], this configuration needs \[16, 9\]", layer=wider)
    more = Classifier(
        load_config(None, ["output.group_size=16", "output.fan_in=8", "output.bias=true"]).output,
        label_shard(HEAD, GROUPS + 2, SIZE, LABELS + 32, 1, 0),
        WIDTH,
        0,
        torch.device("cpu"),
    )
    refused(saved, "of the 7 rows of tail", layer=more)


def test_pointers_and_names(tmp_path: Path) -> None:
    for step in (10, 30):
        (tmp_path / f"step-{step:08d}").mkdir()
        (tmp_path / f"step-{step:08d}" / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"not evaluated yet, .* --checkpoint: last, step-00000010, step-00000030"):
        checkpoint.pointed(tmp_path, "best")
    checkpoint.point(tmp_path, "best", 10)
    assert checkpoint.pointed(tmp_path, "best").name == "step-00000010"
    assert checkpoint.newest(tmp_path) == tmp_path / "step-00000030"
    with pytest.raises(CheckpointError, match=r"no usable checkpoint .*train the run first"):
        checkpoint.pointed(tmp_path, "last")
    for name in ("step-00000099", "../x", "/etc", "step-00000010/../step-00000010", ""):
        with pytest.raises(CheckpointError, match="there are: step-00000010, step-00000030"):
            checkpoint.resolve(tmp_path, name)
    (tmp_path / "last.json").write_text('{"step": 30}')  # as version 1 wrote it
    assert checkpoint.pointed(tmp_path, "last").name == "step-00000030"


def test_a_folder_without_its_page_is_not_complete(saved: Path) -> None:
    shutil.copytree(saved, saved.parent / "step-00000099")
    (saved.parent / "step-00000099" / "state.json").unlink()
    assert checkpoint.newest(saved.parent) == saved


def test_resuming_from_a_damaged_checkpoint_says_so_in_one_line(tmp_path: Path) -> None:
    from haste_dist.config import save_config

    config = make_prepared(tmp_path, overrides=["train.max_steps=2"])
    train(config, join_world("cpu"))
    page = Path(config.run.folder) / "checkpoints" / "step-00000002" / "state.json"
    page.write_text(json.dumps({"schema_version": 1}))
    save_config(config, tmp_path / "c.yaml")
    done = haste("train", str(tmp_path / "c.yaml"))
    assert done.returncode == 2
    assert done.stderr.startswith("haste: error: ")
    assert "not a readable checkpoint" in done.stderr
    assert done.stderr.count("\n") == 1
