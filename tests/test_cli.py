"""The ``haste`` command as a user meets it: what it prints where, and how it exits."""

import contextlib
import json
import math
import shlex
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from haste_dist import __version__
from haste_dist.calibration import Calibration
from haste_dist.config import Config, load_config, save_config
from haste_dist.datasets import NAMES
from haste_dist.errors import ConfigError, DataError, HasteError, Interrupted
from haste_dist.predict import LabelNames
from haste_launch import cli, commands

HASTE = [sys.executable, "-m", "haste_launch.cli"]
HEAVY = {"torch", "ray", "transformers", "deepspeed", "pyarrow", "matplotlib", "numpy", "rich"}


def haste(words: str, **more: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*HASTE, *shlex.split(words)], capture_output=True, text=True, timeout=120, check=False, **more)  # type: ignore[call-overload]


def one_error_line(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert done.stderr.startswith("haste: error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def test_help_names_every_command_and_config_prints_the_page() -> None:
    done = haste("--help")
    assert done.returncode == 0
    assert done.stderr == ""
    for command in ("prepare", "train", "evaluate", "predict", "plot", "config", "datasets"):
        assert f"\n    {command} " in done.stdout
        assert hasattr(commands, command)
    assert haste("--version").stdout == f"haste {__version__}\n"
    done = haste("config demo train.epochs=0.5")
    assert done.returncode == 0
    assert "  epochs: 0.5 " in done.stdout


@pytest.mark.parametrize("words", [["--help"], ["config", "demo"]])
def test_an_answer_does_not_wait_for_heavy_imports(words: list[str]) -> None:
    program = (
        "import sys\nfrom haste_launch.cli import main\n"
        f"try: main({words!r})\nexcept SystemExit: pass\n"
        f"print(sorted({HEAVY!r} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr == "[]\n"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("config nosuch", "no such config file"),
        ("config demo train.epoch=3", "did you mean 'train.epochs'?"),
        ("train demo output.group_size=48", "must be in [1 | 16 | 32 | 64 | 128]"),
        ("train demo data.prepared=nosuch", "haste prepare"),
        ("train demo data.prepared=", "data.prepared is empty"),
        ("prepare demo data.source=nosuch", "nosuch"),
        ("evaluate nosuch", "no run folder"),
        ("predict nosuch --text x", "no run folder"),
        ("plot nosuch", "no run folder"),
        ("datasets build nosuch --out out", "icd10"),
        ("datasets build wordnet --out out --source nosuch", "nosuch"),
    ],
)
def test_a_mistake_is_told_in_one_line(tmp_path: Path, words: str, says: str) -> None:
    assert says in one_error_line(haste(words, cwd=tmp_path))


@pytest.mark.parametrize(
    "words",
    [
        "",
        "nosuch",
        "average",
        "config",
        "plot a b",
        "predict run",
        "predict run --text x -k 0",
        "predict run --text x --input y",
        "train demo -z",
        "plot run a.b=c",
    ],
)
def test_bad_usage_exits_2(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(shlex.split(words))
    assert stopped.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_settings_may_stand_before_between_and_after_options() -> None:
    for words in (
        "predict run a.b=1 c.d=2 --text x",
        "predict run --text x a.b=1 c.d=2",
        "predict --text x run a.b=1 c.d=2",
        "predict run a.b=1 --text x c.d=2",
    ):
        args = cli.parse(shlex.split(words))
        assert (args.run, args.overrides, args.text) == ("run", ["a.b=1", "c.d=2"], ["x"])


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (DataError("trn.json: line 3: bad"), 2, "haste: error: trn.json: line 3: bad\n"),
        (HasteError("two\nlines"), 2, "haste: error: two lines\n"),
        (Interrupted("saved in runs/x"), 130, "haste: interrupted: saved in runs/x\n"),
        (KeyboardInterrupt(), 130, "haste: interrupted\n"),
    ],
)
def test_errors_become_a_line_and_a_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, status: int, line: str
) -> None:
    def fail(args: Namespace) -> int:
        raise error

    monkeypatch.setattr(commands, "plot", fail)
    assert cli.main(["plot", "run"]) == status
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", line)


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(args: Namespace) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr(commands, "plot", fail)
    with pytest.raises(ZeroDivisionError):
        cli.main(["plot", "run"])


