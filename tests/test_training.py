"""The whole loop on gloo ranks: the number of ranks changes nothing, a resumed run goes on exactly, stopping is agreed."""

import copy
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import WORDS, final_tensors, make_prepared, make_tokenizer, read_losses, run_ranks, train_all

from haste_dist.collectives import StopVote
from haste_dist.config import Config
from haste_dist.encoder import build_encoder
from haste_dist.errors import CheckpointError, ConfigError, DataError, HasteError
from haste_dist.held_out import check_split, dev_count
from haste_dist.label_groups import load_label_order
from haste_dist.manifest import read_manifest, write_manifest
from haste_dist.preflight import check_run
from haste_dist.runlog import read_events
from haste_dist.scoring import evaluate_run
from haste_dist.train import train
from haste_dist.world import World, join_world
from haste_launch.progress import Progress

STEPS = 30


@pytest.mark.slow
def test_one_two_and_four_ranks_train_the_same_model(tmp_path: Path) -> None:
    """Float32, with rewirings, a label count that divides by nothing, texts that do not fill the last batch."""
    words = [f"train.max_steps={STEPS}", "output.bias=true", "output.tail_dropout=0.2", "encoder.zero=1"]
    prime = make_prepared(tmp_path / "prime", labels=101, texts=187, overrides=words)
    even = make_prepared(
        tmp_path / "even",
        labels=160,
        texts=192,
        overrides=[*words, "rewire.prune=global", "rewire.grow=gradient", "output.loss=squared_hinge", "output.lr=0.05"],
    )
    runs: dict[int, list[Config]] = {}
    for ranks in (1, 2, 4):
        runs[ranks] = copy.deepcopy([prime, even])
        for config in runs[ranks]:
            config.run.folder += str(ranks)
    train_all(join_world("cpu"), runs[1])
    for ranks in (2, 4):
        run_ranks(ranks, train_all, runs[ranks])
    for which in (0, 1):
        one = runs[1][which].run.folder
        losses = read_losses(one)
        assert len(losses) == STEPS
        assert losses[-1] < losses[0]
        rewired = [e for e in read_events(one) if e["event"] == "rewire"]
        assert len(rewired) >= 2
        assert rewired[0]["replaced"] > 0
        expected = final_tensors(one)
        for ranks in (2, 4):
            other = runs[ranks][which].run.folder
            np.testing.assert_allclose(read_losses(other), losses, rtol=1e-5)
            assert [(e["step"], e["replaced"]) for e in read_events(other) if e["event"] == "rewire"] == [
                (e["step"], e["replaced"]) for e in rewired
            ]
            got = final_tensors(other)
            assert set(got) == set(expected)
            for name, tensor in expected.items():
                torch.testing.assert_close(got[name], tensor, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.slow
def test_the_output_layer_steps_once_on_all_micro_batches(tmp_path: Path) -> None:
    """As a run without accumulation at the batch size of all of them; the epoch's smallest batch has one text, less than passes."""
    plain, parts, both = [], [], []
    for reduction, lr in (("mean", 2.0), ("sum", 0.1)):
        words = ["train.max_steps=11", "encoder.clip=0", "output.tail_dropout=0.2", f"output.reduction={reduction}", f"output.lr={lr}"]
        plain.append(make_prepared(tmp_path / reduction, texts=161, overrides=words))
        for runs, name in ((parts, "-parts"), (both, "-both")):
            runs.append(copy.deepcopy(plain[-1]))
            runs[-1].train.batch_size, runs[-1].train.accumulation, runs[-1].train.classifier_step = 4, 4, "global"
            runs[-1].run.folder += name
    train_all(join_world("cpu"), plain + parts)
    run_ranks(2, train_all, both)
    for expected, *others in zip(plain, parts, both, strict=True):
        losses, weights = read_losses(expected.run.folder), final_tensors(expected.run.folder)
        assert len(losses) == 11
        for config in others:
            np.testing.assert_allclose(read_losses(config.run.folder), losses, rtol=1e-5)
            got = final_tensors(config.run.folder)
            for name, tensor in weights.items():
                torch.testing.assert_close(got[name], tensor, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
            # AdamW does not feel the size of a gradient, its moments do.
            ours, theirs = (load_file(Path(c.run.folder) / "checkpoints/step-00000011/optimizer.safetensors") for c in (config, expected))
            for part in ("exp_avg.", "exp_avg_sq."):
                mine, other = (torch.cat([m[name].flatten() for name in sorted(theirs) if name.startswith(part)]) for m in (ours, theirs))
                assert (mine - other).norm() <= 1e-3 * other.norm()


@pytest.mark.parametrize(("grow", "weight"), [("random", "bfloat16"), ("gradient", "float8")])
def test_a_resumed_run_repeats_the_unbroken_one_exactly(tmp_path: Path, grow: str, weight: str) -> None:
    """From pretrained weights. With gradients the stop after 20 steps falls among the four batches that the rewiring after 21 looks
    at; it replaces 3 of 8."""
    words = ["encoder.dropout=0.1", "output.head_dropout=0.2", "train.accumulation=2", f"output.weight_dtype={weight}"]
    words += ["output.tail_dropout=0.1", "rewire.until=1", "rewire.fraction=0.9", f"rewire.grow={grow}"]
    unbroken = make_prepared(tmp_path, overrides=words)
    build_encoder(unbroken.encoder, WORDS + 2, 0).model.save_pretrained(tmp_path / "encoder")
    unbroken.encoder.name = str(tmp_path / "encoder")
    world = join_world("cpu")
    train(unbroken, world)
    broken = copy.deepcopy(unbroken)
    broken.run.folder += "-broken"
    for stop in (8, 20, 0):  # a stop after 8 steps, one after 20, then to the end
        broken.train.max_steps = stop
        train(broken, world)
        kept = list((Path(broken.run.folder) / "checkpoints").glob(f"step-{stop:08d}/kept.safetensors"))
        assert len(kept) == (stop == 20 and grow == "gradient")
    assert [e["step"] for e in read_events(broken.run.folder) if e["event"] == "start"] == [0, 8, 20]
    assert read_losses(broken.run.folder) == read_losses(unbroken.run.folder)
    left, right = final_tensors(broken.run.folder), final_tensors(unbroken.run.folder)
    assert {str(right[name].dtype) for name in ("head.weight", "tail.weight")} <= {"torch.bfloat16", "torch.float8_e4m3fn"}
    assert all(torch.equal(left[name].double(), right[name].double()) for name in right)


def test_training_learns_and_keeps_the_best_and_the_last(tmp_path: Path) -> None:
    config = make_prepared(tmp_path, labels=64, texts=512, overrides=["train.epochs=6", "train.batch_size=32", "rewire.interval=20"])
    outcome = train(config, join_world("cpu"))
    assert outcome.reason == "finished"
    events = read_events(config.run.folder)
    scores = {e["step"]: e["P@1"] for e in events if e["event"] == "eval"}
    assert outcome.best == max(scores.values())
    assert outcome.best > 0.4  # the most frequent label reaches 0.2
    kept = {int(p.name.removeprefix("step-")) for p in (Path(config.run.folder) / "checkpoints").glob("step-*")}
    assert kept == {outcome.step, outcome.best_step}
    assert list((Path(config.run.folder) / "tensorboard").iterdir())


def test_patience_stops_a_run_that_gets_no_better(tmp_path: Path) -> None:
    config = make_prepared(tmp_path, overrides=["train.epochs=20", "train.patience=2", "output.lr=0", "encoder.lr=0"])
    outcome = train(config, join_world("cpu"))
    assert (outcome.reason, outcome.best_step) == ("patience", 12)
    assert outcome.step == 36


def test_a_wish_to_stop_saves_at_once_and_the_run_goes_on(tmp_path: Path) -> None:
    config = make_prepared(tmp_path, overrides=["train.accumulation=2"])
    asked = iter([False, False, True])
    outcome = train(config, join_world("cpu"), lambda: next(asked, True))
    assert outcome.reason == "stopped"
    assert outcome.step == 6  # asked at step 4, agreed one update later
    assert (Path(config.run.folder) / "checkpoints" / "step-00000006").is_dir()
    assert train(config, join_world("cpu")).step == 36


def vote_from_one_rank(world: World) -> None:
    vote = StopVote(world)
    heard = [vote.exchange(world.rank == 1 and step == 2) for step in range(6)]
    vote.close()
    assert heard[:4] == [False, False, False, True], heard


def test_one_rank_stops_all_at_the_same_step() -> None:
    run_ranks(2, vote_from_one_rank)


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"run.resume": "must"}, CheckpointError, "no checkpoint to resume from"),
        ({"data.max_length": 32}, DataError, "texts were cut to 16 tokens"),
        ({"output.fan_in": 64}, ConfigError, "fan_in=64 is larger than the 32 features"),
        ({"output.tail_features": [16, 48]}, ConfigError, "the embedding has only 32 features"),
        ({"output.group_size": 32}, HasteError, "groups of 16 and 16 head rows"),
        ({"data.prepared": "nowhere"}, DataError, "run haste prepare"),
        ({"data.dev_fraction": 0.002}, ConfigError, r"holds out none of the 192 training texts in .*; set 0.0052 or more, or 0 to "),
    ],
)
def test_what_does_not_fit_is_refused_before_ranks_start(tmp_path: Path, change: dict, error: type, said: str) -> None:
    config = make_prepared(tmp_path)
    for key, value in change.items():
        part, name = key.split(".")
        setattr(getattr(config, part), name, value)
    with pytest.raises(error, match=said):
        check_run(config)


