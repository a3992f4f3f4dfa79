"""The scripts of benchmarks/, each on a tiny problem, so that what they use of the packages cannot change unnoticed."""

import contextlib
import importlib.util
import io
import json
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import uvicorn
from raw_sources import json_lines, label_lines, make_texts, make_wordpiece, write_lines
from tiny import make_prepared, make_tokenizer

from haste_dist.checkpoint import complete, pointed
from haste_dist.config import Config, load_config, save_config
from haste_dist.encoder import load_tokenizer
from haste_dist.gate import token_digest
from haste_dist.manifest import read_manifest
from haste_dist.service import build_service
from haste_dist.use_config import ServeConfig
from haste_launch import cli
from haste_launch.serve import TOKEN_VARIABLE

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py"))
Script = Callable[..., ModuleType]


def load(name: str) -> ModuleType:
    """A script as a module that nobody else sees."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Script:
    """A script with its words: ``script("serve", "runs/demo").main()`` runs it."""

    def with_words(name: str, *words: object) -> ModuleType:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, words)])
        monkeypatch.syspath_prepend(FOLDER)  # as Python does: predict imports from serve
        return load(name)

    return with_words


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A prepared problem, and beside it its settings as ``config.yaml``."""
    made = make_prepared(tmp_path_factory.mktemp("benchmarks"), overrides=["train.epochs=1", "checkpoint.keep=1"])
    save_config(made, Path(made.run.folder).parent / "config.yaml")
    return made


def settings_file(config: Config) -> Path:
    return Path(config.run.folder).parent / "config.yaml"