def test_a_status_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "plot", lambda args: 3)
    assert cli.main(["plot", "run"]) == 3


def test_a_reader_that_leaves_is_no_error() -> None:
    with subprocess.Popen([*HASTE, "config", "demo"], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == cli.BROKEN_PIPE


def test_ctrl_c_is_one_line_and_130() -> None:
    program = (
        "import signal, sys, time\nfrom haste_launch import cli, commands\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs inherit it ignored
        "def wait(args):\n    print('ready', flush=True)\n    time.sleep(60)\n"
        "commands.plot = wait\nsys.exit(cli.main(['plot', 'run']))\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
        assert process.stderr.read() == "haste: interrupted\n"


def test_an_empty_text_is_refused_before_the_model_loads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_config(Config(), tmp_path / "config.yaml")
    assert cli.main(["predict", str(tmp_path), "--text", "words", "--text", " "]) == 2
    assert "a text is empty" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["--text x", "--input {run}/x.txt", "--input {run}/x.txt --output {run}/y.jsonl"])
@pytest.mark.parametrize("word", ["rows=100", "batch_size=8", "parts=2", "label_texts=false", "filter=pairs.txt"])
def test_settings_for_a_folder_are_refused_elsewhere_before_anything_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], where: str, word: str
) -> None:
    save_config(Config(), tmp_path / "config.yaml")
    assert cli.main(["predict", str(tmp_path), *shlex.split(where.format(run=tmp_path)), f"predict.{word}"]) == 2
    error = capsys.readouterr().err
    assert f"predict.{word.partition('=')[0]}=" in error
    assert "is for output into a folder" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(("words", "score"), [([], 0.25), (["predict.calibrated=false"], 0.5)])
def test_scores_to_the_screen_and_into_a_file_are_calibrated_by_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], score: float
) -> None:
    names = LabelNames(pa.table({"text": ["river"], "uid": ["a"]}))
    files = Namespace(names=names, calibration=Calibration(1.0, math.log(1 / 3)))
    model = Namespace(files=files, topk=lambda texts, k: (np.zeros((len(texts), 1), np.int64), np.zeros((len(texts), 1), np.float32)))
    monkeypatch.setattr("haste_dist.predictor.Predictor", lambda *_: model)
    save_config(Config(), tmp_path / "config.yaml")
    assert cli.main(["predict", str(tmp_path), "--text", "x", *words]) == 0
    assert f"{score:.3f}  river" in capsys.readouterr().out
    assert cli.main(["predict", str(tmp_path), "--text", "x", "--output", str(tmp_path / "out.jsonl"), *words]) == 0
    assert json.loads((tmp_path / "out.jsonl").read_text())["scores"] == [score]


def test_a_run_is_read_with_its_own_page_and_from_where_it_lies_now(tmp_path: Path) -> None:
    config = Config()
    config.run.folder = "where/it/was/trained"
    config.train.epochs = 7
    save_config(config, tmp_path / "config.yaml")
    found = commands.run_config(str(tmp_path), ["evaluate.split=train"])
    assert found.run.folder == str(tmp_path)
    assert (found.train.epochs, found.evaluate.split) == (7, "train")
    with pytest.raises(ConfigError, match="unknown setting"):
        commands.run_config(str(tmp_path), ["evaluate.spilt=train"])


