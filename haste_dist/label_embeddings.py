"""Label embeddings for grouping: the normalised mean of a label's training texts, joined with the label's own text.

The texts stream by, a shard at a time: Y^T E is summed into one (L, D) float32 array and nothing else grows with the data.
Only the training split is read, never a test text. What embeds a text is one of two things with the same face:

    encoder   the configured pretrained encoder, on a GPU where there is one
    tfidf     TF-IDF of the token ids, brought to D = 384 by a sparse random projection: fast, and needs no trained encoder

Letters: n texts of a piece, L labels, D embedding width, V vocabulary, B texts of a batch, S tokens of its longest text.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import scipy.sparse as sp
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from haste_dist.config import Config
from haste_dist.encoder import build_encoder, load_tokenizer
from haste_dist.errors import ConfigError
from haste_dist.manifest import Manifest, open_split

PROJECTED, PROJECTION_ENTRIES = 384, 8  # width of projected TF-IDF, and non-zeros of a token in it
PIECE = 16384  # texts embedded before their sum is taken: bounds memory where shards are large
PROJECTION_STREAM, MISSING_STREAM = 3, 4  # keep the random streams of one seed apart


@dataclass(frozen=True)
class Ragged:
    """n lists of token ids, end to end: ``values`` (sum of lengths,) int32 and ``offsets`` (n + 1,) int64 from 0."""

    values: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)


@dataclass(frozen=True)
class LabelEmbeddings:
    """``vectors`` (L, D) float32, each of length 1.

    ``with_text``: labels whose own text was joined in. ``missing``: labels with neither a training text nor a text of their
    own (or with texts that embed to zero); their vectors are random.
    """

    vectors: np.ndarray
    with_text: int
    missing: int


# Turns n texts into (n, D) float32 embeddings; ``done(k)`` is called as k more texts are finished.
Embedder = Callable[[Ragged, Callable[[int], None]], np.ndarray]


def embed_labels(config: Config, folder: Path, manifest: Manifest, label_texts: pa.ChunkedArray, device: torch.device) -> LabelEmbeddings:
    """Embeddings of the L labels of a prepared folder; ``label_texts`` are their own texts, '' for none.

    Raises ConfigError where the encoder has learnt nothing yet, and for an encoder or tokenizer that cannot be loaded.
    """
    train = open_split(folder, manifest, "train")
    own = np.flatnonzero(label_texts.to_numpy() != "") if config.groups.label_text else np.zeros(0, np.int64)
    if config.groups.features == "tfidf":
        embed, width = _tfidf_embedder(train, manifest.tokenizer.vocab_size, config.run.seed), PROJECTED
    else:
        embed, width = _encoder_embedder(config, manifest, device)
    sums_LD = np.zeros((manifest.labels, width), np.float32)
    with _progress() as bars:
        bar = bars.add_task("embedding labels", total=train.num_rows + len(own))
        for texts, labels in _pieces(train):
            add_label_sums(sums_LD, _normalise(embed(texts, lambda k: bars.advance(bar, k))), labels)
        _normalise(sums_LD)
        for part in np.split(own, range(PIECE, len(own), PIECE)) if len(own) else []:
            texts = _tokenize(config, label_texts.take(pa.array(part)).to_pylist(), manifest.max_length)
            sums_LD[part] += _normalise(embed(texts, lambda k: bars.advance(bar, k)))
    _normalise(sums_LD)
    missing = np.flatnonzero(~sums_LD.any(axis=1))
    sums_LD[missing] = _normalise(
        np.random.default_rng([config.run.seed, MISSING_STREAM]).standard_normal((len(missing), width), np.float32)
    )
    return LabelEmbeddings(sums_LD, with_text=len(own), missing=len(missing))


def add_label_sums(sums_LD: np.ndarray, embeddings_nD: np.ndarray, labels: Ragged) -> None:
    """Adds each text's embedding to the row of each of its labels, in place: Y^T E over the labels that occur."""
    seen, column = np.unique(labels.values, return_inverse=True)
    y_nu = sp.csr_matrix((np.ones(len(column), np.float32), column.ravel(), labels.offsets), shape=(len(labels), len(seen)))
    sums_LD[seen] += y_nu.T.tocsr() @ embeddings_nD


def term_counts(texts: Ragged, vocabulary: int) -> sp.csr_matrix:
    """(n, V) float32: how often each token stands in each text."""
    tokens = texts.values.copy()  # scipy sorts them in place, and a mapped file is read-only
    counts = sp.csr_matrix((np.ones(len(tokens), np.float32), tokens, texts.offsets), shape=(len(texts), vocabulary))
    counts.sum_duplicates()
    return counts