def records(folder: Path, topic: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{topic}.jsonl").read_text().splitlines()]


def run_here(words: list[str], **_: object) -> CompletedProcess:
    """In place of subprocess.run: the haste command in this process, on the Ray of these tests."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        status = cli.main(words[3:])
    return CompletedProcess(words, status, out.getvalue(), "")


def test_every_script_is_tested() -> None:
    assert SCRIPTS == ["grouping", "predict", "prepare", "readers", "serve", "tables"]


@pytest.mark.usefixtures("ray_session")
def test_predict(script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = write_lines(tmp_path / "texts.json.gz", [json.dumps({"title": f"w{i} w{i + 1}"}).encode() for i in range(9)])
    small = ["encoder.width=32", "encoder.heads=2", "encoder.layers=1", "data.max_length=16", "output.fan_in=8", "output.group_size=16"]
    words = ["--labels", 300, "--tokenizer", make_tokenizer(tmp_path / "tokenizer"), "--texts", texts, "--join", 2, "--count", 20]
    module = script("predict", tmp_path / "made", *small, *words, "--batch", 8, "--pipeline", 30, "--records", tmp_path)
    monkeypatch.setattr(module, "subprocess", SimpleNamespace(run=run_here))
    monkeypatch.setattr("haste_dist.predict_folder.predict_folder", lambda job, *_: iter([10, 20]))  # has tests of its own, and takes long
    module.main()
    (record,) = records(tmp_path, "predict")
    assert record["shape"] == {"L": 300, "N": 8, "D": 32, "F": 8, "G": 16, "K": 5}
    assert record["tokens_a_text"] == 4
    assert record["pipeline_texts"] == 30
    assert min(record["predict_texts_per_s"], record["encoder_texts_per_s"], record["pipeline_texts_per_s"]) > 0
    assert cli.main(["verify", str(tmp_path / "made")]) == 0


def test_grouping(script: Script, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class IndexHNSWFlat:
        """As FAISS's, by brute force; FAISS is not installed for tests."""

        def __init__(self, width: int, links: int, metric: str) -> None:
            self.hnsw = SimpleNamespace()

        def add(self, x_LD: np.ndarray) -> None:
            self.x_LD = x_LD

        def search(self, x_nD: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
            order = np.argsort(-x_nD @ self.x_LD.T, axis=1, kind="stable")[:, :count]
            return order, np.pad(order, ((0, 0), (0, count - order.shape[1])), constant_values=-1)

    made_up = SimpleNamespace(IndexHNSWFlat=IndexHNSWFlat, METRIC_INNER_PRODUCT="", omp_set_num_threads=lambda count: None)
    monkeypatch.setitem(sys.modules, "faiss", made_up)  # type: ignore[arg-type]
    script("grouping", settings_file(config), "--group", 16, "--records", tmp_path).main()
    ours, theirs = records(tmp_path, "grouping")
    assert (ours["provider"], theirs["provider"]) == ("haste_dist", "greedy_faiss_hnsw")
    assert ours["shape"] == theirs["shape"] == {"L": 101, "D": 384, "G": 16}
    assert min(ours["cohesion"], theirs["cohesion"]) > ours["cohesion_random"]


@pytest.mark.usefixtures("ray_session")
def test_prepare(script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, lines in (("trn", json_lines(make_texts(20, 5))), ("tst", json_lines(make_texts(4, 5, "s"))), ("lbl", label_lines(5))):
        write_lines(tmp_path / f"source/{name}.json.gz", lines)
    monkeypatch.chdir(tmp_path)
    module = script("prepare", "source", "--rows", 50, "--turns", 1, "--plot", "memory.png")
    scratch = load_config(None, [f"encoder.tokenizer={make_wordpiece(tmp_path / 'wordpiece')}"]).encoder
    monkeypatch.setattr(module, "load_tokenizer", lambda settings: load_tokenizer(scratch))  # WordNet's comes with the demo's packages
    really, rows = module.watch, []

    def watch(command: list[str]) -> Any:
        assert (
            run_here([*command, "encoder.name=scratch", f"encoder.tokenizer={scratch.tokenizer}", "groups.features=tfidf"]).returncode == 0
        )
        prepared = next(word for word in command if word.startswith("data.prepared=")).partition("=")[2]
        rows.append(read_manifest(prepared).splits["train"].rows)
        return really([sys.executable, "-c", "pass"])

    monkeypatch.setattr(module, "watch", watch)
    module.main()
    (record,) = records(tmp_path / "benchmarks/records", "prepare")
    assert (record["rows"], rows) == (50, [50])
    assert record["cpu_seconds"] >= 0 < record["peak_gib"]
    assert (tmp_path / "memory.png").stat().st_size > 1000


@pytest.fixture(scope="module")
def readers_out(config: Config, ray_session: None) -> Path:
    """What readers.py leaves: a run a reader, and its records."""
    folder = Path(config.run.folder).parent / "records"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["readers.py", str(settings_file(config)), "--seeds", "1", "--records", str(folder)])
        patch.setattr("haste_dist.world.leave_world", lambda: None)  # DeepSpeed could not be used again in this process
        load("readers").main()
    return folder


def test_readers(readers_out: Path, config: Config) -> None:
    mmap, ray = records(readers_out, "readers")
    assert (mmap["provider"], ray["provider"]) == ("mmap", "ray")
    assert mmap["steps"] == ray["steps"] == 12
    assert {path.name for path in Path(config.run.folder).iterdir()} == {"mmap-0", "ray-0"}
    assert 0 <= mmap["data_wait_share"] < 1


class Service:
    """In place of ``haste serve``'s process: the HTTP service in a thread, with made-up answers of the checkpoint that is best."""

    def __init__(self, words: list[str], env: dict[str, str], **_: object) -> None:
        assert words[2:4] == ["haste_launch.cli", "serve"]
        run, settings = Path(words[4]), load_config(None, words[5:]).serve
        saved, seen = run / "checkpoints", set()

        async def ask(texts: list[str], k: int, neighbours: int) -> dict[str, Any]:
            seen.add(name := pointed(saved, "best").name)
            labels = [{"label": i, "text": f"label {i}", "score": 0.5, "group": None, "neighbours": []} for i in range(k)]
            return {"model": name, "predictions": [labels] * len(texts), "batch": len(texts), "step": 1}

        async def ready() -> dict[str, Any]:
            return {"model": "best", "labels": 101, "reloads": len(seen) - 1, "reload_error": ""}

        app = build_service(ServeConfig(), ask, ready, token_digest(env[TOKEN_VARIABLE]))
        self.server = uvicorn.Server(uvicorn.Config(app, port=settings.port, log_level="error"))
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
            time.sleep(0.01)
        self.stdout = io.StringIO(f"serving {run}\n")

    def send_signal(self, number: int) -> None:
        assert number == signal.SIGTERM
        self.server.should_exit = True

    def wait(self, seconds: float) -> int:
        self.thread.join(seconds)
        return int(self.thread.is_alive())


def test_serve(script: Script, readers_out: Path, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = shutil.copytree(Path(config.run.folder) / "mmap-0", tmp_path / "run")
    texts = write_lines(tmp_path / "texts.json", [json.dumps({"text": f"w{i}"}).encode() for i in range(5)])
    words = ["--clients", "1,2", "--seconds", 0.2, "--per-request", 2, "--soak", 1, "--reload-every", 0.1, "--records", tmp_path]
    module = script("serve", run, "--texts", texts, *words)
    monkeypatch.setattr(module, "subprocess", SimpleNamespace(Popen=Service, PIPE=None))
    before = signal.getsignal(signal.SIGTERM)
    try:
        module.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    one, two, soak = records(tmp_path, "serve_soak")
    assert [(record["kind"], record["clients"]) for record in (one, two, soak)] == [("load", 1), ("load", 2), ("soak", 2)]
    assert one["errors"] == two["errors"] == soak["errors"] == 0
    assert (soak["versions"], soak["reloads"], soak["texts_a_request"]) == (2, 1, 2)
    assert min(one["requests"], two["requests"], soak["requests"]) > 0
    assert len(complete(run / "checkpoints")) == 1  # the soak was of a copy, which is gone
    assert not run.with_name("run-soak").exists()


def test_tables_of_the_documents_are_what_the_records_say(script: Script) -> None:
    with pytest.raises(SystemExit) as ended:
        script("tables", FOLDER.parent / "docs" / "accuracy.md", "--check").main()
    assert ended.value.code == 0


def test_tables(script: Script, tmp_path: Path) -> None:
    rows = [("dense", 0, 0.5, "2"), ("grouped", 0, 0.1, "1"), ("grouped", 0, 0.2, "2"), ("grouped", 1, 0.4, "1"), ("grouped", 2, 0.6, "1")]
    names = dict.fromkeys(load("tables").COLUMNS.values(), 0.25)
    shared = {**names, "study": "layers", "split": "dev", "output_bytes": 1_500_000, "shape": {"L": 10_000, "D": 384}}
    lines = [{**shared, "case": case, "seed": seed, "p_at_1": value, "date": date} for case, seed, value, date in rows]
    lines[0]["shape"] = {"L": 10_000, "D": 96}  # narrower, behind a bottleneck
    lines += [{**lines[0], "split": "test", "p_at_1": 1.0}, {"topic": "t", "date": "9"}]
    write_lines(tmp_path / "t.jsonl", [json.dumps(line).encode() for line in lines])
    document = tmp_path / "d.md"
    document.write_text("before\n<!-- table: t layers dev -->\nold\n<!-- end -->\nafter\n")
    with pytest.raises(SystemExit, match="is not what the records say"):
        script("tables", document, "--check", "--records", tmp_path).main()
    script("tables", document, "--records", tmp_path).main()
    told = document.read_text().splitlines()
    assert (told[0], told[-1]) == ("before", "after")
    assert [line.split(" | ")[:3] for line in told[4:6]] == [["| grouped", "3", "40.00 ± 49.68"], ["| dense", "1", "50.00"]]
    assert told[4].endswith("| 25.00 ± 0.00 | 1.5 (31) |")  # of 46.08 MB
    assert told[5].endswith("| 25.00 | 1.5 (31) |")
    document.write_text("<!-- table: t sizes dev -->\n<!-- end -->\n")
    with pytest.raises(SystemExit, match="holds no run of study sizes"):
        script("tables", document, "--records", tmp_path).main()
