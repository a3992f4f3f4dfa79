"""What turns tokenised texts into vectors: an encoder, or TF-IDF.

    encoder   the configured encoder, any other Hugging Face or sentence-transformers model in a local folder or by name, or the
              best checkpoint of a run folder; on a GPU where there is one
    tfidf     TF-IDF of the token ids, brought to D = 384 by a sparse random projection: fast, and needs no trained encoder

Letters: n texts of a piece, D embedding width, V vocabulary, B texts of a batch, S tokens of its longest text.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import scipy.sparse as sp
import torch
from safetensors.torch import load_file

from haste_dist import checkpoint
from haste_dist.config import Config, EncoderConfig, encoder_settings_of, load_config
from haste_dist.encoder import build_encoder, load_tokenizer, resolve_name, tokenizer_fingerprint
from haste_dist.errors import CheckpointError, ConfigError
from haste_dist.manifest import Manifest

PROJECTED, PROJECTION_ENTRIES = 384, 8  # width of projected TF-IDF, and non-zeros of a token in it
PIECE = 16384  # texts in memory at once
PROJECTION_STREAM = 3  # keeps the random streams of one seed apart
POOLINGS = {"mean": "mean", "cls": "cls", "mean_tokens": "mean", "cls_token": "cls"}  # of sentence-transformers


@dataclass(frozen=True)
class Ragged:
    """n lists of token ids, end to end: ``values`` (sum of lengths,) int32 and ``offsets`` (n + 1,) int64 from 0."""

    values: np.ndarray
    offsets: np.ndarray

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def lists(self) -> list[list[int]]:
        return [part.tolist() for part in np.split(self.values, self.offsets[1:-1])] if len(self) else []


Embedder = Callable[[Ragged], np.ndarray]
"""n texts, as ids of the prepared folder's tokenizer, to (n, D) float32."""


def ragged(column: pa.ListArray) -> Ragged:
    offsets = column.offsets.to_numpy().astype(np.int64)
    return Ragged(column.values.to_numpy()[offsets[0] : offsets[-1]], offsets - offsets[0])


def pieces(train: pa.Table) -> Iterator[tuple[Ragged, Ragged]]:
    """(token ids, label ids) of the texts, at most PIECE at a time, in order."""
    for batch in train.select(["input_ids", "labels"]).to_batches(max_chunksize=PIECE):
        if batch.num_rows:
            yield ragged(batch.column(0)), ragged(batch.column(1))


def tokenize(config: EncoderConfig, texts: list[str], max_length: int) -> Ragged:
    ids = load_tokenizer(config)(texts, truncation=True, max_length=max_length, return_attention_mask=False)["input_ids"]
    offsets = np.concatenate([[0], np.cumsum([len(i) for i in ids])]).astype(np.int64)
    return Ragged(np.concatenate([np.asarray(i, np.int32) for i in ids]), offsets)


@dataclass(frozen=True)
class EncoderSource:
    """Where the encoder of label embeddings comes from. ``weights``: a checkpoint of a run, or None for the model's own."""

    settings: EncoderConfig
    weights: Path | None = None

    def identity(self) -> dict[str, Any]:
        """What its embeddings depend on."""
        own = {name: getattr(self.settings, name) for name in ("name", "layers", "pooling")}
        return own | ({"weights": checkpoint.read_page(self.weights)["files"]["encoder.safetensors"]} if self.weights else {})


def encoder_source(config: Config) -> EncoderSource:
    """The encoder that ``groups.encoder`` names, or else the one that is trained. Raises ConfigError or CheckpointError."""
    name = config.groups.encoder
    if name and (Path(name) / "config.yaml").is_file():
        run = Path(name)
        best = checkpoint.resolve(run / checkpoint.CHECKPOINTS, "best")
        return EncoderSource(encoder_settings_of(load_config(run / "config.yaml"), run), best)
    if (name or config.encoder.name) == "scratch":
        more = ", output.start=random, output.basis=embedding"
        asked = more if config.output.start == "centroids" or config.output.basis == "labels" else ""
        raise ConfigError(
            f"groups.features=encoder: a scratch encoder has learnt nothing to compare labels by; set groups.features=tfidf{asked}"
        )
    if not name:
        return EncoderSource(dataclasses.replace(config.encoder, project=0))  # a projection has learnt nothing yet
    settings = dataclasses.replace(config.encoder, name=name, tokenizer="", layers=0, project=0)
    return EncoderSource(dataclasses.replace(settings, pooling=_pooling(name) or settings.pooling))


