"""output.start=centroids: features and weights of the tail from its labels' embeddings, on any ranks; output.tail_lr."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import check_resumed_and_shared, make_prepared, read_losses, train_all

from haste_dist import label_embeddings
from haste_dist.centroids import start_from_centroids
from haste_dist.config import Config, load_config
from haste_dist.errors import ConfigError, DataError
from haste_dist.label_embeddings import LabelEmbeddings
from haste_dist.label_groups import VECTORS_FILE, label_order_is_current, make_label_order
from haste_dist.model import make_classifier, open_prepared
from haste_dist.preflight import check_run
from haste_dist.prepare import prepare
from haste_dist.sealed import seal_data
from haste_dist.world import join_world

LABELS, WIDTH = 101, 32


def with_vectors(folder: Path, *more: str) -> tuple[Config, np.ndarray]:
    """A problem whose prepared folder holds embeddings of its labels, and these."""
    config = make_prepared(folder, labels=LABELS, overrides=list(more))
    vectors = np.random.default_rng(3).standard_normal((LABELS, WIDTH)).astype(np.float16)
    vectors /= np.linalg.norm(vectors.astype(np.float32), axis=1, keepdims=True).astype(np.float16)
    np.save(Path(config.data.prepared) / VECTORS_FILE, vectors, allow_pickle=False)
    seal_data(Path(config.data.prepared))
    config.groups.features, config.output.start = "encoder", "centroids"
    return config, vectors


def test_features_and_weights_are_those_of_the_definition(tmp_path: Path) -> None:
    config, vectors = with_vectors(tmp_path, "output.tail_features=[4,28]", "output.init_scale=2")
    prepared = open_prepared(config)
    tail_state = make_classifier(config, prepared.order, WIDTH, join_world("cpu"))
    start_from_centroids(tail_state, prepared)
    order, tail = prepared.order, tail_state.tail
    centred = vectors.astype(np.float64) - vectors.astype(np.float64).mean(0)
    padded = 0
    for group in range(order.groups):
        labels = order.label_of_row[order.head_rows + 16 * group :][:16]
        together = np.square(centred[labels[labels >= 0], 4:28]).sum(0)
        chosen = np.sort(np.argsort(-together)[: config.output.fan_in])
        assert tail.index[group].tolist() == chosen.tolist()
        for row, label in enumerate(labels):
            own = centred[label, 4:28][chosen] if label >= 0 else np.zeros(len(chosen))
            padded += label < 0
            expected = 2 * own / np.linalg.norm(own) if label >= 0 else own
            np.testing.assert_allclose(tail.weight[group, row].numpy(), expected, atol=1e-5)
    assert padded  # the last group of this problem is not full


def test_it_trains_the_same_on_two_ranks_and_resumes(tmp_path: Path) -> None:
    one, _ = with_vectors(tmp_path, "train.max_steps=16", "output.tail_lr=6")
    plain, slow = copy.deepcopy(one), copy.deepcopy(one)
    for other, name in ((plain, "plain"), (slow, "slow")):
        other.run.folder += f"-{name}"
    plain.output.start, slow.output.tail_lr = "random", None
    train_all(join_world("cpu"), [one, plain, slow])
    check_resumed_and_shared(one, stop=9)  # the second start must not begin from centroids again
    losses = read_losses(one.run.folder)
    assert read_losses(plain.run.folder)[0] != losses[0]
    assert read_losses(slow.run.folder)[0] == losses[0]
    assert read_losses(slow.run.folder)[3] != losses[3]  # the tail went another way


def test_the_rate_of_the_tail_is_its_own(tmp_path: Path) -> None:
    config = make_prepared(tmp_path, overrides=["output.momentum=0", "output.weight_decay=0"])
    prepared, world = open_prepared(config), join_world("cpu")
    x_ND, rows_NM = torch.randn(8, WIDTH), torch.arange(8)[:, None] * 12
    moved = {}
    for rate in (None, 6.0):
        config.output.tail_lr = rate
        layer = make_classifier(config, prepared.order, WIDTH, world)
        head, tail = layer.head.weight.clone(), layer.tail.weight.clone()
        layer.step(x_ND, rows_NM, lr=config.output.lr / 2, step=0)
        moved[rate] = layer.head.weight - head, layer.tail.weight - tail
    assert torch.equal(moved[None][0], moved[6.0][0])
    torch.testing.assert_close(moved[6.0][1], 6.0 / config.output.lr * moved[None][1], rtol=1e-4, atol=1e-6)


def test_prepare_keeps_the_embeddings_where_they_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_prepared(tmp_path, labels=LABELS)
    folder, manifest = Path(config.data.prepared), open_prepared(config).manifest
    vectors = np.eye(LABELS, WIDTH, dtype=np.float16)
    monkeypatch.setattr(label_embeddings, "embed_labels", lambda *_: LabelEmbeddings(vectors, 0, 0, 0))
    make_label_order(config, folder, manifest)
    assert not (folder / VECTORS_FILE).exists()
    assert label_order_is_current(config, folder, manifest)
    config.output.start = "centroids"
    assert not label_order_is_current(config, folder, manifest)
    make_label_order(config, folder, manifest)
    assert label_order_is_current(config, folder, manifest)
    assert np.array_equal(np.load(folder / VECTORS_FILE, allow_pickle=False), vectors)


def test_what_cannot_be_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"set groups.features=encoder, groups.encoder="):
        load_config(None, ["output.start=centroids", "groups.features=tfidf"])
    with pytest.raises(ConfigError, match=r"groups of earlier data may have seen the dev texts"):
        prepare(load_config(None, ["groups.start=earlier", "data.dev_fraction=0.1"]))
    config, vectors = with_vectors(tmp_path)
    check_run(config)
    np.save(Path(config.data.prepared) / VECTORS_FILE, vectors[:, :30], allow_pickle=False)
    with pytest.raises(DataError, match=r"is \(101, 30\), not \(101, 32\); run haste prepare again"):
        check_run(config)
    config.data.dev_fraction = 0.1
    with pytest.raises(ConfigError, match=r"leave out no text, this run holds out .*dev_fraction=0.1 run.seed=0; run haste prepare with"):
        check_run(config)
    config.data.dev_fraction = 0.0
    (Path(config.data.prepared) / VECTORS_FILE).unlink()
    with pytest.raises(DataError, match=r"run haste prepare again with output.start=centroids"):
        check_run(config)