def projection(vocabulary: int, seed: int) -> sp.csr_matrix:
    """(V, 384) float32: eight random signs a token, scaled so that inner products are kept on average."""
    rng = np.random.default_rng([seed, PROJECTION_STREAM])
    columns = rng.integers(0, PROJECTED, vocabulary * PROJECTION_ENTRIES)
    signs = rng.choice(np.array([-1, 1], np.float32), vocabulary * PROJECTION_ENTRIES) / np.float32(np.sqrt(PROJECTION_ENTRIES))
    return sp.csr_matrix((signs, columns, np.arange(vocabulary + 1) * PROJECTION_ENTRIES), shape=(vocabulary, PROJECTED))


def _tfidf_embedder(train: pa.Table, vocabulary: int, seed: int) -> Embedder:
    """TF-IDF with (1 + log count) and log((1 + N) / (1 + N_t)): tokens of every text, such as the special ones, weigh nothing."""
    document_frequency = np.zeros(vocabulary, np.int64)
    for texts, _ in _pieces(train):
        document_frequency += np.bincount(term_counts(texts, vocabulary).indices, minlength=vocabulary)
    idf = np.log((1 + train.num_rows) / (1 + document_frequency)).astype(np.float32)
    project = projection(vocabulary, seed)

    def embed(texts: Ragged, done: Callable[[int], None]) -> np.ndarray:
        weights = term_counts(texts, vocabulary)
        weights.data = (1 + np.log(weights.data)) * idf[weights.indices]
        done(len(texts))
        return (weights @ project).toarray()

    return embed


def _encoder_embedder(config: Config, manifest: Manifest, device: torch.device) -> tuple[Embedder, int]:
    if config.encoder.name == "scratch":
        raise ConfigError("groups.features=encoder: a scratch encoder has learnt nothing to compare labels by; set groups.features=tfidf")
    pad_id = manifest.tokenizer.pad_id
    encoder = build_encoder(config.encoder, manifest.tokenizer.vocab_size, pad_id, manifest.max_length).to(device).eval()
    low_precision = device.type == "cuda" and config.encoder.precision != "float32"

    def embed(texts: Ragged, done: Callable[[int], None]) -> np.ndarray:
        result_nD = np.empty((len(texts), encoder.width), np.float32)
        by_length = np.argsort(-texts.lengths(), kind="stable")  # longest first: little padding, and too long a batch fails at once
        for begin in range(0, len(texts), config.groups.batch_size):
            rows = by_length[begin : begin + config.groups.batch_size]
            ids_BS, mask_BS = _pad(texts, rows, pad_id)
            with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=low_precision):
                x_BD = encoder(torch.from_numpy(ids_BS).to(device), torch.from_numpy(mask_BS).to(device))
            result_nD[rows] = x_BD.float().cpu().numpy()
            done(len(rows))
        return result_nD

    return embed, encoder.width


def _pad(texts: Ragged, rows: np.ndarray, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and attention mask, both (B, S) int64, of the texts at ``rows``."""
    lengths_B = texts.lengths()[rows]
    at_S = np.arange(max(1, lengths_B.max()))
    mask_BS = at_S < lengths_B[:, None]
    where_BS = np.where(mask_BS, texts.offsets[rows][:, None] + at_S, 0)
    ids_BS = np.where(mask_BS, texts.values[where_BS], pad_id) if len(texts.values) else np.full(mask_BS.shape, pad_id)
    return ids_BS.astype(np.int64), mask_BS.astype(np.int64)


def _pieces(train: pa.Table) -> Iterator[tuple[Ragged, Ragged]]:
    """(token ids, label ids) of the texts, at most PIECE at a time, in order."""
    for batch in train.select(["input_ids", "labels"]).to_batches(max_chunksize=PIECE):
        if batch.num_rows:
            yield _ragged(batch.column(0)), _ragged(batch.column(1))


def _ragged(column: pa.ListArray) -> Ragged:
    offsets = column.offsets.to_numpy().astype(np.int64)
    return Ragged(column.values.to_numpy()[offsets[0] : offsets[-1]], offsets - offsets[0])


def _tokenize(config: Config, texts: list[str], max_length: int) -> Ragged:
    ids = load_tokenizer(config.encoder)(texts, truncation=True, max_length=max_length, return_attention_mask=False)["input_ids"]
    offsets = np.concatenate([[0], np.cumsum([len(i) for i in ids])]).astype(np.int64)
    return Ragged(np.concatenate([np.asarray(i, np.int32) for i in ids]), offsets)


def _normalise(x: np.ndarray) -> np.ndarray:
    """Rows of length 1, in place; a zero row stays zero."""
    length = np.linalg.norm(x, axis=1, keepdims=True)
    np.divide(x, length, out=x, where=length > 0)
    return x


def _progress() -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
