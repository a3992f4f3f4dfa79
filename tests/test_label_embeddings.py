"""Label embeddings against a slow definition: one text at a time, one label at a time."""

import dataclasses
import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import WORDS, make_prepared, make_tokenizer
from transformers import BertConfig, BertModel

from haste_dist import label_embeddings, text_embedders
from haste_dist.config import Config
from haste_dist.encoder import build_encoder, load_tokenizer
from haste_dist.errors import CheckpointError, ConfigError
from haste_dist.held_out import dev_rows
from haste_dist.label_embeddings import LabelEmbeddings, add_label_sums, embed_labels
from haste_dist.manifest import LABEL_SCHEMA, LABEL_TEXTS, SHARD_SCHEMA, open_split, read_arrow, read_manifest, write_arrow
from haste_dist.model import make_encoder
from haste_dist.text_embedders import Ragged, encoder_source, inverse_document_frequency, projection, tfidf_embedder
from haste_dist.train import train
from haste_dist.world import join_world

LABELS = 101
HALF = 1e-3  # vectors are kept in float16


def unit(x: np.ndarray) -> np.ndarray:
    length = np.linalg.norm(x)
    return x / length if length else x


def ragged(lists: list[list[int]]) -> Ragged:
    return Ragged(np.array([v for part in lists for v in part], np.int32), np.cumsum([0, *map(len, lists)]))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A prepared folder and a pretrained encoder (of random weights) in a local folder."""
    folder = tmp_path_factory.mktemp("embeddings")
    made = make_prepared(folder, labels=LABELS, texts=60)
    torch.manual_seed(0)
    shape = BertConfig(vocab_size=WORDS + 2, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    BertModel(shape).save_pretrained(folder / "bert")
    make_tokenizer(folder / "bert")
    made.encoder.name = str(folder / "bert")
    made.groups.batch_size = 7
    return made


@contextmanager
def own_texts(config: Config, texts: list[str]) -> Iterator[None]:
    """The label texts of the prepared folder, for a while."""
    path = Path(config.data.prepared) / LABEL_TEXTS
    before = path.read_bytes()
    table = read_arrow(path, LABEL_SCHEMA)
    columns = [table["uid"].combine_chunks(), pa.array(texts), table["frequency"].combine_chunks()]
    write_arrow(path, pa.RecordBatch.from_arrays(columns, schema=LABEL_SCHEMA))
    yield
    path.write_bytes(before)


def embed(config: Config, texts: list[str] | None = None) -> LabelEmbeddings:
    folder = Path(config.data.prepared)
    with own_texts(config, texts) if texts else nullcontext(), TemporaryDirectory() as work:
        made = embed_labels(config, folder, read_manifest(folder), torch.device("cpu"), Path(work) / "new")
        return dataclasses.replace(made, vectors=np.array(made.vectors, np.float32))


def training_rows(config: Config) -> list[dict]:
    folder = Path(config.data.prepared)
    return open_split(folder, read_manifest(folder), "train").to_pylist()


def by_definition(config: Config, embed_one, own_texts: list[str], but: np.ndarray | tuple[()] = ()) -> np.ndarray:
    """Mean over a label's training texts (all ``but`` some), unit length, plus its own text's embedding, unit length; zero for neither."""
    rows, tokenizer = [row for i, row in enumerate(training_rows(config)) if i not in but], load_tokenizer(config.encoder)
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
    got = embed(config, own)
    expected = by_definition(config, embed_one, own)
    known = expected.any(axis=1)
    np.testing.assert_allclose(got.vectors[known], expected[known], atol=HALF)
    assert got.with_text == sum(map(bool, own))
    assert got.missing == (~known).sum() > 0


@pytest.mark.parametrize("dev_fraction", [0.0, 0.4])
def test_tfidf_embeddings(config: Config, dev_fraction: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dev text counts neither for its labels nor for how rare a token is."""
    config.groups.features = "tfidf"
    monkeypatch.setattr(config.data, "dev_fraction", dev_fraction)
    monkeypatch.setattr(config.run, "seed", 3)
    monkeypatch.setattr(text_embedders, "PIECE", 11)
    dev = dev_rows(60, dev_fraction, 3)
    rows = [row for i, row in enumerate(training_rows(config)) if i not in dev]
    assert len(rows) == round(60 * (1 - dev_fraction))
    document_frequency = np.bincount([token for row in rows for token in set(row["input_ids"])], minlength=WORDS + 2)
    project = projection(WORDS + 2, config.run.seed).toarray()

    def embed_one(ids: list[int]) -> np.ndarray:
        vector = np.zeros(WORDS + 2)
        for token in set(ids):
            vector[token] = (1 + math.log(ids.count(token))) * math.log((1 + len(rows)) / (1 + document_frequency[token]))
        return vector @ project

    own = [f"w{i}" if i % 2 else "" for i in range(LABELS)]
    got = embed(config, own)
    expected = by_definition(config, embed_one, own, dev)
    known = expected.any(axis=1)
    np.testing.assert_allclose(got.vectors[known], expected[known], atol=HALF)
    assert got.missing == (~known).sum() > 0