def encoder_embedder(config: Config, manifest: Manifest, device: torch.device) -> Embedder:
    """Raises ConfigError for an encoder or tokenizer that cannot be loaded, CheckpointError for a run without a checkpoint."""
    source = encoder_source(config)
    settings, longest = source.settings, manifest.max_length
    tokenizer = load_tokenizer(settings)
    encoder = build_encoder(settings, len(tokenizer), tokenizer.pad_token_id, longest, pretrained=source.weights is None)
    if source.weights:
        page = checkpoint.read_page(source.weights)
        checkpoint.verify_files(source.weights, {"files": {"encoder.safetensors": page["files"]["encoder.safetensors"]}})
        found = load_file(source.weights / "encoder.safetensors")
        if found.keys() != dict(encoder.named_parameters()).keys():
            raise CheckpointError(f"{source.weights}: its encoder is not the one that {config.groups.encoder}/encoder describes")
        encoder.load_state_dict(found, strict=False)  # it holds parameters only, no buffers
    encoder = encoder.to(device).eval()
    # Texts are kept as token ids; for an encoder with another tokenizer they are spelt out and cut anew.
    theirs = None if tokenizer_fingerprint(tokenizer) == manifest.tokenizer.fingerprint else load_tokenizer(config.encoder)
    low_precision = device.type == "cuda" and settings.precision != "float32"

    def embed(texts: Ragged) -> np.ndarray:
        if theirs is not None:
            texts = tokenize(settings, theirs.batch_decode(texts.lists(), skip_special_tokens=True), longest)
        result_nD = np.empty((len(texts), encoder.width), np.float32)
        by_length = np.argsort(-texts.lengths(), kind="stable")  # longest first: little padding, and too long a batch fails at once
        for begin in range(0, len(texts), config.groups.batch_size):
            rows = by_length[begin : begin + config.groups.batch_size]
            ids_BS, mask_BS = _pad(texts, rows, int(tokenizer.pad_token_id))
            with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=low_precision):
                x_BD = encoder(torch.from_numpy(ids_BS).to(device), torch.from_numpy(mask_BS).to(device))
            result_nD[rows] = x_BD.float().cpu().numpy()
        return result_nD

    return embed


def _pooling(name: str) -> str:
    """How a sentence-transformers folder pools tokens, or '' where it is no such folder. Raises ConfigError for what is not known here."""
    folder = Path(resolve_name(name))
    try:
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        kinds = {module["type"].rpartition(".")[2]: module["path"] for module in modules}
        page = json.loads((folder / kinds["Pooling"] / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"groups.encoder={name}: its modules.json or pooling cannot be read ({error})") from None
    wanted = (
        [page["pooling_mode"]] if "pooling_mode" in page else [key[13:] for key, on in page.items() if key[:13] == "pooling_mode_" and on]
    )
    more = kinds.keys() - {"Transformer", "Pooling", "Normalize"}
    if more or len(wanted) != 1 or wanted[0] not in POOLINGS:
        raise ConfigError(f"groups.encoder={name}: needs {', '.join([*more, *wanted])}; known are mean and cls pooling and normalisation")
    return POOLINGS[wanted[0]]


def _pad(texts: Ragged, rows: np.ndarray, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and attention mask, both (B, S) int64, of the texts at ``rows``."""
    lengths_B = texts.lengths()[rows]
    at_S = np.arange(max(1, lengths_B.max()))
    mask_BS = at_S < lengths_B[:, None]
    where_BS = np.where(mask_BS, texts.offsets[rows][:, None] + at_S, 0)
    ids_BS = np.where(mask_BS, texts.values[where_BS], pad_id) if len(texts.values) else np.full(mask_BS.shape, pad_id)
    return ids_BS.astype(np.int64), mask_BS.astype(np.int64)


def tfidf_embedder(idf: np.ndarray, seed: int) -> Embedder:
    """TF-IDF with 1 + log count, times ``idf`` (V,), projected."""
    project = projection(len(idf), seed)

    def embed(texts: Ragged) -> np.ndarray:
        weights = term_counts(texts, len(idf))
        weights.data = (1 + np.log(weights.data)) * idf[weights.indices]
        return (weights @ project).toarray()

    return embed


def inverse_document_frequency(train: pa.Table, vocabulary: int, counts: np.ndarray) -> np.ndarray:
    """(V,) float32 log((1 + N) / (1 + N_t)): tokens of every text, such as the special ones, weigh nothing.

    ``counts``: (rows,) bool, which of the texts are looked at.
    """
    frequency, first = np.zeros(vocabulary, np.int64), 0
    for texts, _ in pieces(train):
        of_texts = term_counts(texts, vocabulary)[counts[first : first + len(texts)]]
        frequency += np.bincount(of_texts.indices, minlength=vocabulary)
        first += len(texts)
    return np.log((1 + counts.sum()) / (1 + frequency)).astype(np.float32)


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
