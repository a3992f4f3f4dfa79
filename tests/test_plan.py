"""``haste plan``: what it prints, what it refuses, and that it never invents a figure."""

import dataclasses
from pathlib import Path

import pytest
from test_cost_model import study
from tiny import make_prepared

from haste_dist.config import load_config, save_config
from haste_dist.cost_model import Load, fit, kept_path
from haste_dist.memory import Facts, memory_plan
from haste_launch import cli
from haste_launch.plan import load_of_run


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HASTE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = cli.main(["plan", *words])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_memory_is_told_and_time_only_where_it_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["bert-base", "--labels", "10M", "--texts", "1M", "--gpu", "h100", "--gpus", "2"]
    status, out, _ = run(capsys, *line)
    assert status == 0
    assert "GiB on each of 2 NVIDIA H100 80GB HBM3s, 10,000,000 labels" in out
    assert "time: not measured on NVIDIA H100 80GB HBM3: run haste scale there" in out
    assert "fits: " in out
    fit([{**row, "device": "NVIDIA H100 80GB HBM3"} for row in study()]).save(kept_path("NVIDIA H100 80GB HBM3"))
    status, out, _ = run(capsys, *line)
    assert "a step: " in out
    assert "an epoch: " in out
    assert "1,954 steps" in out
    assert "assumed: " in out
    assert "not measured on" not in out


def test_a_run_that_does_not_fit_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "bert-base", "--labels", "1B", "--gpu", "h100", "--gpus", "2")
    assert status == 2
    assert "output weights" in out
    assert err.count("\n") == 1
    assert "each of 2 GPUs would need " in err
    assert "launch.ranks=" in err


def test_prepared_data_say_labels_texts_and_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_prepared(tmp_path)
    save_config(config, tmp_path / "c.yaml")
    status, out, _ = run(capsys, str(tmp_path / "c.yaml"))
    assert status == 0
    assert "GiB on each of 1 cpu, 101 labels" in out
    assert "not measured on cpu" in out


def test_a_step_of_several_passes_is_timed_as_one_large_batch_with_forward_passes_run_twice() -> None:
    facts = Facts(1_000_000, 20, 30_522, 0, 2)

    def load(*words: str) -> Load:
        config = load_config(None, ["encoder.name=scratch", "encoder.width=64", "encoder.heads=2", "output.fan_in=16", *words])
        return load_of_run(config, facts, memory_plan(config, facts), 32)

    passes = ["train.batch_size=512", "train.accumulation=16", "train.classifier_step=global"]
    several, one = load(*passes), load("train.batch_size=8192")
    assert several.encoder_flops == pytest.approx(one.encoder_flops * (1 + 15 / 16 / 3))
    assert dataclasses.replace(several, encoder_flops=one.encoder_flops) == one
    assert load(*passes, "encoder.frozen=true") == load("train.batch_size=8192", "encoder.frozen=true")
    assert one.updates == 1
    each = load("train.batch_size=8192", "train.accumulation=4")  # the output layer steps at each micro-batch, the encoder at the last
    assert dataclasses.replace(each, updates=1.0) == one
    assert each.updates == 0.25


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--gpu", "h900", "--labels", "1M"], "--gpu h900: its memory is not known"),
        (["--gpu", "h100", "--gpus", "4", "--labels", "1M", "launch.label_parallel=3"], "label_parallel=3 does not divide the 4 ranks"),
        (["--gpu", "h100", "--gpus", "4", "--labels", "900M", "launch.label_parallel=1"], "fits with launch.label_parallel=4"),
        (["--gpu", "h100", "--gpus", "4", "--labels", "1B"], "fits with encoder.graphs=false, or "),
        (
            ["--gpu", "h100", "--gpus", "4", "--labels", "1B", "launch.label_parallel=1"],
            "fits with encoder.graphs=false launch.label_parallel=4 (",
        ),
        (["--gpu", "h100"], "or plan without data: --labels L --texts T"),
        (["--gpu", "h100", "--labels", "no"], "--labels no: a whole number such as"),
        (["--gpu", "h100", "--labels", "1M", "--model", "none.json"], "none.json: no such file"),
    ],
)
def test_wrong_words_are_told_in_one_line(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "bert-base", *words)
    assert status == 2
    assert says in err
    assert err.count("\n") == 1
