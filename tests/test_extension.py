"""New labels for a trained run: old rows and scores as they were, new rows the mean of their neighbours', training that goes on."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from in_turn import run_in_turn
from raw_sources import write_lines
from tiny import final_tensors, make_prepared, read_losses, run_ranks, train_all

import haste_dist.prepare
from haste_dist.config import Config, load_config
from haste_dist.errors import ConfigError, DataError
from haste_dist.extension import add_labels, check_words, extended, nearest
from haste_dist.label_groups import LabelOrder, load_label_order
from haste_dist.manifest import open_split, read_manifest
from haste_dist.predictor import Predictor
from haste_dist.train import train
from haste_dist.verify import verify
from haste_dist.world import join_world
from haste_launch import cli

OLD, NEW = 101, 30
PAIRS = 60  # texts of new labels


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(haste_dist.prepare, "run", run_in_turn)


def word(label: int) -> str:
    return f"w{(7 * label if label < OLD else 11 * label + 3) % 200}"


def new_text(i: int) -> tuple[str, int]:
    label = OLD + i % NEW
    return f"{word(label)} w{(11 * label + 50) % 200} w{i % 7}", label


def grow(config: Config, folder: Path, titles: list[str] | None = None) -> Path:
    """The texts of a prepared folder as a source, with NEW labels and texts of theirs behind."""
    manifest = read_manifest(config.data.prepared)
    for split, name in (("train", "trn.json"), ("test", "tst.json")):
        rows = open_split(config.data.prepared, manifest, split).to_pylist()
        pages = [{"uid": row["uid"], "title": " ".join(f"w{i - 2}" for i in row["input_ids"]), "target_ind": row["labels"]} for row in rows]
        more = [{"uid": f"new{i}", "title": new_text(i)[0], "target_ind": [new_text(i)[1]]} for i in range(PAIRS)]
        write_lines(folder / name, [json.dumps(page).encode() for page in pages + (more if split == "train" else [])])
    titles = titles or [word(label) for label in range(OLD + NEW)]
    write_lines(folder / "lbl.json", [json.dumps({"uid": f"l{i}", "title": title}).encode() for i, title in enumerate(titles)])
    return folder


def grown_config(config: Config, folder: Path, *overrides: str) -> Config:
    words = [f"data.source={folder}/source", f"data.prepared={folder}/prepared", f"run.folder={folder}/run"]
    return load_config(Path(config.run.folder) / "config.yaml", [*words, *overrides])


def scores(run: str, texts: list[str], labels: int) -> np.ndarray:
    """Logits (n, labels) of the labels 0, 1, ..."""
    predictor = Predictor(run)
    found, logits = predictor.topk(texts, k=predictor.order.labels)
    by_label = np.empty_like(logits)
    np.put_along_axis(by_label, found, logits, 1)
    return by_label[:, :labels]


def test_a_run_of_two_ranks_gets_new_labels_and_goes_on(tmp_path: Path) -> None:
    config = make_prepared(tmp_path / "old", labels=OLD, overrides=["train.max_steps=5", "train.epochs=1"])
    run_ranks(2, train_all, [config])
    grown = grown_config(config, tmp_path / "new", "train.max_steps=0", "train.epochs=5")
    grow(config, tmp_path / "new/source")
    before, order = final_tensors(config.run.folder), load_label_order(config.run.folder)
    assert add_labels(grown, Path(config.run.folder), "last", neighbours=3) == NEW
    after, new = final_tensors(grown.run.folder), load_label_order(grown.run.folder)
    verify(grown.run.folder)
    verify(grown.data.prepared)

    head, tail = order.head_rows, order.labels - order.head_rows
    assert (order.rows - order.labels, new.groups - order.groups) == (11, 2)
    assert np.array_equal(new.label_of_row[:OLD], order.label_of_row[:OLD])
    assert sorted(new.label_of_row[OLD : OLD + NEW]) == list(range(OLD, OLD + NEW))
    for name, tensor in before.items():
        rows = tail if name.startswith("tail") and "index" not in name else None
        if name == "tail.index":
            assert torch.equal(after[name][: order.groups], tensor)
        elif rows is not None:
            assert torch.equal(after[name].flatten(0, 1)[:tail], tensor.flatten(0, 1)[:tail]), name
        else:
            assert torch.equal(after[name], tensor), name
    assert (after["tail.index"].diff(dim=1) > 0).all()
    assert not after["tail.momentum"].flatten(0, 1)[tail:].any()
    unchanged = sorted((Path(config.run.folder) / "checkpoints").glob("step-*/output-00000-of-00002.safetensors"))[-1]
    assert (Path(grown.run.folder) / "checkpoints/step-00000000" / unchanged.name).read_bytes() == unchanged.read_bytes()
    assert head == 16

    texts = [word(i) + f" w{i % 11}" for i in range(60)]
    assert np.array_equal(scores(config.run.folder, texts, OLD), scores(grown.run.folder, texts, OLD))

    own = [new_text(i) for i in range(NEW)]
    untrained = scores(grown.run.folder, [text for text, _ in own], OLD + NEW)
    train(grown, join_world("cpu"))
    losses = read_losses(grown.run.folder)
    assert losses[-1] < losses[0]
    trained = scores(grown.run.folder, [text for text, _ in own], OLD + NEW)

    def found(logits: np.ndarray) -> float:
        return float(np.mean([(row > row[label]).sum() < 5 for row, (_, label) in zip(logits, own, strict=True)]))

    assert found(trained) > 0.5 > found(untrained)


def test_a_new_row_is_the_mean_of_its_neighbours(tmp_path: Path) -> None:
    config = make_prepared(tmp_path / "old", labels=OLD, overrides=["train.max_steps=12", "train.epochs=2"])
    train(config, join_world("cpu"))
    titles = [word(label) for label in range(OLD)] + [word(OLD - 1 - 3 * i) for i in range(NEW)]
    grow(config, tmp_path / "new/source", titles)
    grown = grown_config(config, tmp_path / "new")
    seen: list[np.ndarray] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "haste_dist.extension.extend_run",
            lambda config, run, name, found, prepared, real=haste_dist.extension.extend_run: (
                seen.append(found),
                real(config, run, name, found, prepared),
            ),
        )
        add_labels(grown, Path(config.run.folder), "best", neighbours=2)
    after, order, new = final_tensors(grown.run.folder), load_label_order(config.run.folder), load_label_order(grown.run.folder)
    width, head = 32, order.head_rows

    def dense(row: int) -> torch.Tensor:
        group, slot = divmod(row - head, order.group_size)
        return torch.zeros(width).index_put((after["tail.index"][group].long(),), after["tail.weight"][group, slot])

    for i, row in enumerate(range(OLD, OLD + NEW)):
        mean = torch.stack([dense(int(r)) for r in seen[0][i]]).mean(0)
        group, slot = divmod(row - head, order.group_size)
        index = after["tail.index"][group].long()
        torch.testing.assert_close(after["tail.weight"][group, slot], mean[index])
        old_rows = torch.tensor([int(r) - head for r in seen[0][i]])
        torch.testing.assert_close(after["tail.bias"][group, slot], after["tail.bias"].flatten()[old_rows].mean())
    for group in range(order.groups, new.groups):  # its features are those that weigh most
        rows = [r for r in range(OLD, OLD + NEW) if (r - head) // order.group_size == group]
        total = torch.stack([torch.stack([dense(int(r)) for r in seen[0][row - OLD]]).mean(0) for row in rows]).abs().sum(0)
        chosen = torch.zeros(width, dtype=torch.bool).index_fill(0, after["tail.index"][group].long(), True)
        assert total[chosen].min() >= total[~chosen].max()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.integers(1, 40), st.integers(1, 8), st.integers(0, 99))
def test_the_nearest_are_found_in_pieces(new: int, old: int, count: int, seed: int) -> None:
    x = torch.nn.functional.normalize(torch.randn(new + old, 8, generator=torch.Generator().manual_seed(seed)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("haste_dist.extension.SIMILAR_BYTES", 200)
        found = nearest(x, torch.arange(old, new + old), torch.arange(old), count, torch.device("cpu"))
    assert found.shape == (new, min(count, old))
    rounded = x.mul(2**11).round().div(2**11)
    similar = rounded[old:] @ rounded[:old].T
    assert torch.allclose(similar.gather(1, found), similar.topk(min(count, old), dim=1).values, atol=1e-6)


@given(st.integers(0, 50), st.integers(1, 40), st.integers(1, 60), st.sampled_from([1, 16, 32]))
def test_an_order_is_extended_behind_its_labels(head: int, tail: int, new: int, group_size: int) -> None:
    rng = np.random.default_rng(head * 100 + tail)
    labels, groups = head + tail, -(-tail // group_size)
    of_row = np.concatenate([rng.permutation(labels), np.full(groups * group_size - tail, -1)])
    old = LabelOrder(of_row, np.argsort(of_row[:labels]), head, groups, group_size, np.zeros(len(of_row), np.int64))
    added = labels + rng.permutation(new)
    made = extended(old, added, np.arange(labels + new))
    assert np.array_equal(made.label_of_row[: labels + new], np.concatenate([of_row[:labels], added]))
    assert (made.label_of_row[labels + new :] == -1).all()
    assert made.rows - made.labels < group_size
    assert np.array_equal(made.label_of_row[made.row_of_label], np.arange(labels + new))
    assert (made.head_rows, made.base) == (head, labels)
    assert extended(made, np.array([labels + new]), np.arange(labels + new + 1)).base == labels


def test_what_cannot_be_added_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_prepared(tmp_path / "old", labels=OLD, overrides=["train.max_steps=2"])
    train(config, join_world("cpu"))
    run = Path(config.run.folder)
    for titles, error, said in (
        ([word(label) for label in range(OLD)], DataError, "label 10. is out of range"),
        (["other", *(word(label) for label in range(1, OLD + NEW))], DataError, "its label 0 is 'other', that of .* is 'w0'"),
    ):
        grow(config, tmp_path / "new/source", titles)
        with pytest.raises(error, match=said):
            add_labels(grown_config(config, tmp_path / "new"), run, "best", 4)
    headed = make_prepared(tmp_path / "headed", labels=OLD, overrides=["train.max_steps=2", "output.head_fraction=1"])
    train(headed, join_world("cpu"))
    with pytest.raises(ConfigError, match=r"has no tail \(all its labels are in the dense head\)"):
        add_labels(grown_config(headed, tmp_path / "never"), Path(headed.run.folder), "best", 4)  # before anything is prepared
    assert not (tmp_path / "never").exists()
    manifest_only = grow(config, tmp_path / "same/source", [word(label) for label in range(OLD)])
    rows = [line for line in (manifest_only / "trn.json").read_bytes().splitlines() if b'"new' not in line]
    write_lines(manifest_only / "trn.json", rows)
    with pytest.raises(ConfigError, match=r"has 101 labels, the run .* has 101 already; put the new ones behind the old"):
        add_labels(grown_config(config, tmp_path / "same"), run, "best", 4)
    with pytest.raises(ConfigError, match=r"run folder .*: is that of the trained run"):
        check_words(grown_config(config, tmp_path / "new", f"run.folder={run}"), run)
    with pytest.raises(ConfigError, match=r"data.prepared .*: is that of the trained run"):
        check_words(grown_config(config, tmp_path / "new", f"data.prepared={config.data.prepared}"), run)
    with pytest.raises(ConfigError, match=r"data.dev_fraction=0.1: it would hold out texts that .* has trained on"):
        check_words(grown_config(config, tmp_path / "new", "data.dev_fraction=0.1"), run)
    with pytest.raises(ConfigError, match=r"output.group_size=64: new labels join the layer of .*, which has 16; set it to that"):
        check_words(grown_config(config, tmp_path / "new", "output.group_size=64"), run)
    assert cli.main(["labels", "add", str(tmp_path / "nowhere"), str(tmp_path / "x")]) == 2
    assert "no run folder" in capsys.readouterr().err
