"""Which encoder label embeddings are of. Groups, the tail's start and its basis come from them, so they belong to that encoder."""

import json
from pathlib import Path
from typing import Any

from haste_dist.config import Config
from haste_dist.errors import ConfigError


def embedder_of(config: Config) -> dict[str, Any] | None:
    """Of which encoder label embeddings are; None where they are of no encoder."""
    if config.groups.features != "encoder":
        return None
    if config.groups.encoder:
        from haste_dist.text_embedders import encoder_source  # transformers: slow to import

        return encoder_source(config).identity()
    return {name: getattr(config.encoder, name) for name in ("name", "layers", "pooling")}


def check_embedder(config: Config, groups_file: Path) -> None:
    """What the tail starts from, and its basis, must be of the encoder that is trained. Folders may differ: it may lie elsewhere here.

    Raises ConfigError.
    """
    if config.output.start != "centroids" and config.output.basis != "labels":
        return
    made, asked = json.loads(groups_file.read_text(encoding="utf-8")).get("encoder"), embedder_of(config)
    if made and asked and {**made, "name": Path(made["name"]).name} != {**asked, "name": Path(asked["name"]).name}:
        was, now = (", ".join(f"encoder.{name}={value}" for name, value in one.items()) for one in (made, asked))
        raise ConfigError(f"{groups_file}: label embeddings are of {was}, not of {now}; run haste prepare with these settings")
