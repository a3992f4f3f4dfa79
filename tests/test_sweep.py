"""haste sweep: what varies, what is tried next, what is kept, and how it goes on."""

import contextlib
import csv
import json
from argparse import Namespace
from pathlib import Path

import pytest
from raw_sources import write_source
from tiny import make_prepared

from haste_dist.config import Config, save_config
from haste_dist.errors import ConfigError, DataError, HasteError, Interrupted
from haste_dist.runlog import RunLog
from haste_launch import cli
from haste_launch import sweep as module
from haste_launch.sweep import Trial, choose, read_trials, sweep, write_trial
from haste_launch.sweep_space import Varied, combinations, needs_prepare, read_varied


def test_what_varies() -> None:
    lr, grow, size = read_varied(["output.lr=0.01..1:log", "rewire.grow=random,gradient", "output.fan_in=16..64"])
    assert lr == Varied("output.lr", low=0.01, high=1.0, log=True)
    assert grow == Varied("rewire.grow", words=("random", "gradient"))
    assert size == Varied("output.fan_in", low=16.0, high=64.0, whole=True)
    assert (lr.word(0.12345678), size.word(32), grow.word("random")) == ("output.lr=0.123457", "output.fan_in=32", "rewire.grow=random")
    assert combinations([grow, Varied("train.epochs", words=("1", "2", "3"))]) == 6
    assert combinations([grow, lr]) == 0
    assert not needs_prepare([lr, grow], 0.1)
    assert needs_prepare(read_varied(["groups.method=random,semantic"]), 0.0)
    assert needs_prepare(read_varied(["output.group_size=16,32"]), 0.0)
    seeds = read_varied(["run.seed=1,2"])
    assert not needs_prepare(seeds, 0.0)
    assert needs_prepare(seeds, 0.1)  # each holds out texts of its own


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "nothing varies"),
        (["output.lr"], "reads name=a,b,c or name=LOW..HIGH"),
        (["output.lr=1..a"], "both numbers"),
        (["output.lr=1..0.5"], "LOW must be less than HIGH"),
        (["output.lr=0..1:log"], "over 0 with :log"),
        (["output.lr=1..2:lin"], "LOW must be less"),
        (["run.folder=a,b"], "says where a run goes"),
        (["output.lr=1,2", "output.lr=3,4"], "output.lr is varied twice"),
    ],
)
def test_a_mistake_in_what_varies_is_told(words: list[str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read_varied(words)


def test_every_combination_comes_once() -> None:
    varied = read_varied(["rewire.grow=random,gradient", "output.fan_in=16,32,64"])
    trials: list[Trial] = []
    for number in range(6):
        trials.append(Trial(number, choose(trials, varied, 6, 0), 0.5))
    assert {(t.settings["rewire.grow"], t.settings["output.fan_in"]) for t in trials} == {
        (a, b) for a in ("random", "gradient") for b in ("16", "32", "64")
    }


def test_the_search_goes_where_it_is_good_and_can_be_repeated() -> None:
    """A hill at 0.03 on a logarithmic scale; after a restart the next settings are the ones that it would have tried."""
    import math

    varied = read_varied(["output.lr=0.001..10:log", "train.batch_size=16..64"])
    trials: list[Trial] = []
    for number in range(40):
        settings = choose(trials, varied, 40, 0)
        assert settings == choose(list(trials), varied, 40, 0)
        assert isinstance(settings["train.batch_size"], int)
        assert 0.001 <= settings["output.lr"] <= 10
        trials.append(Trial(number, settings, 1.0 - abs(math.log10(settings["output.lr"] / 0.03)) / 4))
    late = sorted(abs(math.log10(trial.settings["output.lr"] / 0.03)) for trial in trials[20:])
    early = sorted(abs(math.log10(trial.settings["output.lr"] / 0.03)) for trial in trials[:10])
    assert late[10] < early[5]


@pytest.fixture
def args(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Namespace:
    """A sweep over a real config whose trials are made up: value = output.lr, failing over 3."""
    config = make_prepared(tmp_path)
    save_config(config, tmp_path / "c.yaml")
    monkeypatch.setattr(module, "ray_session", lambda _: contextlib.nullcontext())

    def train_trial(config: Config) -> None:
        if config.output.lr > 3:
            raise HasteError("too steep")
        with RunLog(config.run.folder) as log:
            log.event("end", step=1, reason="finished", best=config.output.lr / 10, best_step=1)

    monkeypatch.setattr(module, "train_trial", train_trial)
    words = ["sweep", str(tmp_path / "c.yaml"), "--vary", "output.lr=1,2,3,4", "--out", str(tmp_path / "out")]
    return cli.parse(words)


def test_a_sweep_over_data_prepares_what_its_folder_was_made_of(tmp_path: Path) -> None:
    config = make_prepared(tmp_path)
    page = Path(config.data.prepared) / "manifest.json"
    source = write_source(tmp_path / "source", "jsonl", [("a", "w1", [0])], [("b", "w2", [0])], 1)
    config.data.source = str(source)
    files = [{"name": file.name, "bytes": file.stat().st_size} for file in source.iterdir()]
    for made_of, fits in ((files, True), ([*files[1:], {**files[0], "bytes": 1}], False)):
        page.write_text(json.dumps({**json.loads(page.read_text()), "source": {"format": "jsonl", "files": made_of}}))
        with contextlib.nullcontext() if fits else pytest.raises(ConfigError, match="was made of other files"):
            module.check_source(config)
    for none in (str(tmp_path / "nowhere"), ""):
        config.data.prepared = none
        module.check_source(config)


def test_a_sweep_ranks_its_trials(args: Namespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep(args) == 0
    rows = list(csv.DictReader((tmp_path / "out" / "sweep.csv").open()))
    assert [(row["output.lr"], row["P@1"], row["note"]) for row in rows] == [
        ("3", "30.00", ""),
        ("2", "20.00", ""),
        ("1", "10.00", ""),
        ("4", "", "too steep"),
    ]
    said = capsys.readouterr().out
    assert "trial 4 of 4: output.lr=4: too steep" in said
    assert said.strip().endswith("sweep.png")
    assert (tmp_path / "out" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    lines = (tmp_path / "out" / "trials.jsonl").read_text().splitlines()
    assert sweep(args) == 0  # nothing is left to do
    assert (tmp_path / "out" / "trials.jsonl").read_text().splitlines() == lines
    args.vary = ["output.lr=1,2"]
    with pytest.raises(HasteError, match="holds a sweep over something else"):
        sweep(args)


def test_an_interrupted_trial_goes_on(args: Namespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = module.train_trial
    folders: list[str] = []

    def stopped_once(config: Config) -> None:
        folders.append(Path(config.run.folder).name)
        if len(folders) == 2:
            raise Interrupted("the sweep stopped")
        whole(config)

    monkeypatch.setattr(module, "train_trial", stopped_once)
    with pytest.raises(Interrupted):
        sweep(args)
    assert sweep(args) == 0
    assert folders == ["trial-0000", "trial-0001", "trial-0001", "trial-0002", "trial-0003"]


def test_a_sweep_that_only_fails_ends(args: Namespace, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_: Config) -> None:
        raise HasteError("no data")

    monkeypatch.setattr(module, "train_trial", fails)
    with pytest.raises(HasteError, match="the first 3 trials failed, the last one so: no data"):
        sweep(args)
    args.vary = ["output.lrr=1,2"]
    with pytest.raises(ConfigError, match="unknown setting"):
        sweep(args)


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_a_sweep_with_a_file_in_its_way_is_told_in_one_line(args: Namespace, out: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    args.out = str(tmp_path / out)
    with pytest.raises(DataError, match=f"^{args.out}: cannot be written .*; choose another --out$"):
        sweep(args)


def test_a_torn_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    write_trial(path, Trial(0, {"a": 1}))
    write_trial(path, Trial(0, {"a": 1}, 0.5, 2.0))
    with path.open("a") as file:
        file.write(json.dumps({"number": 1})[:-3])
    assert read_trials(path) == [Trial(0, {"a": 1}, 0.5, 2.0)]
