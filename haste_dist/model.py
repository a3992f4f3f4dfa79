"""What training, evaluation and prediction build from a config: the prepared data, the encoder and this rank's label rows."""

import dataclasses
import filecmp
import math
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from haste_dist.classifier import KERNELS, Classifier, check_slice, embedding_width, feature_slice
from haste_dist.config import ENCODER_FOLDER, Config, check_fan_in, load_config, save_config
from haste_dist.encoder import Encoder, build_encoder, load_tokenizer, model_config, tokenizer_fingerprint
from haste_dist.engine import EncoderEngine
from haste_dist.errors import ConfigError, DataError, HasteError
from haste_dist.label_groups import LabelOrder, copy_order, head_size, load_label_order
from haste_dist.manifest import Manifest, read_manifest
from haste_dist.mirror import local_copy
from haste_dist.replicas import summed_over
from haste_dist.sealed import CHECKSUMS
from haste_dist.sharding import label_shard
from haste_dist.verify import CONFIG, seal_run
from haste_dist.world import World

LASTING = ("data", "encoder", "output", "rewire", "train")  # parts of a page that a run's weights come from
PASSING = {"data": "prepared source workers", "encoder": "name tokenizer", "output": "start bias_init", "train": "max_steps profile"}
"""Settings in them that may be others each time: where files lie, how it began, how long this call goes on."""


@dataclass
class Prepared:
    """A prepared folder that was checked against a config."""

    folder: Path
    manifest: Manifest
    order: LabelOrder


def open_prepared(config: Config) -> Prepared:
    """Opens ``data.prepared`` and checks that it was made for this config. Raises ConfigError or DataError."""
    folder = local_copy(config.data.prepared)
    manifest = read_manifest(folder)
    order = load_label_order(folder)
    made = tokenizer_fingerprint(load_tokenizer(config.encoder))
    if made != manifest.tokenizer.fingerprint:
        raise DataError(
            f"{folder}: was tokenised with '{manifest.tokenizer.name}', whose rules differ from those of "
            f"'{config.encoder.tokenizer or config.encoder.name}'; run haste prepare again or set encoder.tokenizer"
        )
    if manifest.max_length != config.data.max_length:
        raise DataError(
            f"{folder}: texts were cut to {manifest.max_length} tokens, data.max_length={config.data.max_length}; run haste prepare again"
        )
    wanted = (config.output.group_size, head_size(order.base or order.labels, config.output.head_fraction, config.output.group_size))
    if wanted != (order.group_size, order.head_rows):
        raise ConfigError(
            f"{folder}: its label order has groups of {order.group_size} and {order.head_rows} head rows, this config asks for "
            f"groups of {wanted[0]} and {wanted[1]} head rows; run haste prepare again with it"
        )
    return Prepared(folder, manifest, order)


def check_features(config: Config, manifest: Manifest) -> int:
    """The embedding's width, which slices and fan-in must fit; from its configuration, without its weights. Raises ConfigError."""
    tokenizer = manifest.tokenizer
    width = model_config(config.encoder, tokenizer.vocab_size, tokenizer.pad_id, config.data.max_length).hidden_size
    width = embedding_width(config.encoder, width)
    for name in ("head_features", "tail_features"):
        check_slice(name, feature_slice(getattr(config.output, name), width), width)
    check_fan_in(config.output.fan_in, feature_slice(config.output.tail_features, width).width)
    return width


def make_encoder(config: Config, manifest: Manifest, pretrained: bool = True) -> Encoder:
    """The encoder on the CPU, its scratch weights drawn from ``run.seed``, the same on each rank. Raises ConfigError."""
    torch.manual_seed(config.run.seed)
    tokenizer = manifest.tokenizer
    return build_encoder(config.encoder, tokenizer.vocab_size, tokenizer.pad_id, config.data.max_length, pretrained)


def make_classifier(config: Config, order: LabelOrder, width: int, world: World, drawn: bool = True) -> Classifier:
    """This rank's share of the output layer, with initial weights, or none where it is not ``drawn`` but will be loaded."""
    shards, copies = world.shards, world.copies
    shard = label_shard(order.head_rows, order.groups, order.group_size, order.labels, shards.size, shards.rank)
    steps = summed_over(copies) if copies.size > 1 else KERNELS
    return Classifier(config.output, shard, width, config.run.seed, world.device, steps, order.basis, drawn)


def prior_bias(config: Config, manifest: Manifest) -> float:
    """Where biases start: what all labels of an untrained layer should answer, so that its first steps are not spent on saying no.

    Without it the first updates push every label far down, and labels with few texts never come back.
    """
    if config.output.bias_init is not None:
        return config.output.bias_init
    if config.output.loss == "squared_hinge":
        return -1.0
    split = manifest.splits["train"]
    share = split.positives / (split.rows * manifest.labels)
    return math.log(share / (1 - share)) if 0 < share < 1 else 0.0


def save_run_files(run: Path, config: Config, encoder: Encoder, prepared: Path) -> None:
    """Writes what a run holds besides checkpoints and logs: settings, label order, encoder configuration, tokenizer, and their checksums.

    All is made aside, and only what differs takes its place, file by file: a process killed here leaves what was there.
    """
    made = run / ".files"
    shutil.rmtree(made, ignore_errors=True)
    (made / ENCODER_FOLDER).mkdir(parents=True)
    save_config(config, made / CONFIG)
    encoder.model.config.save_pretrained(made / ENCODER_FOLDER)  # type: ignore[union-attr, operator]
    load_tokenizer(config.encoder).save_pretrained(made / ENCODER_FOLDER)
    copy_order(prepared, made)  # predict needs no prepared folder
    seal_run(made)
    (run / ENCODER_FOLDER).mkdir(exist_ok=True)
    for path in sorted(made.rglob("*"), key=lambda path: path.name == CHECKSUMS):
        place = run / path.relative_to(made)
        if path.is_file() and not (place.is_file() and filecmp.cmp(path, place, shallow=False)):
            os.replace(path, place)
    shutil.rmtree(made)


def changed_settings(run: Path, config: Config) -> list[str]:
    """What ``config`` sets otherwise than the page that the run folder holds, of what can change its weights or its schedule."""
    try:
        before = dataclasses.asdict(load_config(run / CONFIG))
    except HasteError:  # of another version, or none
        return []
    now = dataclasses.asdict(config)
    return [
        f"{part}.{name}={value} (was {before[part][name]})"
        for part in LASTING
        for name, value in now[part].items()
        if value != before[part][name] and name not in PASSING.get(part, "").split()
    ]


def frozen_engine(config: Config, encoder: Encoder, world: World) -> EncoderEngine:
    """The encoder for scoring only: no optimizer, and no compiling for a few batches."""
    return EncoderEngine(encoder, dataclasses.replace(config.encoder, frozen=True, compile=False), world)
