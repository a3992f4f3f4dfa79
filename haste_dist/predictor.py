"""A trained run, or an exported one, as a function: texts in, ranked labels out. Needs its folder only, and no process group.

The encoder and the label rows are made apart, so that processes may share the labels: ``ModelFiles.labels(part, parts)`` is a part
of them, and ``merge_topk`` joins what the parts found.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from haste_dist import checkpoint
from haste_dist.calibration import EXPORTED, Calibration, read_calibration
from haste_dist.classifier import Classifier, embedding_width
from haste_dist.config import encoder_settings_of, load_config
from haste_dist.encoder import build_encoder, load_tokenizer
from haste_dist.errors import CheckpointError
from haste_dist.export import check_export, fill_encoder, fill_labels, is_export
from haste_dist.label_groups import load_label_order
from haste_dist.model import frozen_engine
from haste_dist.predict import LabelNames
from haste_dist.sharding import label_shard
from haste_dist.tokens import tokenise, tokenizer_rules
from haste_dist.verify import check_run_files
from haste_dist.world import alone

BATCH = 256  # texts embedded and scored at once
SORTED = 16 * BATCH  # texts sorted by length before they are batched, so that little of a batch is padding


class Ranked(NamedTuple):
    """A label that a text may have."""

    label: int
    """Its number in the data that the model was trained on."""
    text: str
    """Its own text, or ``label 17`` where it has none."""
    score: float
    """How likely it is, from 0 to 1; calibrated where ``haste evaluate --calibrate`` was run."""


class Embedder:
    """The encoder with its tokenizer."""

    def __init__(self, files: "ModelFiles", device: str):
        """Raises ConfigError or CheckpointError."""
        settings, config = encoder_settings_of(files.config, files.folder), files.config
        tokenizer = load_tokenizer(settings)
        encoder = build_encoder(settings, len(tokenizer), tokenizer.pad_token_id, config.data.max_length, pretrained=False)
        self.rules = tokenizer_rules(tokenizer.backend_tokenizer, config.data.max_length, str(tokenizer.truncation_side))
        if files.checkpoint is None:
            fill_encoder(files.folder, encoder)
        self.engine = frozen_engine(config, encoder, alone(device))
        if files.checkpoint is not None:
            checkpoint.load_encoder(files.checkpoint, self.engine, files.order.fingerprint)
        self.device, self.pad_id = self.engine.world.device, int(tokenizer.pad_token_id)

    def tokens(self, texts: Sequence[str]) -> pa.ListArray:
        """list<int32> (n,): token ids of each text, special ones included, cut to the longest that the model takes."""
        return tokenise(texts, self.rules)

    def embed(self, tokens: pa.ListArray, batch: int = BATCH) -> Tensor:
        """(n, D) embeddings of n >= 1 texts, on the device, in the dtype that the encoder works in; the host does not wait for them."""
        lengths = pc.list_value_length(tokens).to_numpy()
        by_length = np.argsort(lengths, kind="stable")
        ends = np.cumsum(lengths)
        ids, length, start, order = (
            torch.from_numpy(np.array(one)).to(self.device)
            for one in (tokens.flatten().to_numpy(), lengths[by_length], (ends - lengths)[by_length], by_length)
        )
        found = []
        for at in range(0, len(tokens), batch):
            longest = int(lengths[by_length[min(at + batch, len(tokens)) - 1]])
            place = torch.arange(longest, device=self.device)
            mask = place < length[at : at + batch, None]
            input_ids = ids[(start[at : at + batch, None] + place).clamp(max=len(ids) - 1)].long()
            found.append(self.engine.embed(input_ids.masked_fill(~mask, self.pad_id), mask.long()))
        x_ND = torch.cat(found)
        return torch.empty_like(x_ND).index_copy_(0, order, x_ND)


class ModelFiles:
    """What a run folder or an exported one says of the model in it, checked; weights are read by ``embedder`` and ``labels``."""

    def __init__(self, folder: str | Path, checkpoint_name: str = "best"):
        """``checkpoint_name``: best, last or a folder name; an export has one. Raises ConfigError, DataError or CheckpointError."""
        self.folder = Path(folder)
        if not (self.folder / "config.yaml").is_file():
            raise CheckpointError(f"{self.folder}: no run folder (it has no config.yaml); haste train makes one")
        exported = is_export(self.folder)
        (check_export if exported else check_run_files)(self.folder)
        config = load_config(self.folder / "config.yaml")
        self.config = dataclasses.replace(config, output=dataclasses.replace(config.output, momentum=0.0))  # only a step needs it
        self.order = load_label_order(self.folder)
        self.checkpoint = None if exported else checkpoint.resolve(self.folder / checkpoint.CHECKPOINTS, checkpoint_name)

    @property
    def version(self) -> str:
        """The checkpoint's name."""
        return self.checkpoint.name if self.checkpoint else EXPORTED

    @cached_property
    def names(self) -> LabelNames:
        """What labels are called. Raises DataError."""
        return LabelNames.of_run(self.folder, self.order)

    @cached_property
    def calibration(self) -> Calibration:
        """How logits become probabilities. Raises DataError."""
        return read_calibration(self.folder, self.version)

    @cached_property
    def width(self) -> int:
        """D of the embedding."""
        from haste_dist.encoder import model_config

        settings = encoder_settings_of(self.config, self.folder)
        return embedding_width(settings, int(model_config(settings, 0, 0, self.config.data.max_length).hidden_size))

    def embedder(self, device: str = "auto") -> Embedder:
        return Embedder(self, device)

    def labels(self, device: str = "auto", part: int = 0, parts: int = 1, verified: bool = False) -> Classifier:
        """The ``part``-th of ``parts`` ranges of the label rows, with their weights; ``verified``: a run's files have been held against
        their checksums. Raises CheckpointError."""
        order = self.order
        shard = label_shard(order.head_rows, order.groups, order.group_size, order.labels, parts, part)
        place, seed = alone(device).device, self.config.run.seed
        classifier = Classifier(self.config.output, shard, self.width, seed, place, basis=order.basis, drawn=False)
        if self.checkpoint is None:
            fill_labels(self.folder, classifier)
        else:
            checkpoint.load_labels(self.checkpoint, classifier, order.fingerprint, verified)
        return classifier


