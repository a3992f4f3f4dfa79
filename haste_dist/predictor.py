"""A trained run, or an exported one, as a function: texts in, ranked labels out. Needs its folder only; one process holds all labels."""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from haste_dist import checkpoint
from haste_dist.config import load_config
from haste_dist.encoder import build_encoder, load_tokenizer
from haste_dist.errors import CheckpointError
from haste_dist.export import check_export, is_export, load_exported
from haste_dist.label_groups import load_label_order
from haste_dist.model import encoder_settings_of, frozen_engine, make_classifier
from haste_dist.verify import check_run_files
from haste_dist.world import join_world


class Predictor:
    """Loads a run once; ``predict`` may be called any number of times."""

    def __init__(self, run: str | Path, checkpoint_name: str = "best", device: str = "auto"):
        """``checkpoint_name``: best, last or a folder name; an export has one. Raises ConfigError, DataError or CheckpointError."""
        run = Path(run)
        if not (run / "config.yaml").is_file():
            raise CheckpointError(f"{run}: no run folder (it has no config.yaml); haste train makes one")
        exported = is_export(run)
        (check_export if exported else check_run_files)(run)
        config = load_config(run / "config.yaml")
        world = join_world(device)
        self.order = load_label_order(run)
        settings = encoder_settings_of(config, run)
        self.tokenizer = load_tokenizer(settings)
        encoder = build_encoder(settings, len(self.tokenizer), self.tokenizer.pad_token_id, config.data.max_length, pretrained=False)
        self._classifier = make_classifier(config, self.order, encoder.width, world)
        if exported:
            load_exported(run, encoder, self._classifier)
        self._engine = frozen_engine(config, encoder, world)
        if not exported:
            folder = checkpoint.resolve(run / "checkpoints", checkpoint_name)
            checkpoint.load(folder, self._engine, self._classifier, self.order.fingerprint)
        self._max_length, self._device = config.data.max_length, world.device

    @torch.no_grad()
    def predict(self, texts: list[str], k: int = 5) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Label ids (n, k), best first, and their logits (n, k); -1 and -inf where there are fewer than k labels."""
        encoded = self.tokenizer(texts, truncation=True, max_length=self._max_length, padding=True, return_tensors="pt")
        x_ND = self._engine.embed(encoded["input_ids"].to(self._device), encoded["attention_mask"].to(self._device))
        scores, rows = self._classifier.topk(x_ND, k)
        found = rows.cpu().numpy()
        return np.where(found < 0, -1, self.order.label_of_row[np.maximum(found, 0)]), scores.float().cpu().numpy()
