"""Label embeddings against a slow definition: one text at a time, one label at a time."""

import math
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import WORDS, make_prepared, make_tokenizer
from transformers import BertConfig, BertModel

from haste_dist import label_embeddings
from haste_dist.config import Config
from haste_dist.encoder import build_encoder, load_tokenizer
from haste_dist.errors import ConfigError
from haste_dist.label_embeddings import LabelEmbeddings, Ragged, add_label_sums, embed_labels, projection
from haste_dist.manifest import LABEL_SCHEMA, LABEL_TEXTS, open_split, read_arrow, read_manifest

LABELS = 101


def unit(x: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(x)
    return x / length if length else x


def ragged(lists: list[list[int]]) -> Ragged:
    return Ragged(np.array([v for part in lists for v in part], np.int32), np.cumsum([0, *map(len, lists)]))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A prepared folder without its test split, and a pretrained encoder (of random weights) in a local folder."""
    folder = tmp_path_factory.mktemp("embeddings")
    made = make_prepared(folder, labels=LABELS, texts=60)
    torch.manual_seed(0)
    shape = BertConfig(vocab_size=WORDS + 2, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    BertModel(shape).save_pretrained(folder / "bert")
    make_tokenizer(folder / "bert")
    shutil.rmtree(Path(made.data.prepared) / "test")
    made.encoder.name = str(folder / "bert")
    made.groups.batch_size = 7
    return made


def embed(config: Config, texts: pa.ChunkedArray | None = None) -> LabelEmbeddings:
    folder = Path(config.data.prepared)
    own = read_arrow(folder / LABEL_TEXTS, LABEL_SCHEMA)["text"] if texts is None else texts
    return embed_labels(config, folder, read_manifest(folder), own, torch.device("cpu"))


def training_rows(config: Config) -> list[dict]:
    folder = Path(config.data.prepared)
    return open_split(folder, read_manifest(folder), "train").to_pylist()


def by_definition(config: Config, embed_one, own_texts: list[str]) -> np.ndarray:
    """Mean over a label's training texts, unit length, plus its own text's embedding, unit length; zero where there is neither."""
    rows, tokenizer = training_rows(config), load_tokenizer(config.encoder)
    result = []
    for label in range(LABELS):
        texts = [unit(embed_one(row["input_ids"])) for row in rows if label in row["labels"]]
        vector = unit(np.sum(texts, axis=0)) if texts else np.zeros_like(unit(embed_one([2])))
        if own_texts[label]:
            vector = vector + unit(embed_one(tokenizer(own_texts[label])["input_ids"]))
        result.append(unit(vector))
    return np.stack(result)


def test_encoder_embeddings(config: Config) -> None:
    config.groups.features = "encoder"
    encoder = build_encoder(config.encoder, WORDS + 2, 0, 16).eval()

    def embed_one(ids: list[int]) -> np.ndarray:
        with torch.no_grad():
            return encoder(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.int64))[0].numpy()

    own = [f"w{i} w{i + 1}" if i % 3 else "" for i in range(LABELS)]
    got = embed(config, pa.chunked_array([own]))
    expected = by_definition(config, embed_one, own)
    known = expected.any(axis=1)
    assert got.vectors.dtype == np.float32
    np.testing.assert_allclose(got.vectors[known], expected[known], atol=2e-5)
    assert got.with_text == sum(map(bool, own))
    assert got.missing == (~known).sum() > 0


def test_tfidf_embeddings(config: Config) -> None:
    config.groups.features = "tfidf"
    rows = training_rows(config)
    document_frequency = np.bincount([token for row in rows for token in set(row["input_ids"])], minlength=WORDS + 2)
    project = projection(WORDS + 2, config.run.seed).toarray()

    def embed_one(ids: list[int]) -> np.ndarray:
        vector = np.zeros(WORDS + 2)
        for token in set(ids):
            vector[token] = (1 + math.log(ids.count(token))) * math.log((1 + len(rows)) / (1 + document_frequency[token]))
        return vector @ project

    own = [f"w{i}" if i % 2 else "" for i in range(LABELS)]
    got = embed(config, pa.chunked_array([own]))
    expected = by_definition(config, embed_one, own)
    known = expected.any(axis=1)
    np.testing.assert_allclose(got.vectors[known], expected[known], atol=2e-5)
    assert got.missing == (~known).sum() > 0


@pytest.mark.parametrize("features", ["encoder", "tfidf"])
def test_pieces_and_batches_do_not_matter(config: Config, features: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config.groups.features = features
    whole = embed(config)
    monkeypatch.setattr(label_embeddings, "PIECE", 11)
    monkeypatch.setattr(config.groups, "batch_size", 64)
    np.testing.assert_allclose(embed(config).vectors, whole.vectors, atol=2e-5)


def test_a_token_of_every_text_weighs_nothing(config: Config) -> None:
    everywhere = Ragged(np.array([1, 5, 1, 6, 1, 7], np.int32), np.array([0, 2, 4, 6]))
    table = pa.table(
        {"input_ids": pa.array([[1, 5], [1, 6], [1, 7]], pa.list_(pa.int32())), "labels": pa.array([[0]] * 3, pa.list_(pa.int32()))}
    )
    embedder = label_embeddings._tfidf_embedder(table, 8, 0)
    without = Ragged(np.array([5, 6, 7], np.int32), np.array([0, 1, 2, 3]))
    np.testing.assert_array_equal(embedder(everywhere, lambda k: None), embedder(without, lambda k: None))


def test_labels_with_nothing_get_random_vectors(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    config.groups.features = "tfidf"
    seen = {label for row in training_rows(config) for label in row["labels"]}
    unseen = [label for label in range(LABELS) if label not in seen]
    assert unseen
    monkeypatch.setattr(config.groups, "label_text", False)
    got = embed(config)
    assert (got.missing, got.with_text) == (len(unseen), 0)
    np.testing.assert_allclose(np.linalg.norm(got.vectors, axis=1), 1, atol=1e-6)
    assert len(np.unique(got.vectors[unseen], axis=0)) == len(unseen)
    np.testing.assert_array_equal(got.vectors, embed(config).vectors)
    monkeypatch.setattr(config.run, "seed", 1)
    assert not np.array_equal(got.vectors[unseen], embed(config).vectors[unseen])


def test_scratch_encoder_is_refused(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    config.groups.features = "encoder"
    monkeypatch.setattr(config.encoder, "name", "scratch")
    with pytest.raises(ConfigError, match=r"groups\.features=tfidf"):
        embed(config)


@given(st.lists(st.lists(st.integers(0, 19), max_size=5, unique=True), min_size=1, max_size=30), st.integers(0, 100))
def test_label_sums(labels: list[list[int]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    texts = rng.standard_normal((len(labels), 3)).astype(np.float32)
    sums = start = rng.standard_normal((20, 3)).astype(np.float32)
    expected = start.astype(np.float64)
    for text, its in zip(texts, labels, strict=True):
        for label in its:
            expected[label] += text
    add_label_sums(sums, texts, ragged(labels))
    np.testing.assert_allclose(sums, expected, atol=1e-5)


def test_projection_keeps_similarities() -> None:
    rng = np.random.default_rng(0)
    x = rng.random((40, 2000)) * (rng.random((40, 2000)) < 0.05)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    projected = x @ projection(2000, 0)
    assert np.abs(projected @ projected.T - x @ x.T).max() < 0.3
    assert np.abs(projected @ projected.T - x @ x.T).mean() < 0.06
    assert (projection(2000, 0) != projection(2000, 1)).nnz