@pytest.mark.parametrize("features", ["encoder", "tfidf"])
def test_a_vector_does_not_depend_on_dev_texts(config: Config, features: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above all not that of a label whose only text is one of them: it is as if the label had none."""
    config.groups.features = features
    monkeypatch.setattr(config.groups, "label_text", False)
    whole = embed(config)
    monkeypatch.setattr(config.data, "dev_fraction", 0.3)
    dev, rows = dev_rows(60, 0.3, config.run.seed), training_rows(config)
    elsewhere = {label for i, row in enumerate(rows) if i not in dev for label in row["labels"]}
    only = sorted({label for i in dev for label in rows[i]["labels"]} - elsewhere)
    assert only
    before = embed(config)
    assert (before.missing, before.untrained) == (whole.missing + len(only), whole.untrained + len(only))
    shutil.copytree(config.data.prepared, tmp_path / "other")
    first = 0
    for shard in read_manifest(config.data.prepared).splits["train"].shards:
        part = rows[first : first + shard.rows]
        columns = {name: [row[name] for row in part] for name in SHARD_SCHEMA.names}
        columns["input_ids"] = [[2, 3, 2] if first + i in dev else row["input_ids"] for i, row in enumerate(part)]
        write_arrow(tmp_path / "other" / shard.file, pa.RecordBatch.from_pydict(columns, schema=SHARD_SCHEMA))
        first += shard.rows
    monkeypatch.setattr(config.data, "prepared", str(tmp_path / "other"))
    after = embed(config)
    np.testing.assert_allclose(after.vectors, before.vectors, atol=HALF)  # other texts stand in a batch: the last bit may change
    assert np.array_equal(after.vectors[only], before.vectors[only])
    assert abs(after.vectors - whole.vectors).max() > 0.1


@pytest.mark.parametrize("features", ["encoder", "tfidf"])
def test_without_label_texts_no_test_text_is_read(config: Config, features: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With them only their tokens are compared: see below."""
    config.groups.features = features
    monkeypatch.setattr(config.groups, "label_text", False)
    whole = embed(config)
    shutil.copytree(config.data.prepared, tmp_path / "without")
    shutil.rmtree(tmp_path / "without/test")
    monkeypatch.setattr(config.data, "prepared", str(tmp_path / "without"))
    np.testing.assert_array_equal(embed(config).vectors, whole.vectors)


@pytest.mark.parametrize("dev_fraction", [0.0, 0.3])
def test_a_label_text_that_is_held_out_is_not_joined(config: Config, dev_fraction: float, monkeypatch: pytest.MonkeyPatch) -> None:
    config.groups.features = "encoder"
    monkeypatch.setattr(config.data, "dev_fraction", dev_fraction)
    monkeypatch.setattr(label_embeddings, "OWN_TEXTS", 17)
    folder = Path(config.data.prepared)
    test = open_split(folder, read_manifest(folder), "test")["input_ids"].to_pylist()
    train = [row["input_ids"] for row in training_rows(config)]
    dev = dev_rows(60, dev_fraction, config.run.seed).tolist()
    kept = next(i for i in range(60) if i not in dev and train[i] not in test)
    cases = {1: (test[0], True), 40: (test[9], True), 41: (train[kept], False)} | {70 + i: (train[row], True) for i, row in enumerate(dev)}

    def texts(but: set[int]) -> list[str]:
        words = {label: " ".join(f"w{token - 2}" for token in tokens) for label, (tokens, _) in cases.items() if label not in but}
        return [words.get(label, "w3 w1 w4 w1 w5" if label == 99 else "") for label in range(LABELS)]

    out = {label for label, (_, held_out) in cases.items() if held_out}
    got, without = embed(config, texts(set())), embed(config, texts(out))
    assert got.with_text == without.with_text == 2
    assert len(out) == 2 + len(dev)
    np.testing.assert_array_equal(got.vectors, without.vectors)
    assert not np.array_equal(got.vectors[41], embed(config, texts({*out, 41})).vectors[41])


@pytest.mark.parametrize("features", ["encoder", "tfidf"])
def test_pieces_and_batches_do_not_matter(config: Config, features: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config.groups.features = features
    whole = embed(config)
    monkeypatch.setattr(text_embedders, "PIECE", 11)
    monkeypatch.setattr(label_embeddings, "PIECE", 11)
    monkeypatch.setattr(config.groups, "batch_size", 64)
    monkeypatch.setattr(label_embeddings, "SUM_BYTES", 4 * 40 * 24)  # ranges of a few labels
    monkeypatch.setattr(label_embeddings, "OWN_TEXTS", 17)
    again = embed(config)
    np.testing.assert_allclose(again.vectors, whole.vectors, atol=HALF)
    assert (again.with_text, again.untrained, again.missing) == (whole.with_text, whole.untrained, whole.missing)


def test_a_token_of_every_text_weighs_nothing(config: Config) -> None:
    everywhere = Ragged(np.array([1, 5, 1, 6, 1, 7], np.int32), np.array([0, 2, 4, 6]))
    table = pa.table(
        {"input_ids": pa.array([[1, 5], [1, 6], [1, 7]], pa.list_(pa.int32())), "labels": pa.array([[0]] * 3, pa.list_(pa.int32()))}
    )
    embedder = tfidf_embedder(inverse_document_frequency(table, 8, np.ones(3, bool)), 0)
    without = Ragged(np.array([5, 6, 7], np.int32), np.array([0, 1, 2, 3]))
    np.testing.assert_array_equal(embedder(everywhere), embedder(without))


def test_labels_with_nothing_get_random_vectors(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    config.groups.features = "tfidf"
    seen = {label for row in training_rows(config) for label in row["labels"]}
    unseen = [label for label in range(LABELS) if label not in seen]
    assert unseen
    monkeypatch.setattr(config.groups, "label_text", False)
    got = embed(config)
    assert (got.missing, got.untrained, got.with_text) == (len(unseen), len(unseen), 0)
    np.testing.assert_allclose(np.linalg.norm(got.vectors, axis=1), 1, atol=HALF)
    assert len(np.unique(got.vectors[unseen], axis=0)) == len(unseen)
    np.testing.assert_array_equal(got.vectors, embed(config).vectors)
    monkeypatch.setattr(config.run, "seed", 1)
    assert not np.array_equal(got.vectors[unseen], embed(config).vectors[unseen])


def test_scratch_encoder_is_refused(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    config.groups.features = "encoder"
    monkeypatch.setattr(config.encoder, "name", "scratch")
    with pytest.raises(ConfigError, match=r"groups\.features=tfidf"):
        embed(config)


def test_a_killed_embedding_goes_on(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config.groups.features = "tfidf"
    folder, manifest = Path(config.data.prepared), read_manifest(Path(config.data.prepared))
    whole, real, calls = embed(config), label_embeddings._do, []

    def second_dies(*args: object) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(label_embeddings, "_do", second_dies)
    with pytest.raises(KeyboardInterrupt):
        embed_labels(config, folder, manifest, torch.device("cpu"), tmp_path / "work")
    again = embed_labels(config, folder, manifest, torch.device("cpu"), tmp_path / "work")
    assert len(calls) == 2 + 2  # of two shards and the labels' own texts, one shard was kept
    np.testing.assert_array_equal(again.vectors, whole.vectors.astype(np.float16))


def test_workers_make_the_same_vectors(
    config: Config, ray_session: None, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """And Ray Data has nothing to say to whoever waits for them."""
    config.groups.features = "tfidf"
    monkeypatch.setattr(label_embeddings, "FEW", {"tfidf": 0})
    through_ray = embed(config)
    assert "execution finished" not in capfd.readouterr().err
    monkeypatch.setattr(label_embeddings, "_Worker", None)
    config.data.workers = 1  # whom Ray need not start
    np.testing.assert_array_equal(through_ray.vectors, embed(config).vectors)
    config.data.workers = 0
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    np.testing.assert_array_equal(through_ray.vectors, embed(config).vectors)


def test_another_encoder_reads_the_words_anew(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same model with its vocabulary in another order, and rows of its embedding moved alike, gives the same vectors."""
    config.groups.features = "encoder"
    expected = embed(config)
    shuffled = np.random.default_rng(0).permutation(np.arange(2, WORDS + 2))
    page = json.loads((Path(config.encoder.name) / "tokenizer.json").read_text())
    vocabulary = page["model"]["vocab"]
    page["model"]["vocab"] = {word: int(shuffled[i - 2]) if i >= 2 else i for word, i in vocabulary.items()}
    shutil.copytree(config.encoder.name, tmp_path / "other")
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(page))
    model = BertModel.from_pretrained(config.encoder.name)
    table = model.embeddings.word_embeddings.weight.data
    table[torch.from_numpy(shuffled)] = table[2 : WORDS + 2].clone()
    model.save_pretrained(tmp_path / "other")
    monkeypatch.setattr(config.groups, "encoder", str(tmp_path / "other"))
    np.testing.assert_allclose(embed(config).vectors, expected.vectors, atol=HALF)


def test_a_trained_run_embeds(tmp_path: Path) -> None:
    """Not the weights that a run began with, but those of its best checkpoint."""
    config = make_prepared(tmp_path, labels=LABELS, texts=60, overrides=["train.max_steps=2", "groups.label_text=false", "encoder.lr=0.1"])
    train(config, join_world("cpu"))
    config.groups.features, config.groups.encoder = "encoder", config.run.folder
    source = encoder_source(config)
    assert source.weights is not None
    assert source.weights.name == "step-00000002"
    encoder = make_encoder(config, read_manifest(config.data.prepared))
    encoder.load_state_dict(load_file(source.weights / "encoder.safetensors"), strict=False)

    def embed_one(ids: list[int]) -> np.ndarray:
        with torch.no_grad():
            return encoder.eval()(torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.int64))[0].numpy()

    got, expected = embed(config), by_definition(config, embed_one, [""] * LABELS)
    known = expected.any(axis=1)
    np.testing.assert_allclose(got.vectors[known], expected[known], atol=HALF)
    (source.weights / "encoder.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"encoder\.safetensors: damaged"):
        embed(config)


def test_a_sentence_transformers_folder_says_how_it_pools(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(config.encoder.name, tmp_path / "st")
    monkeypatch.setattr(config.groups, "encoder", str(tmp_path / "st"))
    assert encoder_source(config).settings.pooling == "mean"
    modules = [
        {"path": "", "type": "sentence_transformers.models.Transformer"},
        {"path": "p", "type": "sentence_transformers.models.Pooling"},
    ]
    (tmp_path / "st" / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "st" / "p").mkdir()

    def pooling(**page: object) -> None:
        (tmp_path / "st" / "p" / "config.json").write_text(json.dumps(page))

    pooling(word_embedding_dimension=24, pooling_mode_cls_token=True, pooling_mode_mean_tokens=False)
    assert encoder_source(config).settings.pooling == "cls"
    pooling(pooling_mode="mean")
    assert encoder_source(config).settings.pooling == "mean"
    pooling(pooling_mode_cls_token=True, pooling_mode_mean_tokens=True)
    with pytest.raises(ConfigError, match=r"needs cls_token, mean_tokens; known are mean and cls"):
        encoder_source(config)
    pooling(pooling_mode="mean")
    (tmp_path / "st" / "modules.json").write_text(json.dumps([*modules, {"path": "2", "type": "sentence_transformers.models.Dense"}]))
    with pytest.raises(ConfigError, match=r"needs Dense"):
        encoder_source(config)


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