def test_a_split_without_texts_is_refused_before_it_is_evaluated(tmp_path: Path) -> None:
    config = make_prepared(tmp_path, overrides=["data.dev_fraction=0.0052"])
    manifest = read_manifest(config.data.prepared)
    check_split(config, tmp_path, manifest, "dev")
    assert dev_count(192, config.data.dev_fraction) == 1
    config.data.dev_fraction, config.evaluate.split = 0.0, "dev"
    with pytest.raises(ConfigError, match=r"evaluate.split=dev: this run holds out no text .*; set evaluate.split=test"):
        evaluate_run(config, join_world("cpu"))
    del manifest.splits["test"]
    write_manifest(Path(config.data.prepared), manifest)
    with pytest.raises(ConfigError, match=r"prepared: has no test texts to evaluate on; prepare it with some"):
        check_run(config)


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    config = make_prepared(tmp_path)
    other = make_tokenizer(tmp_path / "other")
    page = json.loads((other / "tokenizer.json").read_text())
    page["model"]["vocab"]["extra"] = 202
    (other / "tokenizer.json").write_text(json.dumps(page))
    config.encoder.tokenizer = str(other)
    with pytest.raises(DataError, match="whose rules differ"):
        check_run(config)


def test_a_used_folder_is_refused_where_nothing_may_be_resumed(tmp_path: Path) -> None:
    config = make_prepared(tmp_path, overrides=["train.max_steps=2"])
    train(config, join_world("cpu"))
    config.run.resume = "never"
    with pytest.raises(CheckpointError, match="holds a run already"):
        check_run(config)