@pytest.mark.parametrize(
    ("words", "module", "function"),
    [
        ("evaluate {run}", "ray_train", "evaluate"),
        ("predict {run} --input x.txt --output out", "predict", "predict_into"),
        ("serve {run}", "serve", "serve_run"),
        ("labels add {run} {run}-2 data.source={run} data.prepared=b", "ray_session", "ray_session"),
        ("train {run}/config.yaml", "ray_train", "train"),
    ],
)
def test_the_cluster_that_a_run_was_trained_on_is_joined_to_train_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, module: str, function: str
) -> None:
    """Under Slurm it ends with the job; a page that is to be trained again says itself where."""
    joined: list[str] = []

    def join(config: Config, *_: object) -> int:
        joined.append(config.launch.address)
        raise Interrupted("seen")

    monkeypatch.setattr(f"haste_launch.{module}.{function}", join)
    monkeypatch.setattr("haste_dist.sources.find_source", lambda data: None)
    save_config(load_config(None, ["launch.address=10.0.0.1:23456", "data.source=a"]), tmp_path / "config.yaml")
    line = shlex.split(words.format(run=tmp_path))
    assert cli.main(line) == 130
    assert cli.main([*line, "launch.address=10.0.0.2:6379"]) == 130
    assert joined == ["10.0.0.1:23456" if function == "train" else "", "10.0.0.2:6379"]


def test_prepare_runs_inside_a_ray_session_and_train_gets_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    import haste_dist.prepare
    import haste_dist.sources
    import haste_launch.ray_session
    import haste_launch.ray_train

    order: list[object] = []

    @contextlib.contextmanager
    def session(config: Config, meanwhile: object):  # type: ignore[no-untyped-def]
        order.append("up")
        yield
        order.append("down")

    monkeypatch.setattr(haste_launch.ray_session, "ray_session", session)
    monkeypatch.setattr(haste_dist.sources, "find_source", lambda data: order.append(data))
    monkeypatch.setattr(haste_dist.prepare, "prepare", lambda config: order.append(config))
    monkeypatch.setattr(haste_launch.ray_train, "train", lambda config: order.append(config) or 0)
    wanted = load_config("demo", ["run.seed=3"])
    assert cli.main(["prepare", "demo", "run.seed=3"]) == 0
    assert cli.main(["train", "demo", "run.seed=3"]) == 0
    assert order == [wanted.data, "up", wanted, "down", wanted]


def test_evaluate_prints_what_the_ranks_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import haste_launch.ray_train

    save_config(Config(), tmp_path / "config.yaml")
    scores = {"P@1": 0.5, "P@3": 0.3, "P@5": 0.2, "rows": 10}

    def evaluate(config: Config, checkpoint: str, predictions: str | None) -> int:
        assert (checkpoint, predictions) == ("last", None)
        page = {"metrics": scores, "most_frequent_labels": {"P@1": 0.05}}
        (Path(config.run.folder) / "evaluate-dev.json").write_text(json.dumps(page))
        return 0

    monkeypatch.setattr(haste_launch.ray_train, "evaluate", evaluate)
    assert cli.main(["evaluate", str(tmp_path), "evaluate.split=dev", "--checkpoint", "last"]) == 0
    printed = capsys.readouterr().out
    assert "50.00" in printed
    assert "10.0 times" in printed
    assert "evaluate-dev.json" in printed
    for suffix in ("jsonl", "csv"):
        assert cli.main(["evaluate", str(tmp_path), "--predictions", str(tmp_path / f"p.{suffix}")]) == 2
        assert "are written as .parquet" in capsys.readouterr().err


def test_datasets_build_says_where_and_how_large(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import haste_dist.datasets

    asked: list[object] = []

    def build(*words: object) -> dict[str, int]:
        asked.extend(words)
        return {"train_texts": 35374, "test_texts": 12, "labels": 27332}

    monkeypatch.setattr(haste_dist.datasets, "build_dataset", build)
    assert cli.main(["datasets", "build", "wordnet", "--out", "o", "--source", "s"]) == 0
    assert asked == ["wordnet", "o", "s"]
    assert capsys.readouterr().out == "o: 35,374 texts to train on, 12 to test, 27,332 labels\n"


def test_help_names_every_data_set() -> None:
    done = haste("datasets build --help")
    assert all(name in done.stdout for name in NAMES)


def test_prepare_that_is_interrupted_tells_what_stays(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("haste_dist.sources.find_source", lambda *_: None)
    monkeypatch.setattr("haste_launch.ray_session.ray_session", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr("haste_dist.prepare.prepare", interrupted)
    assert cli.main(["prepare", "demo", "data.prepared=there"]) == cli.INTERRUPTED
    assert capsys.readouterr().err == "haste: interrupted: finished shards are kept in there; the same command goes on from there\n"
