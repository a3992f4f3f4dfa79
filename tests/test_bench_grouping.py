"""haste bench grouping: what it makes up, checks, prints and records."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from haste_launch import bench_grouping, cli


def test_made_up_vectors_are_clustered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_grouping, "CHUNK", 300)
    x = bench_grouping.made_up(2000, 64, torch.device("cpu"))
    torch.testing.assert_close(x.norm(dim=1), torch.ones(2000))
    near = (x @ x.T).fill_diagonal_(0).topk(5, dim=1).values.mean()
    assert near > 0.4
    assert torch.equal(x, bench_grouping.made_up(2000, 64, torch.device("cpu")))


def test_it_prints_and_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "grouping", "--labels", "1000", "--width", "32", "--group", "16", "--records", str(tmp_path)]
    assert cli.main(words) == 0
    record = json.loads((tmp_path / "grouping.jsonl").read_text())
    assert record["shape"] == {"L": 1000, "D": 32, "G": 16}
    assert record["cohesion"] > record["cohesion_random"] + 0.05
    assert record["seconds"] > 0 < record["peak_gib"]
    assert "1,000 labels, width 32, groups of 16" in capsys.readouterr().out


def test_a_wrong_grouping_shows_no_figure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench_grouping, "pack", lambda x, rows, *_, **__: rows * 0)
    assert cli.main(["bench", "grouping", "--labels", "100", "--width", "8"]) == 1
    assert "cohesion" not in capsys.readouterr().out


def test_files_of_vectors_are_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "x.npy"

    def refused(words: str) -> None:
        assert cli.main(["bench", "grouping", "--vectors", str(file)]) == 2
        assert words in capsys.readouterr().err

    refused("not a readable .npy file")
    np.save(file, np.ones((3, 4), np.float32), allow_pickle=False)
    refused("its rows must have length 1, one has 2")
    np.save(file, np.ones(3, np.float32), allow_pickle=False)
    refused("holds float32 of shape (3,)")
