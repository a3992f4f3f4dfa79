"""A trained model as a Python function: the documented examples, parts of its labels, memory, mistakes; calibration of its scores."""

import dataclasses
import doctest
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny import FULL, haste, make_prepared

import haste_dist
from haste_dist import calibration, classifier
from haste_dist.calibration import Calibration, calibrate, read_calibration
from haste_dist.config import Config
from haste_dist.errors import CheckpointError, DataError
from haste_dist.export import export
from haste_dist.predict import SCORED_SCHEMA, scored_file
from haste_dist.predictor import BATCH, ModelFiles
from haste_dist.scoring import evaluate_run
from haste_dist.train import train
from haste_dist.verify import verify
from haste_dist.world import join_world
from haste_kernels.topk import merge_topk

TEXTS = ["w0 w1 w14", "w7 w8 w9 w21", "w3", "w190 w2 w5 w6 w7"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = make_prepared(tmp_path_factory.mktemp("run"), labels=101, texts=256, overrides=["train.max_steps=48"])
    train(config, join_world("cpu"))
    return config


def test_the_documented_examples_run(trained: Config) -> None:
    for module in (haste_dist, calibration):
        result = doctest.testmod(module, extraglobs={"run": trained.run.folder}, optionflags=doctest.NORMALIZE_WHITESPACE)
        assert result.attempted > 3
        assert result.failed == 0


def test_labels_that_are_loaded_are_not_drawn_before(trained: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """For millions of labels that took most of the time to load them."""
    expected = haste_dist.load(trained.run.folder, device="cpu").topk(TEXTS)
    scores = evaluate_run(trained, join_world("cpu"), "last")

    def drawn(*_: object) -> None:
        raise AssertionError("features are drawn")

    monkeypatch.setattr(classifier, "random_features", drawn)
    for found, wanted in zip(haste_dist.load(trained.run.folder, device="cpu").topk(TEXTS), expected, strict=True):
        np.testing.assert_array_equal(found, wanted)
    again = evaluate_run(trained, join_world("cpu"), "last")
    assert {**again, "seconds": 0} == {**scores, "seconds": 0}
    assert train(trained, join_world("cpu")).step == 48  # it is finished: nothing is left to do but to load it


def test_predictions_do_not_depend_on_their_company(trained: Config) -> None:
    """More texts than a batch, of all lengths, in any order; one text alone."""
    model = haste_dist.load(trained.run.folder, device="cpu")
    rng = np.random.default_rng(0)
    texts = [" ".join(f"w{i}" for i in rng.integers(0, 200, rng.integers(1, 12))) for _ in range(BATCH + 7)]
    together = model.predict(texts, k=3)
    order = rng.permutation(len(texts))
    shuffled = model.predict([texts[i] for i in order], k=3)
    for i, at in enumerate(order[:20]):
        assert [one.label for one in shuffled[i]] == [one.label for one in together[at]]
        np.testing.assert_allclose([one.score for one in shuffled[i]], [one.score for one in together[at]], rtol=1e-5)
        assert [one.label for one in model.predict([texts[at]], k=3)[0]] == [one.label for one in together[at]]
    assert len(model.predict(["w1"], k=1000)[0]) == 101, "no more labels than there are"
    with pytest.raises(TypeError, match="list"):
        model.predict("w1 w2")
    with pytest.raises(TypeError, match="takes a list of texts; number 1 is 3, a int"):
        model.predict(["w1", 3])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="one label"):
        model.predict(["w1"], k=0)


@pytest.mark.parametrize("parts", [2, 3, 7])
@pytest.mark.parametrize("exported", [False, True])
def test_parts_of_the_labels_find_what_the_whole_finds(trained: Config, tmp_path: Path, parts: int, exported: bool) -> None:
    folder = export(trained.run.folder, tmp_path / "out") if exported else Path(trained.run.folder)
    model, files = haste_dist.load(folder, device="cpu"), ModelFiles(folder)
    x_ND = model.embedder.embed(model.embedder.tokens(TEXTS))
    found = [files.labels("cpu", part, parts).topk(x_ND, 20) for part in range(parts)]
    scores, rows = merge_topk(torch.cat([s for s, _ in found], 1), torch.cat([r for _, r in found], 1), 20)
    labels, expected = model.topk(TEXTS, 20)
    assert np.array_equal(files.order.label_at(rows.numpy()), labels)
    assert np.array_equal(scores.numpy(), expected)


def test_only_training_pays_for_momentum(trained: Config) -> None:
    """Prediction holds the weights alone, and leaves no process group behind."""
    classifier = ModelFiles(trained.run.folder).labels("cpu")
    assert trained.output.momentum > 0
    assert not [name for name in classifier.tensors() if "momentum" in name]


def test_neighbours_are_the_others_of_the_group(trained: Config) -> None:
    order = ModelFiles(trained.run.folder).order
    for label in range(order.labels):
        near, row = order.neighbours(label), order.row_of_label[label]
        if row < order.head_rows:
            assert len(near) == 0
        else:
            group = (row - order.head_rows) // order.group_size
            assert label not in near
            assert len(near) <= order.group_size - 1
            assert set((order.row_of_label[near] - order.head_rows) // order.group_size) <= {group}
    together = sum(len(order.neighbours(label)) for label in range(order.labels))
    tail = order.labels - order.head_rows
    assert together == sum(n * (n - 1) for n in [order.group_size] * (tail // order.group_size) + [tail % order.group_size])


def test_what_is_no_model_is_told(tmp_path: Path, trained: Config) -> None:
    with pytest.raises(CheckpointError, match="no run folder"):
        haste_dist.load(tmp_path)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        haste_dist.load(trained.run.folder, checkpoint="step-99999999")


def scored(path: Path, scale: float, offset: float, texts: int = 400) -> Path:
    """Predictions whose labels are right as often as sigmoid(scale * logit + offset) says."""
    rng = np.random.default_rng(0)
    logits = np.sort(rng.normal(0.0, 2.0, (texts, 12)).astype(np.float32))[:, ::-1]
    right = rng.random(logits.shape) < Calibration(scale, offset)(logits)
    columns = [np.arange(texts).tolist(), [list(range(12))] * texts, logits.tolist(), [np.flatnonzero(row).tolist() for row in right]]
    table = pa.table([pa.array(column, field.type) for column, field in zip(columns, SCORED_SCHEMA, strict=True)], schema=SCORED_SCHEMA)
    pq.write_table(table, path)
    return path


def test_calibration_finds_the_scale_and_mends_the_error(tmp_path: Path) -> None:
    page = calibrate(tmp_path, "step-00000001", "test", scored(tmp_path / "scored.parquet", 0.4, -1.5))
    assert page["scale"] == pytest.approx(0.4, abs=0.06)
    assert page["offset"] == pytest.approx(-1.5, abs=0.15)
    assert page["pairs"] == 4000, "the first ten of each text"
    assert page["ece_after"] < 0.25 * page["ece_before"]
    assert page["log_loss_after"] < page["log_loss_before"]
    assert read_calibration(tmp_path, "step-00000001") == Calibration(page["scale"], page["offset"])
    assert read_calibration(tmp_path, "step-00000002") == Calibration(), "of another checkpoint"
    data = bytearray((tmp_path / calibration.FILE).read_bytes())
    data[data.index(b"scale") + 9] ^= 1
    (tmp_path / calibration.FILE).write_bytes(data)
    with pytest.raises(DataError, match="damaged"):
        read_calibration(tmp_path, "step-00000001")


def test_too_few_to_calibrate(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="too few to calibrate"):
        calibrate(tmp_path, "step-00000001", "test", scored(tmp_path / "scored.parquet", 1.0, 0.0, texts=10))


def test_separable_pairs_have_a_fit() -> None:
    """Where a threshold parts right from wrong, the likelihood alone has no maximum."""
    logits = np.linspace(-3, 3, 200)
    fitted = calibration.fit(logits, logits > 0)
    assert np.isfinite([fitted.scale, fitted.offset]).all()
    assert fitted.scale > 1


@pytest.mark.slow
def test_calibration_is_fitted_used_and_exported(trained: Config, tmp_path: Path) -> None:
    """By the command in the long form, else by what it calls."""
    if FULL:
        done = haste("evaluate", trained.run.folder, "--checkpoint", "last", "--calibrate", "evaluate.split=train")
        assert done.returncode == 0, done.stderr
        assert "calibration error on texts not fitted" in done.stdout
        assert not (Path(trained.run.folder) / ".scored.parquet").exists()
    else:
        config = dataclasses.replace(trained, evaluate=dataclasses.replace(trained.evaluate, split="train"))
        with scored_file(tmp_path / "scored.parquet") as keep:
            evaluate_run(config, join_world("cpu"), "last", keep)
        calibrate(trained.run.folder, ModelFiles(trained.run.folder, "last").version, "train", tmp_path / "scored.parquet")
    model = haste_dist.load(trained.run.folder, "last", device="cpu")
    assert model.files.calibration != Calibration()
    labels, logits = model.topk(TEXTS, 3)
    expected = model.files.calibration(logits)
    for ranked, ids, scores in zip(model.predict(TEXTS, 3), labels, expected, strict=True):
        assert [one.label for one in ranked] == ids.tolist()
        assert [one.score for one in ranked] == pytest.approx(scores.tolist())
    out = export(trained.run.folder, tmp_path / "out", "last")
    assert haste_dist.load(out, device="cpu").files.calibration == model.files.calibration
    verify(out)
    verify(trained.run.folder)
