"""output.basis=labels: the tail reads the embedding turned to the principal directions of the label embeddings."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_centroids import LABELS, WIDTH, with_vectors
from test_extension import grow, grown_config, scores, without_ray
from tiny import check_resumed_and_shared, final_tensors, read_losses, train_all

from haste_dist import basis, label_embeddings
from haste_dist.basis import BASIS_FILE, principal_basis, principal_directions, read_basis, write_basis
from haste_dist.centroids import start_from_centroids
from haste_dist.config import Config, load_config
from haste_dist.embedder import check_embedder
from haste_dist.errors import ConfigError, DataError, HasteError
from haste_dist.export import export
from haste_dist.extension import add_labels
from haste_dist.label_embeddings import LabelEmbeddings
from haste_dist.label_groups import label_order_is_current, load_label_order, make_label_order
from haste_dist.model import make_classifier, open_prepared
from haste_dist.predictor import Predictor
from haste_dist.preflight import check_run
from haste_dist.sealed import seal_data
from haste_dist.sharding import all_rows
from haste_dist.train import train
from haste_dist.trials import with_label_order
from haste_dist.verify import verify
from haste_dist.world import join_world

TEXTS = ["w0 w1 w14", "w7 w8 w9 w21", "w3"]


def with_basis(folder: Path, *more: str) -> Config:
    """A problem whose prepared folder holds embeddings of its labels and their basis."""
    config, vectors = with_vectors(folder, *more)
    config.output.basis = "labels"
    make_order(config, vectors)
    return config


def make_order(config: Config, vectors: np.ndarray) -> None:
    prepared = Path(config.data.prepared)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(label_embeddings, "embed_labels", lambda *_: LabelEmbeddings(vectors, 0, 0, 0))
        make_label_order(config, prepared, open_prepared(config).manifest)
    seal_data(prepared)


@given(st.integers(1, 300), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_directions_are_orthogonal_and_their_features_vary_less_and_less(rows: int, width: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    vectors = (random.standard_normal((rows, width)) * random.uniform(0.1, 3, width) + random.standard_normal(width)).astype(np.float16)
    found = principal_directions(vectors)
    np.testing.assert_allclose(found.T @ found, np.eye(width), atol=1e-10)
    turned = vectors.astype(np.float64) @ found
    turned -= turned.mean(0)
    scatter = turned.T @ turned / rows
    variance = np.diag(scatter)
    assert (np.diff(variance) <= 1e-4 * variance.max()).all()
    np.testing.assert_allclose(scatter, np.diag(variance), atol=1e-4 * max(1, variance.max()))
    assert (np.take_along_axis(found, np.abs(found).argmax(0)[None], 0) > 0).all()
    half = principal_basis(vectors)
    assert half.dtype == torch.float16
    assert np.array_equal(half.numpy(), found.astype(np.float16))


def test_many_labels_are_looked_at_in_pieces_and_at_even_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = np.random.default_rng(0).standard_normal((1000, 7)).astype(np.float16)
    whole = principal_basis(vectors)
    monkeypatch.setattr(basis, "CHUNK", 64)
    torch.testing.assert_close(principal_basis(vectors), whole)
    monkeypatch.setattr(basis, "LABELS", 300)
    torch.testing.assert_close(principal_basis(vectors), principal_basis(vectors[::4]))


def test_files_of_earlier_programs_are_read(tmp_path: Path) -> None:
    config = with_basis(tmp_path)
    prepared = Path(config.data.prepared)
    order = load_label_order(prepared)
    assert order.basis is not None
    write_basis(prepared, order.basis[None])
    found = load_label_order(prepared)
    assert found.basis is not None
    assert torch.equal(found.basis, order.basis)
    assert found.fingerprint == order.fingerprint
    write_basis(prepared, order.basis.float())  # as earlier programs wrote it
    single = load_label_order(prepared)
    assert single.basis is not None
    assert single.basis.dtype == torch.float32
    assert single.fingerprint == order.fingerprint
    manifest = open_prepared(config).manifest
    assert label_order_is_current(config, prepared, manifest)
    for shape in ((3, WIDTH, 10), (1, WIDTH, 10)):
        write_basis(prepared, torch.zeros(shape))
        with pytest.raises(DataError, match=rf"{BASIS_FILE}: damaged .*run haste prepare again"):
            check_run(config)
        assert not label_order_is_current(config, prepared, manifest)


def test_a_tail_in_a_basis_is_a_dense_layer_turned(tmp_path: Path) -> None:
    """Scores, gradient and weights after a step, beside those of the definition in float64; dropout comes before the basis."""
    config = with_basis(tmp_path, "output.head_fraction=0", "output.tail_dropout=0.5", "output.momentum=0", "output.weight_decay=0")
    prepared = open_prepared(config)
    turn = prepared.order.basis
    assert turn is not None
    layer = make_classifier(config, prepared.order, WIDTH, join_world("cpu"))
    start_from_centroids(layer, prepared)
    x_ND, rows_NM = torch.randn(6, WIDTH), torch.tensor([[3, 50], [0, -1], [7, 8], [99, 3], [20, -1], [64, 65]])

    def spread() -> torch.Tensor:
        index = layer.tail.index.long().repeat_interleave(16, 0)
        return torch.zeros(len(index), WIDTH, dtype=torch.float64).scatter_(1, index, layer.tail.weight.double().flatten(0, 1))

    bias = layer.tail.bias
    assert bias is not None
    values, _ = layer.topk(x_ND, 5)
    logits = x_ND.double() @ (spread() @ turn.double().T).T + bias.double().flatten()
    torch.testing.assert_close(values.double(), logits[:, :LABELS].topk(5).values, rtol=1e-5, atol=1e-5)
    before, weight = spread(), (spread() @ turn.double().T).requires_grad_()
    _, mask = layer._masked(x_ND, layer.tail_slice, 0.5, 4, 12, all_rows(6))
    assert mask is not None
    x = x_ND.double().requires_grad_()
    z = (x * mask) @ weight.T + bias.double().flatten()
    target = torch.zeros_like(z)
    for text, labels in enumerate(rows_NM.tolist()):
        target[text, [label for label in labels if label >= 0]] = 1
    real = torch.zeros_like(z)
    real[:, :LABELS] = 1
    loss = (torch.nn.functional.binary_cross_entropy_with_logits(z, target, reduction="none") * real).sum() / 6
    loss.backward()
    dx, got = layer.step(x_ND, rows_NM, lr=0.1, step=4, want_loss=True)
    assert x.grad is not None
    torch.testing.assert_close(dx.double(), x.grad, rtol=1e-4, atol=1e-6)
    assert got is not None
    torch.testing.assert_close(got.double(), loss.detach(), rtol=1e-4, atol=1e-6)
    assert weight.grad is not None
    turned = before - 0.1 * weight.grad @ turn.double()
    index = layer.tail.index.long().repeat_interleave(16, 0)
    torch.testing.assert_close(layer.tail.weight.double().flatten(0, 1), turned.gather(1, index), rtol=1e-4, atol=1e-6)
    layer.keep(x_ND, rows_NM, 4)
    torch.testing.assert_close(layer.kept[0][0].double(), (x_ND * mask).double() @ turn.double(), rtol=1e-5, atol=1e-5)


def test_cases_of_a_study_have_the_basis_of_what_they_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, vectors = with_vectors(tmp_path / "data")
    config.output.basis = "labels"
    make_order(config, vectors)
    monkeypatch.setattr(label_embeddings, "embed_labels", lambda *_: LabelEmbeddings(vectors, 0, 0, 0))
    cases = []
    for features in ([], [4, 28], [8, 32]):
        output = dataclasses.replace(config.output, tail_features=features)
        cases.append(with_label_order(dataclasses.replace(config, output=output), tmp_path, 0))
    for case in cases:
        check_run(case)
    assert cases[0].data.prepared == config.data.prepared
    assert len({case.data.prepared for case in cases}) == 3


@pytest.mark.parametrize("dev_fraction", [0.0, 0.1])
def test_cases_of_a_study_have_embeddings_of_their_own_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dev_fraction: float
) -> None:
    config, vectors = with_vectors(tmp_path / "data")
    config.output.basis = "labels"
    make_order(config, vectors)

    def embedded(asked: Config, *_: object) -> LabelEmbeddings:
        return LabelEmbeddings(vectors if asked.encoder.pooling == "mean" else -vectors, 0, 0, 0)

    monkeypatch.setattr(label_embeddings, "embed_labels", embedded)
    config.data.dev_fraction = dev_fraction
    cases = {}
    for pooling in ("mean", "cls", "mean"):
        encoder = dataclasses.replace(config.encoder, pooling=pooling)
        cases[pooling] = with_label_order(dataclasses.replace(config, encoder=encoder), tmp_path, 0, {})
    for pooling, sign in (("mean", 1), ("cls", -1)):
        prepared = Path(cases[pooling].data.prepared)
        assert np.array_equal(np.load(prepared / "label_vectors.npy", allow_pickle=False), sign * vectors)
        assert json.loads((prepared / "groups.json").read_text())["encoder"]["pooling"] == pooling


def test_a_run_starts_from_embeddings_of_its_own_encoder(tmp_path: Path) -> None:
    config = with_basis(tmp_path)
    check_run(config)
    page = Path(config.data.prepared) / "groups.json"
    text = page.read_text()
    page.write_text(text.replace('"name": "scratch"', '"name": "/elsewhere/scratch"'))
    check_run(config)  # the same, from another folder
    page.write_text(text)
    for words in ({"pooling": "cls"}, {"layers": 3}, {"name": "other"}):
        other = dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, **words))
        ((name, value),) = words.items()
        with pytest.raises(
            ConfigError, match=f"groups.json: label embeddings are of .*, not of .*encoder.{name}={value}.*run haste prepare"
        ):
            check_embedder(other, page)


def test_groups_read_what_holds_most_of_their_labels(tmp_path: Path) -> None:
    """Label embeddings that lie in 8 hidden directions are kept whole by 8 features a group; without the basis they are not."""
    config, _ = with_vectors(tmp_path)
    random = np.random.default_rng(5)
    vectors = random.standard_normal((LABELS, 8)) @ np.linalg.qr(random.standard_normal((WIDTH, 8)))[0].T
    kept = {}
    for name in ("embedding", "labels"):
        config.output.basis = name
        make_order(config, (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16))
        prepared = open_prepared(config)
        layer = make_classifier(config, prepared.order, WIDTH, join_world("cpu"))
        start_from_centroids(layer, prepared)
        own = np.load(prepared.folder / "label_vectors.npy", allow_pickle=False).astype(np.float32)
        own = torch.from_numpy(own - own.mean(0))[torch.tensor(prepared.order.label_of_row[prepared.order.head_rows : LABELS])]
        turned = own if layer.basis is None else own @ layer.basis.float()
        index = layer.tail.index.long().repeat_interleave(16, 0)[: len(own)]
        kept[name] = float(turned.gather(1, index).square().sum() / own.square().sum())
    assert kept["labels"] > 0.999
    assert kept["embedding"] < 0.6


@pytest.mark.slow
def test_it_trains_on_two_ranks_resumes_predicts_and_is_exported(tmp_path: Path) -> None:
    one = with_basis(tmp_path, "train.max_steps=16")
    plain = dataclasses.replace(one, output=dataclasses.replace(one.output, basis="embedding"), run=dataclasses.replace(one.run))
    plain.run.folder += "-plain"
    train_all(join_world("cpu"), [one, plain])
    check_resumed_and_shared(one, stop=9)
    assert read_losses(plain.run.folder) != read_losses(one.run.folder)
    run = Path(one.run.folder)
    order = load_label_order(run)
    assert order.basis is not None
    assert len(verify(run)) > 5
    assert read_basis(Path(one.data.prepared)) is not None

    ids, logits = Predictor(run, "last", "cpu").topk(TEXTS, 5)
    for form in ("sparse", "dense"):
        out = export(run, tmp_path / form, "last", form)
        verify(out)
        for found, expected in zip(Predictor(out, device="cpu").topk(TEXTS, 5), (ids, logits), strict=True):
            np.testing.assert_array_equal(found, expected)
    plainly = subprocess.run([sys.executable, str(out / "predict.py"), *TEXTS], capture_output=True, text=True, check=True)
    assert [int(line.split()[1]) for line in plainly.stdout.splitlines() if line.startswith("  ")] == ids.ravel().tolist()
    from safetensors.torch import load_file

    dense = load_file(out / "dense.safetensors")
    predictor = Predictor(out, device="cpu")
    x = predictor.embedder.embed(predictor.embedder.tokens(TEXTS))
    np.testing.assert_allclose((x @ dense["weight"].T + dense["bias"]).topk(5).values, logits, rtol=1e-4, atol=1e-5)

    data = (out / BASIS_FILE).read_bytes()
    (out / BASIS_FILE).write_bytes(data[:-1] + b"\x01")
    with pytest.raises(HasteError, match=f"{BASIS_FILE}: damaged"):
        Predictor(out, device="cpu")


assert without_ray  # the fixture


@pytest.mark.slow
@pytest.mark.usefixtures("without_ray")
def test_new_labels_join_in_the_basis_that_was(tmp_path: Path) -> None:
    config = with_basis(tmp_path / "old", "train.max_steps=6")
    train_all(join_world("cpu"), [config])
    grown = grown_config(config, tmp_path / "new", "train.max_steps=0", "groups.features=encoder")
    grow(config, tmp_path / "new/source")
    add_labels(grown, Path(config.run.folder), "last", neighbours=3)
    before, after = load_label_order(config.run.folder).basis, load_label_order(grown.run.folder).basis
    assert before is not None
    assert after is not None
    assert torch.equal(before, after)
    old = scores(config.run.folder, TEXTS, LABELS)
    np.testing.assert_array_equal(scores(grown.run.folder, TEXTS, LABELS), old)
    assert final_tensors(grown.run.folder)["tail.weight"].isfinite().all()

    grown.output.start = "centroids"  # as the pages have it that are shipped: labels that were added have started
    grown.train.max_steps = 3
    train(grown, join_world("cpu"))
    assert len(read_losses(grown.run.folder)) == 3
    grown.run.folder += "-anew"
    with pytest.raises(DataError, match=r"label_vectors.npy: missing"):
        check_run(grown)


def test_what_cannot_be_is_told(tmp_path: Path) -> None:
    for word, says in (("groups.features=tfidf", "set groups.features=encoder"), ("encoder.project=16", "are not projected")):
        with pytest.raises(ConfigError, match=f"output.basis=labels: .*{says}"):
            load_config(None, ["output.basis=labels", word])
    config = with_basis(tmp_path)
    check_run(config)
    prepared = Path(config.data.prepared)
    turn = read_basis(prepared)
    assert turn is not None
    write_basis(prepared, -turn)
    with pytest.raises(DataError, match=r"is not the order that groups.json tells of; run haste prepare again"):
        check_run(config)
    (prepared / BASIS_FILE).write_bytes(b"no tensors")
    with pytest.raises(DataError, match=rf"{BASIS_FILE}: damaged .*run haste prepare again"):
        check_run(config)
    config, vectors = with_vectors(tmp_path / "none")
    make_order(config, vectors)
    config.output.basis = "labels"
    with pytest.raises(
        ConfigError, match=r"output.basis=labels: prepared is nothing, these settings ask for 32 x 32; run haste prepare with them"
    ):
        check_run(config)
    config = with_basis(tmp_path / "slice", "output.tail_features=[4,28]")
    check_run(config)
    config.output.tail_features = [4, 20]
    with pytest.raises(ConfigError, match=r"prepared is 24 x 24, these settings ask for 16 x 16; run haste prepare"):
        check_run(config)
    manifest = open_prepared(config).manifest
    for features, current in (([4, 28], True), ([8, 32], False)):  # others as many
        config.output.tail_features = features
        assert label_order_is_current(config, config.data.prepared, manifest) is current
    with pytest.raises(ConfigError, match=r"its basis is of the features \[4, 28\], output.tail_features asks for \[8, 32\]"):
        check_run(config)
