"""``haste average``: a run whose weights are the mean of those of others, and what has no mean."""

import copy
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_centroids import LABELS, with_vectors
from test_study import lines_of
from tiny import final_tensors, haste, make_prepared, run_ranks, train_all

from haste_dist import averaging, checkpoint
from haste_dist.averaging import average_runs
from haste_dist.config import Config, RewireConfig, load_config, save_config
from haste_dist.errors import ConfigError, HasteError
from haste_dist.export import export
from haste_dist.predictor import Predictor
from haste_dist.runlog import read_events, seconds_trained
from haste_dist.scoring import evaluate_run
from haste_dist.trials import read_result, read_study_page, trials_of
from haste_dist.verify import verify
from haste_dist.world import join_world
from haste_launch import cli

TEXTS = ["w0 w1 w14", "w7 w8 w9 w21", "w3"]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A problem whose tail starts from centroids, with an encoder that has weights of its own."""
    config, _ = with_vectors(tmp_path_factory.mktemp("problem"), "train.max_steps=8", "rewire.interval=0")
    train_all(join_world("cpu"), [config])
    exported = export(config.run.folder, Path(config.run.folder).parent / "exported", "last")
    config.encoder.name = str(exported / "encoder")
    return config


def seeds_of(config: Config, folder: Path, seeds: int, *changes: Callable[[Config], None]) -> list[Config]:
    """The config in run folders of their own, one a seed."""
    found = []
    for seed in range(seeds):
        one = copy.deepcopy(config)
        one.run.seed, one.run.folder = seed, f"{folder}/run-{seed}"
        for change in changes:
            change(one)
        found.append(one)
    return found


def frozen(config: Config) -> None:
    config.encoder.frozen = True


def logits(run: str | Path) -> np.ndarray:
    """(n, LABELS) of TEXTS, by label."""
    found, values = Predictor(run).topk(TEXTS, k=LABELS)
    by_label = np.empty_like(values)
    np.put_along_axis(by_label, found, values, 1)
    return by_label


def test_weights_are_the_mean_and_the_run_is_whole(pretrained: Config, tmp_path: Path) -> None:
    """The first run was trained on two ranks, the others on one."""
    first, *others = configs = seeds_of(pretrained, tmp_path, 3)
    first.checkpoint.store = str(tmp_path / "store")
    first.launch.address = "10.0.0.1:23456"
    run_ranks(2, train_all, [first])
    train_all(join_world("cpu"), others)
    new = tmp_path / "mean"
    folder = average_runs(new, [config.run.folder for config in configs], "last")
    runs, mean = [final_tensors(config.run.folder) for config in configs], final_tensors(str(new))
    assert set(mean) == set(runs[0])
    moved = 0
    for name, tensor in mean.items():
        if "momentum" in name:
            assert not tensor.any(), name
        elif name == "tail.index":
            assert torch.equal(tensor, runs[0][name])
        else:
            exact = torch.stack([run[name].double() for run in runs]).mean(0)
            torch.testing.assert_close(tensor.double(), exact, rtol=1e-6, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")
            moved += not torch.equal(tensor, runs[0][name])
    assert moved > 5
    verify(new)
    assert len(list(folder.glob("output-*-of-00002.safetensors"))) == 2
    config = load_config(new / "config.yaml")
    assert (config.checkpoint.store, config.launch.address) == ("", "")
    assert evaluate_run(config, join_world("cpu"), "best")["rows"] == 48
    assert [Path(one).parents[1].name for one in mean_event(new)["checkpoints"]] == ["run-0", "run-1", "run-2"]
    exported = export(new, tmp_path / "exported")
    np.testing.assert_array_equal(logits(new), logits(exported))
    config.train.max_steps = 12  # and training goes on from it
    train_all(join_world("cpu"), [config])
    assert [event["step"] for event in read_events(new) if event["event"] == "step"] == [9, 10, 11, 12]


def test_where_features_differ_the_mean_keeps_its_largest(pretrained: Config, tmp_path: Path) -> None:
    def reembedded(config: Config) -> None:
        config.rewire = RewireConfig(interval=3, until=1.0, fraction=0.5, grow="embeddings")
        config.encoder.lr = 3e-3

    configs = seeds_of(pretrained, tmp_path, 3, reembedded)
    train_all(join_world("cpu"), configs)
    average_runs(tmp_path / "mean", [config.run.folder for config in configs], "last")
    verify(tmp_path / "mean")
    runs, mean = [final_tensors(config.run.folder) for config in configs], final_tensors(str(tmp_path / "mean"))
    assert not torch.equal(runs[0]["tail.index"], runs[1]["tail.index"])
    lost = 0
    for group, index_F in enumerate(mean["tail.index"].long()):
        exact_GM = torch.zeros(16, 32, dtype=torch.float64)
        for run in runs:
            exact_GM[:, run["tail.index"][group].long()] += run["tail.weight"][group].double() / 3
        energy_M = exact_GM.square().sum(0)
        assert index_F.tolist() == sorted(energy_M.argsort(descending=True)[: len(index_F)].tolist())
        torch.testing.assert_close(mean["tail.weight"][group].double(), exact_GM[:, index_F], rtol=1e-6, atol=1e-7)
        lost += len(exact_GM.any(0).nonzero()) > len(index_F)
    assert lost


def test_of_one_frozen_encoder_the_mean_answers_with_the_mean(pretrained: Config, tmp_path: Path) -> None:
    """Then logits are linear in what is averaged."""
    configs = seeds_of(pretrained, tmp_path, 2, frozen)
    train_all(join_world("cpu"), configs)
    average_runs(tmp_path / "mean", [config.run.folder for config in configs])
    one, two = (logits(config.run.folder) for config in configs)
    assert np.abs(one - two).max() > 0.01
    np.testing.assert_allclose(logits(tmp_path / "mean"), (one + two) / 2, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float8"])
def test_what_is_kept_is_the_nearest_value(dtype: str, pretrained: Config, tmp_path: Path) -> None:
    configs = seeds_of(pretrained, tmp_path, 2, frozen)
    train_all(join_world("cpu"), configs)
    folders = [config.run.folder for config in configs]
    average_runs(tmp_path / "exact", folders)
    average_runs(tmp_path / "short", folders, dtype=dtype)
    exact, short = final_tensors(str(tmp_path / "exact")), final_tensors(str(tmp_path / "short"))
    held = {"bfloat16": torch.bfloat16, "float8": torch.float8_e4m3fn}[dtype]
    for name in ("head.weight", "tail.weight"):
        assert short[name].dtype == held
        assert torch.equal(short[name].float(), exact[name].to(held).float())
    assert torch.equal(short["tail.bias"], exact["tail.bias"])
    assert load_config(tmp_path / "short/config.yaml").output.weight_dtype == dtype
    average_runs(tmp_path / "again", [tmp_path / "short", *folders])
    average_runs(tmp_path / "after", [folders[0], tmp_path / "short"])
    assert final_tensors(str(tmp_path / "again"))["tail.weight"].dtype == held  # as in the first
    mean = (final_tensors(folders[0])["tail.weight"] + short["tail.weight"].float()) / 2
    assert torch.equal(final_tensors(str(tmp_path / "after"))["tail.weight"], mean)


def test_checkpoints_of_one_run_have_a_mean_a_few_rows_at_a_time(
    pretrained: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (config,) = seeds_of(pretrained, tmp_path, 1)
    config.train.checkpoint_every, config.checkpoint.keep = 4, 5
    config.train.lowest_lr, config.train.epochs = 0.5, 8 / 12
    train_all(join_world("cpu"), [config])
    rates = [event["lr_output"] for event in read_events(config.run.folder) if event["event"] == "step"]
    assert (len(rates), rates[-1]) == (8, config.output.lr / 2)
    places = [Path(config.run.folder) / "checkpoints" / f"step-{step:08d}" for step in (8, 4)]
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    average_runs(whole, places)
    monkeypatch.setattr(averaging, "SHARD_BYTES", 4000)
    looked_at: list[str] = []
    check_file = checkpoint.check_file
    monkeypatch.setattr(checkpoint, "check_file", lambda folder, name, *more: (looked_at.append(name), check_file(folder, name, *more)))
    folder = average_runs(pieces, places)
    assert sorted(looked_at) == ["encoder.safetensors"] * 2 + ["output-00000-of-00001.safetensors"] * 2  # once, not once a shard
    assert len(list(folder.glob("output-*"))) > 3
    verify(pieces)
    one, other = final_tensors(str(whole)), final_tensors(str(pieces))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    last = final_tensors(config.run.folder)
    assert not torch.equal(one["tail.weight"], last["tail.weight"])
    assert mean_event(whole)["checkpoints"] == [str(place) for place in places]
    average_runs(tmp_path / "twice", [config.run.folder, places[1]], "last")  # a run and a checkpoint of its own
    assert torch.equal(final_tensors(str(tmp_path / "twice"))["tail.weight"], one["tail.weight"])


def mean_event(run: Path) -> dict[str, Any]:
    """What the log says of the mean."""
    (event,) = [event for event in read_events(run) if event["event"] == "average"]
    return event


def rewired(config: Config) -> None:
    config.output.start, config.rewire.interval = "random", 3


def pooled(config: Config) -> None:
    config.encoder.pooling = "cls" if config.run.seed else "mean"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            rewired,
            r"its groups read other features than those of .* \(\d+% in common\), so the weights have no mean; "
            r"train the runs with output.start=centroids, and rewire.interval=0 or rewire.grow=embeddings",
        ),
        (pooled, "run-1: encoder.pooling=cls, in .*run-0 it is mean"),
    ],
)
def test_runs_without_a_mean_are_refused_and_nothing_is_left(
    change: Callable[[Config], None], says: str, pretrained: Config, tmp_path: Path
) -> None:
    configs = seeds_of(pretrained, tmp_path, 2, change)
    train_all(join_world("cpu"), configs)
    with pytest.raises(ConfigError, match=says) as told:
        average_runs(tmp_path / "mean", [config.run.folder for config in configs], "last")
    assert "\n" not in str(told.value)
    assert not (tmp_path / "mean").exists()


def test_encoders_that_were_drawn_with_other_seeds_have_no_mean(tmp_path: Path) -> None:
    configs = seeds_of(make_prepared(tmp_path, overrides=["train.max_steps=2", "rewire.interval=0"]), tmp_path, 2)
    train_all(join_world("cpu"), configs)
    runs = [config.run.folder for config in configs]
    with pytest.raises(ConfigError, match=r"run-1/.*its model.embeddings.* has nothing in common with that of .*run-0"):
        average_runs(tmp_path / "mean", runs)
    other = make_prepared(tmp_path / "other", labels=90, overrides=["train.max_steps=2", "rewire.interval=0"])
    train_all(join_world("cpu"), [other])
    with pytest.raises(ConfigError, match="has another label order than"):
        average_runs(tmp_path / "mean", [runs[0], other.run.folder])
    assert not (tmp_path / "mean").exists()


def test_a_dev_split_of_several_seeds_is_none(pretrained: Config, tmp_path: Path) -> None:
    configs = seeds_of(pretrained, tmp_path, 2, frozen)
    train_all(join_world("cpu"), configs)
    for config in configs:  # as if each had held out texts of its own
        page = Path(config.run.folder) / "config.yaml"
        page.write_text(page.read_text().replace("dev_fraction: 0.0", "dev_fraction: 0.1").replace("split: test", "split: dev"))
        (page.parent / "checksums.json").unlink()
    average_runs(tmp_path / "mean", [config.run.folder for config in configs])
    found = load_config(tmp_path / "mean/config.yaml")
    assert (found.data.dev_fraction, found.evaluate.split) == (0.0, "test")
    page.write_text(page.read_text().replace("seed: 1", "seed: 0"))  # the same split: it stays
    average_runs(tmp_path / "same", [config.run.folder for config in configs])
    assert load_config(tmp_path / "same/config.yaml").data.dev_fraction == 0.1
    page.write_text(page.read_text().replace("dev_fraction: 0.1", "dev_fraction: 0.0"))  # one has trained on all
    average_runs(tmp_path / "all", [config.run.folder for config in configs])
    assert load_config(tmp_path / "all/config.yaml").data.dev_fraction == 0.0


def test_mistakes_are_one_line_and_cost_nothing(
    pretrained: Config, tmp_path: Path, warm_python: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = seeds_of(pretrained, tmp_path, 2, frozen)
    train_all(join_world("cpu"), configs)
    one, two = (config.run.folder for config in configs)
    exported = export(one, tmp_path / "exported")
    new = str(tmp_path / "mean")
    for runs, says in (
        ([one], "two runs or more, each once"),
        ([one, two, one], "two runs or more, each once"),
        ([one, new], "two runs or more, each once"),
        ([one, str(exported)], "exported: was exported; name the run that haste train wrote"),
        ([one, str(tmp_path / "nowhere")], "nowhere: no run folder"),
    ):
        with pytest.raises(HasteError, match=says):
            average_runs(new, runs)
    done = haste("average", new, one, two)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{new}: the mean of 2 checkpoints; haste evaluate {new} scores it\n"
    before = final_tensors(new)
    monkeypatch.setattr(sys, "executable", warm_python)
    done = haste("average", new, one, two)
    assert done.returncode == 2
    assert re.fullmatch(r"haste: error: .*/mean: holds a run already \(step-00000008\); choose another folder\n", done.stderr)
    assert all(torch.equal(tensor, before[name]) for name, tensor in final_tensors(new).items())
    place = Path(two) / "checkpoints/step-00000008"
    for damaged in (place / "encoder.safetensors", *place.glob("output-*")):
        sound = damaged.read_bytes()
        damaged.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
        done = haste("average", f"{new}-2", one, two)
        assert done.returncode == 2
        assert damaged.name in done.stderr
        assert done.stderr.count("\n") == 1
        assert not Path(f"{new}-2").exists()
        damaged.write_bytes(sound)
    assert json.loads((Path(one) / "checkpoints/last.json").read_text())["step"] == 8


def test_a_study_averages_seeds(
    pretrained: Config, tmp_path: Path, warm_python: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it says of them is what ``haste average`` and ``haste evaluate`` say."""
    monkeypatch.setattr(sys, "executable", warm_python)  # for a dozen runs
    save_config(pretrained, tmp_path / "config.yaml")
    file, out, records = tmp_path / "study.yaml", tmp_path / "study", tmp_path / "records"
    file.write_text(f"config: {tmp_path}/config.yaml\nseeds: [2, 3]\naverage: 2\ncases: {{plain: []}}\n")
    words = ["study", str(file), "--out", str(out), "--no-plot", "--records", str(records), "--side-by-side", "2"]
    assert cli.main(words) == 0, (capsys.readouterr(), *(log.read_text() for log in out.rglob("output.log")))
    study = read_study_page(file)
    trials = {trial.folder.name: trial for trial in trials_of(study, out, [])}
    assert list(trials) == ["plain-2", "plain-3", "plain-average-2"]
    results = {name: read_result(trial) or {} for name, trial in trials.items()}
    assert all(results.values())
    assert not list(out.rglob("*.safetensors"))  # of checkpoints
    configs = seeds_of(load_config(out / "runs/plain-2/config.yaml"), tmp_path, 4)[2:]  # its label order is the study's own
    train_all(join_world("cpu"), configs)
    average_runs(tmp_path / "mean", [config.run.folder for config in configs], "last")
    expected = evaluate_run(load_config(tmp_path / "mean/config.yaml"), join_world("cpu"), "last")
    found = results["plain-average-2"]
    assert {name: found[name] for name in expected if "@" in name} == {name: expected[name] for name in expected if "@" in name}
    assert found["step"] == results["plain-2"]["step"] + results["plain-3"]["step"] == 16
    assert found["output_bytes"] == results["plain-2"]["output_bytes"]
    report = (out / "report.md").read_text()
    assert "| plain-average | 1 | " in report
    assert "CASE-average is the mean of the weights of 2 seeds each" in report
    (line,) = [line for line in lines_of(records) if (line["case"], line["seed"]) == ("plain-average", 2)]
    assert line["note"].startswith("haste study, mean of the weights of seeds 2, 3;")
    assert line["shape"] == {"L": LABELS, "N": 16, "D": 32, "F": 8, "G": 16, "W": 1}

    # A mean that is missing needs its runs' weights, which are made again; and it waits in vain for a run that fails.
    capsys.readouterr()
    shutil.rmtree(trials["plain-average-2"].folder)
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert [line for line in said.splitlines() if "trained again" in line] == [
        f"plain-{seed}: its weights are gone, so it is trained again" for seed in (2, 3)
    ]
    again = read_result(trials["plain-average-2"]) or {}
    assert {name: again[name] for name in expected if "@" in name} == {name: found[name] for name in expected if "@" in name}
    assert again["step"] == 16

    # A page that keeps weights makes those that are gone again, and only once; what it keeps is what it scored.
    page = file.read_text()
    file.write_text(f"{page}keep_weights: true\n")
    assert cli.main(words) == 0
    assert capsys.readouterr().out.count("trained again") == 3
    assert all(trial.has_weights for trial in trials.values())
    kept = evaluate_run(load_config(trials["plain-average-2"].folder / "config.yaml"), join_world("cpu"), "last")
    assert {name: kept[name] for name in expected if "@" in name} == {name: found[name] for name in expected if "@" in name}
    assert cli.main(words) == 0
    assert "3 of 3 runs are in" in capsys.readouterr().out
    file.write_text(page)
    for trial in trials.values():
        shutil.rmtree(trial.folder / "checkpoints")
    retrained = read_result(trials["plain-2"]) or {}
    assert retrained["train_seconds"] < seconds_trained(read_events(trials["plain-2"].folder))  # of both times
    for name in ("plain-average-2", "plain-3"):
        shutil.rmtree(trials[name].folder)
    (Path(pretrained.encoder.name) / "model.safetensors").rename(tmp_path / "away")
    try:
        assert cli.main(words) == 2
    finally:
        (tmp_path / "away").rename(Path(pretrained.encoder.name) / "model.safetensors")
    assert "3 of 3 runs failed" in capsys.readouterr().err
    assert read_result(trials["plain-2"]) == retrained  # what there was is kept
    assert not trials["plain-2"].has_weights
