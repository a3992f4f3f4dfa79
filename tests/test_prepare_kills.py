"""Prepare killed at any write, and bad input in bulk: the same bytes in the end, every bad line named. Ray's tasks run in turn, here."""

import contextlib
import gzip
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from in_turn import LABELS, contents, run_in_turn, settings
from raw_sources import json_lines, make_texts, make_wordpiece, write_lines, write_source
from tiny import FULL

import haste_dist.prepare
from haste_dist.config import Config
from haste_dist.errors import DataError
from haste_dist.manifest import open_split, read_manifest
from haste_dist.prepare import prepare


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(haste_dist.prepare, "run", run_in_turn)


@pytest.fixture(scope="module")
def wordpiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_wordpiece(tmp_path_factory.mktemp("tokenizer"))


def killed_at(config: Config, change: int) -> bool:
    """Runs prepare in a child that dies by SIGKILL at its ``change``-th rename, removal or sync of a file; whether it got that far."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        left = change

        def counting(real: Any) -> Any:
            def call(*words: Any, **names: Any) -> Any:
                nonlocal left
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*words, **names)

            return call

        os.replace, os.unlink, os.fsync = counting(os.replace), counting(os.unlink), counting(os.fsync)
        try:
            prepare(config)
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def source_with_faults(folder: Path) -> Path:
    """90 texts; some lines are bad, and some uids stand in two shards."""
    write_source(folder, "jsonl", make_texts(90, LABELS), make_texts(20, LABELS, "s"), LABELS)
    lines = json_lines(make_texts(90, LABELS))
    lines[5], lines[40], lines[41], lines[77] = b"{", lines[3], b"\xff", lines[20]
    write_lines(folder / "trn.json", lines)
    write_lines(folder / "filter_labels_train.txt", [b"0 1", b"89 2"])
    return folder


def test_a_kill_at_any_write_leaves_the_same_bytes(tmp_path: Path, wordpiece: Path) -> None:
    source = source_with_faults(tmp_path / "source")
    prepare(settings(source, tmp_path / "clean", wordpiece))
    clean = contents(tmp_path / "clean")
    assert read_manifest(tmp_path / "clean").quarantined == {"duplicate uid": 2, "invalid JSON": 1, "invalid UTF-8": 1}
    config, kills = settings(source, tmp_path / "killed", wordpiece), 0
    for point in random.sample(range(1, 60), 8):  # one after another in the same folder: each goes on from what the last one left
        kills += killed_at(config, point)
    assert kills
    prepare(config)
    assert contents(tmp_path / "killed") == clean


@pytest.mark.skipif(not FULL, reason="minutes: HASTE_FULL=1")
@pytest.mark.timeout(1200)
def test_the_command_killed_at_five_random_moments(tmp_path: Path, wordpiece: Path) -> None:
    """haste prepare with all its Ray workers, killed -9 and started again."""
    write_source(tmp_path / "source", "jsonl.gz", make_texts(150_000, LABELS), make_texts(2000, LABELS, "s"), LABELS)
    (tmp_path / "empty.yaml").write_text("{}")

    def start(out: str) -> subprocess.Popen:
        words = [f"data.source={tmp_path}/source", f"data.prepared={tmp_path}/{out}", "data.rows_per_shard=500", "data.max_length=8"]
        words += [f"encoder.tokenizer={wordpiece}", "groups.method=frequency", "output.group_size=16", "data.label_texts=1"]
        command = [sys.executable, "-m", "haste_launch.cli", "prepare", f"{tmp_path}/empty.yaml", *words]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    began = time.monotonic()
    assert start("clean").wait() == 0
    whole, shards = time.monotonic() - began, []
    for _ in range(5):
        process = start("killed")
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(random.uniform(0.3, 0.9) * whole)
        process.kill()
        process.wait()
        time.sleep(3)  # its workers notice and end
        shards.append(len(list((tmp_path / "killed").rglob("*.arrow"))))
    print(f"shards after each kill: {shards}, of {len(list((tmp_path / 'clean').rglob('*.arrow')))}")
    assert start("killed").wait() == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "clean")


def test_a_kill_leaves_shards_that_are_not_written_again(tmp_path: Path, wordpiece: Path) -> None:
    source = source_with_faults(tmp_path / "source")
    config = settings(source, tmp_path / "out", wordpiece)
    assert killed_at(config, 26)
    before = {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in (tmp_path / "out").rglob("*.arrow")}
    assert len(before) >= 3
    assert killed_at(config, 32)
    assert {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in before} == before


def test_a_rerun_that_quarantines_keeps_what_the_one_that_stopped_made(tmp_path: Path, wordpiece: Path) -> None:
    source = source_with_faults(tmp_path / "source")
    with pytest.raises(DataError, match=r"trn.json:6: not valid JSON .*; fix the line or set data.on_error=quarantine"):
        prepare(settings(source, tmp_path / "out", wordpiece, "data.on_error=stop"))
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.arrow")}
    assert kept
    prepare(settings(source, tmp_path / "out", wordpiece))
    prepare(settings(source, tmp_path / "clean", wordpiece))
    assert contents(tmp_path / "out") == contents(tmp_path / "clean")
    untouched = [path for path, written in kept.items() if path.stat().st_mtime_ns == written]
    assert len(untouched) >= len(kept) - 2  # two lose a repeated uid


def test_a_lost_block_is_no_silent_loss(tmp_path: Path, wordpiece: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_with_faults(tmp_path / "source")
    lossy = lambda *words: (record for record in run_in_turn(*words) if record["number"] != 3)  # noqa: E731
    monkeypatch.setattr(haste_dist.prepare, "run", lossy)
    with pytest.raises(DataError, match=r"train: of 6 blocks of rows 1 never came; run haste prepare again"):
        prepare(settings(source, tmp_path / "out", wordpiece))
    assert not (tmp_path / "out/manifest.json").exists()


BAD = {
    "invalid UTF-8": b'{"uid": "%d", "title": "caf\xe9", "target_ind": [1]}',
    "label out of range": b'{"uid": "%d", "title": "red", "target_ind": [40]}',
    "label not an integer": b'{"uid": "%d", "title": "red", "target_ind": ["1"]}',
    "empty text": b'{"uid": "%d", "title": " ", "target_ind": [1]}',
    "invalid JSON": b'{"uid": "%d", "title": "red", "target_ind": [1]',
    "missing field": b'{"uid": "%d", "title": "red"}',
    "wrong type": b'{"uid": "%d", "title": 7, "target_ind": [1]}',
    "duplicate uid": b"",
}


def test_every_bad_line_among_many_is_named(tmp_path: Path, wordpiece: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, of_each = (1_000_000, 125) if FULL else (20_000, 100)
    write_source(tmp_path / "source", "jsonl.gz", make_texts(50, LABELS), make_texts(20, LABELS, "s"), LABELS)
    lines = json_lines(make_texts(rows, LABELS))
    chosen = random.Random(3).sample(range(1000, rows), of_each * len(BAD))
    expected = {}
    for i, line in enumerate(chosen):
        reason = list(BAD)[i % len(BAD)]
        lines[line] = BAD[reason].replace(b"%d", b"b%d" % i) or lines[line % 1000]
        expected[line + 1] = reason
    data = b"".join(line + b"\n" for line in lines)
    (tmp_path / "source/trn.json.gz").write_bytes(gzip.compress(data, 1))
    manifest = prepare(settings(tmp_path / "source", tmp_path / "out", wordpiece, "data.rows_per_shard=1000"))
    named = [json.loads(line) for line in (tmp_path / "out/quarantine.jsonl").read_text().splitlines()]
    assert {page["line"]: page["reason"] for page in named} == expected
    assert [page["line"] for page in named] == sorted(expected)
    assert {page["file"] for page in named} == {"trn.json.gz"}
    assert manifest.quarantined == dict.fromkeys(sorted(BAD), of_each)
    uids = open_split(tmp_path / "out", manifest, "train")["uid"].to_pylist()
    assert uids == [f"t{i}" for i in range(rows) if i + 1 not in expected]
    shown = capsys.readouterr().out
    assert all(f"{reason:<20} │" in shown or reason in shown for reason in BAD)
    assert "quarantine.jsonl" in shown

    packed = gzip.compress(data, 1)
    (tmp_path / "source/trn.json.gz").write_bytes(packed[: -len(packed) // 10])  # a download that broke off
    manifest = prepare(settings(tmp_path / "source", tmp_path / "cut", wordpiece, "data.rows_per_shard=1000"))
    cut = [json.loads(line) for line in (tmp_path / "cut/quarantine.jsonl").read_text().splitlines()]
    assert manifest.quarantined["truncated file"] == 1
    end = cut.pop()
    assert (end["file"], end["reason"]) == ("trn.json.gz", "truncated file")
    assert f"after line {end['line'] - 1}" in end["detail"]
    assert cut == [page for page in named if page["line"] < end["line"]]
    assert manifest.splits["train"].rows + len(cut) == end["line"] - 1
    assert end["line"] > 0.8 * rows