def test_the_label_order_of_a_run_is_copied_for_predict(tmp_path: Path) -> None:
    from haste_dist.predictor import Predictor

    config = make_prepared(tmp_path, labels=64, texts=256, overrides=["train.epochs=4"])
    train(config, join_world("cpu"))
    assert load_label_order(Path(config.run.folder)).labels == 64
    labels, scores = Predictor(config.run.folder, device="cpu").topk(["w0 w1", "w7 w8 w9"], k=70)
    assert labels.shape == (2, 70)
    assert sorted(labels[0][:64]) == list(range(64))
    assert (labels[:, 64:] == -1).all()
    assert (np.diff(scores[:, :64]) <= 0).all()


def test_a_refused_command_leaves_a_run_as_it_was(tmp_path: Path) -> None:
    """Other data, another encoder, another tail: what predict needs of the run is still there."""
    config = make_prepared(tmp_path / "one", overrides=["train.max_steps=4"])
    train(config, join_world("cpu"))
    run = Path(config.run.folder)

    def held() -> dict[str, bytes]:
        return {path.relative_to(run).as_posix(): path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}

    before = held()
    assert {"config.yaml", "labels.arrow", "checksums.json", "encoder/config.json"} <= before.keys()
    other = copy.deepcopy(config)
    other.data.prepared = make_prepared(tmp_path / "two", seed=5).data.prepared
    wide, sparse = copy.deepcopy(config), copy.deepcopy(config)
    wide.encoder.width, sparse.output.fan_in = 64, 4
    for asked, said in (
        (other, r"another label order .*\(data.prepared\), or another run.folder"),
        (wide, r"shape .*; set encoder.\* as the run's config.yaml has it, or name another run.folder"),
        (sparse, r"rows of shape .*; set output.\* as the run's config.yaml has it"),
    ):
        with pytest.raises(CheckpointError, match=said):
            train(asked, join_world("cpu"))
        assert held() == before
    with pytest.raises(CheckpointError, match="another label order"):
        check_run(other)  # before ranks start


def test_fewer_epochs_than_a_run_has_are_refused(tmp_path: Path) -> None:
    config = make_prepared(tmp_path, overrides=["train.epochs=2"])
    train(config, join_world("cpu"))
    page = (Path(config.run.folder) / "config.yaml").read_bytes()
    train(config, join_world("cpu"))  # nothing to do
    fewer = dataclasses.replace(config, train=dataclasses.replace(config.train, epochs=1.0))
    with pytest.raises(ConfigError, match=r"is at step \d+ already, these settings end at \d+; raise train.epochs, or choose another"):
        train(fewer, join_world("cpu"))
    assert (Path(config.run.folder) / "config.yaml").read_bytes() == page
    larger = dataclasses.replace(config, train=dataclasses.replace(config.train, batch_size=4 * config.train.batch_size))
    assert train(larger, join_world("cpu")).reason == "finished"  # fewer steps by then, no fewer epochs


def test_a_run_that_goes_on_with_other_settings_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_prepared(tmp_path, overrides=["train.max_steps=3"])
    for words in ({}, {"batch_size": 8}, {}):
        config.train.max_steps += 1
        train(dataclasses.replace(config, train=dataclasses.replace(config.train, **words)), join_world("cpu"))
    was = config.train.batch_size
    told = [event["changed"] for event in read_events(config.run.folder) if event["event"] == "start"]
    assert told == [[], [f"train.batch_size=8 (was {was})"], [f"train.batch_size={was} (was 8)"]]
    events = Path(config.run.folder) / "metrics.jsonl"
    written = events.read_bytes()
    events.write_bytes(b"")
    with Progress(Path(config.run.folder), "train"):
        events.write_bytes(written)
    assert f"goes on with other settings than before: train.batch_size={was} (was 8)" in " ".join(capsys.readouterr().err.split())