class Predictor:
    """Loads a model once; ``predict`` may be called any number of times, with any number of texts."""

    def __init__(self, run: str | Path, checkpoint_name: str = "best", device: str = "auto"):
        """Of a run folder or an exported one; as ``ModelFiles``. ``device``: auto, cpu or cuda."""
        self.files = ModelFiles(run, checkpoint_name)
        self.order = self.files.order
        self.embedder = self.files.embedder(device)
        self._classifier = self.files.labels(device)

    def predict(self, texts: Iterable[str], k: int = 5) -> list[list[Ranked]]:
        """The ``k`` best labels of each text, best first; fewer only where the model has fewer."""
        if isinstance(texts, str):
            raise TypeError("predict takes a list of texts; put the one text into a list")
        texts = list(texts)
        for at, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"predict takes a list of texts; number {at} is {text!r:.60}, a {type(text).__name__}")
        labels, logits = self.topk(texts, k)
        return [
            [Ranked(label, text, score) for label, text, score in zip(ids[ids >= 0].tolist(), names, scores.tolist(), strict=False)]
            for ids, names, scores in zip(labels, self.files.names.rows(labels), self.files.calibration(logits), strict=True)
        ]

    @torch.no_grad()
    def topk(self, texts: Sequence[str], k: int = 5) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Label ids (n, k), best first, and their logits (n, k); -1 and -inf where there are fewer than k labels."""
        if k < 1:
            raise ValueError(f"k={k}: ask for one label at least")
        found = []
        for at in range(0, len(texts), SORTED):
            x_ND = self.embedder.embed(self.embedder.tokens(texts[at : at + SORTED]))
            for x in x_ND.split(BATCH):
                scores, rows = self._classifier.topk(x, k)
                found.append((rows.cpu().numpy(), scores.float().cpu().numpy()))
        rows_NK = np.concatenate([rows for rows, _ in found]) if found else np.empty((0, k), np.int64)
        logits = np.concatenate([scores for _, scores in found]) if found else np.empty((0, k), np.float32)
        return self.order.label_at(rows_NK), logits
