"""``haste export``: a trained run as one folder that needs nothing else, neither the run nor its data, nor this package.

OUT/
  README.md            a model card: what it is, its metrics, how to use it
  predict.py           plain torch, no haste_dist
  model.json           what predict.py must know of the layer
  output.safetensors   head and tail: weights, biases, indices, in the precision they were trained in; no optimizer state
  encoder/             Hugging Face layout: config.json, model.safetensors, tokenizer; projection.safetensors where there is encoder.project
  dense.safetensors    on request: weight (labels, width) and bias in the order of label ids
  model.onnx           on request: the whole model, tokens in, a logit a label id out
  labels.arrow, groups.json, config.yaml, calibration.json (where there is one), checksums.json    for haste predict and haste verify
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from haste_dist import calibration, checkpoint, plain_predict
from haste_dist.checkpoint import ENCODER, load_rows
from haste_dist.classifier import Classifier, feature_slice
from haste_dist.config import ENCODER_FOLDER, Config, LaunchConfig, encoder_settings_of, load_config, save_config
from haste_dist.dense import dense_layer, write_onnx
from haste_dist.encoder import Encoder, build_encoder, load_tokenizer, merge_adapters
from haste_dist.errors import CheckpointError, DataError, HasteError
from haste_dist.label_groups import LabelOrder, copy_order, load_label_order
from haste_dist.runlog import read_events
from haste_dist.sealed import check_folder, read_checksums, seal_folder
from haste_dist.tensor_file import write_tensors
from haste_dist.verify import check_run_files

SCHEMA_VERSION = 1
PAGE, OUTPUT, WEIGHTS, PROJECTION = "model.json", "output.safetensors", "model.safetensors", "projection.safetensors"
TENSORS = ("head.weight", "head.bias", "tail.weight", "tail.index", "tail.bias")
AGAIN = "run haste export again"


def export(run: str | Path, out: str | Path, checkpoint_name: str = "best", form: str = "sparse") -> Path:
    """Writes ``out`` in one step from a checkpoint of ``run``; returns it. Raises HasteError; then nothing is left behind.

    ``form``: dense or onnx adds what dense.py makes, for few labels.
    """
    run, out = Path(run), Path(out)
    if not (run / "config.yaml").is_file() or is_export(run):
        raise CheckpointError(f"{run}: no run folder; haste train makes one")
    if out.exists():
        raise DataError(f"{out}: exists; name a folder that does not")
    check_run_files(run)
    config, order = load_config(run / "config.yaml"), load_label_order(run)
    found = checkpoint.resolve(run / checkpoint.CHECKPOINTS, checkpoint_name)
    page = checkpoint.read_page(found)
    checkpoint.verify_files(found, page)
    part = out.with_name(f".{out.name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        encoder = _write_encoder(part / ENCODER_FOLDER, config, run, load_file(found / ENCODER))
        tensors = _joined(found, page)
        write_tensors(part / OUTPUT, tensors, dict.fromkeys(tensors, "0"))
        copy_order(run, part)
        fitted = calibration.read_calibration(run, found.name)
        if fitted != calibration.Calibration():
            shutil.copyfile(run / calibration.FILE, part / calibration.FILE)
        shutil.copyfile(plain_predict.__file__, part / "predict.py")
        described = _describe(config, order, encoder.width)
        if form != "sparse":
            _write_dense(part, form, encoder, *dense_layer(tensors, described, order))
        (part / PAGE).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
        (part / "README.md").write_text(_card(run, described, config, page["state"]["step"], _scores(fitted, form)), encoding="utf-8")
        save_config(_portable(config), part / "config.yaml")
        seal_folder(part, (path.relative_to(part).as_posix() for path in part.rglob("*") if path.is_file()))
        os.replace(part, out)
    except OSError as error:
        raise DataError(f"{out}: cannot be written ({error.strerror or error}); free some space or name another folder") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return out


def is_export(folder: Path) -> bool:
    return (folder / PAGE).is_file()


def check_export(folder: Path) -> None:
    """Holds an exported folder against its checksums and version. Raises HasteError naming the first bad file."""
    read_checksums(folder, AGAIN)
    check_folder(folder, AGAIN)
    version = json.loads((folder / PAGE).read_text(encoding="utf-8"))["schema_version"]
    if version != SCHEMA_VERSION:
        raise HasteError(f"{folder / PAGE}: schema version {version}, this program reads {SCHEMA_VERSION}; {AGAIN}")


def fill_encoder(folder: Path, encoder: Encoder) -> None:
    """The weights of an exported folder's encoder. Raises CheckpointError."""
    with _fits(folder):
        encoder.model.load_state_dict(load_file(folder / ENCODER_FOLDER / WEIGHTS))
        if encoder.project is not None:
            encoder.project.load_state_dict(load_file(folder / ENCODER_FOLDER / PROJECTION))


def fill_labels(folder: Path, classifier: Classifier) -> None:
    """The rows of the classifier's shard, without momentum, from an exported folder. Raises CheckpointError."""
    with _fits(folder):
        load_rows(folder, {"files": read_checksums(folder, AGAIN)}, classifier)


@contextmanager
def _fits(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: does not fit its own settings ({str(error).splitlines()[0]}); {AGAIN}") from None


def _write_encoder(folder: Path, config: Config, run: Path, weights: dict[str, Tensor]) -> Encoder:
    settings = encoder_settings_of(config, run)
    tokenizer = load_tokenizer(settings)
    encoder = build_encoder(settings, len(tokenizer), int(tokenizer.pad_token_id), config.data.max_length, pretrained=False)
    try:
        encoder.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise CheckpointError(f"{run}: its encoder's weights do not fit its config.yaml ({reason})") from None
    if settings.lora_rank:
        merge_adapters(encoder.model)
    encoder.model.save_pretrained(folder, max_shard_size="1TB")  # type: ignore[operator]
    if encoder.project is not None:
        write_tensors(folder / PROJECTION, {"weight": encoder.project.weight.detach()}, {})
    tokenizer.save_pretrained(folder)
    return encoder


def _write_dense(folder: Path, form: str, encoder: Encoder, weight_LD: Tensor, bias_L: Tensor) -> None:
    if form == "onnx":
        write_onnx(folder / "model.onnx", encoder, weight_LD, bias_L)
    else:
        write_tensors(folder / "dense.safetensors", {"weight": weight_LD, "bias": bias_L})


def _joined(found: Path, page: dict[str, Any]) -> dict[str, Tensor]:
    """The label rows of all ranks' files, whole, in the dtype they have there."""
    parts: dict[str, list[tuple[int, Tensor]]] = {}
    for name in page["files"]:
        if name.startswith("output"):
            with safe_open(found / name, framework="pt") as file:
                for key, start in file.metadata().items():
                    if key in TENSORS:
                        parts.setdefault(key, []).append((int(start), file.get_tensor(key)))
    ordered = {
        key: sorted(pieces, key=lambda piece: (piece[0], len(piece[1]))) for key, pieces in parts.items()
    }  # an empty part goes first
    return {key: torch.cat([tensor for _, tensor in pieces]) for key, pieces in ordered.items()}


def _describe(config: Config, order: LabelOrder, width: int) -> dict[str, Any]:
    spans = {name: feature_slice(getattr(config.output, name), width) for name in ("head_features", "tail_features")}
    return {
        "schema_version": SCHEMA_VERSION,
        "labels": order.labels,
        "head_rows": order.head_rows,
        "groups": order.groups,
        "group_size": order.group_size,
        "fan_in": config.output.fan_in,
        "width": width,
        "max_length": config.data.max_length,
        "pooling": config.encoder.pooling,
        "project": config.encoder.project,
        "normalize": config.encoder.normalize,
        "basis": config.output.basis,
        **{name: [span.start, span.stop] for name, span in spans.items()},
    }


def _portable(config: Config) -> Config:
    """The settings without optimizer state, and without the paths, the cluster and the ranks that trained."""
    return dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, folder="."),
        checkpoint=dataclasses.replace(config.checkpoint, store=""),
        data=dataclasses.replace(config.data, source="", prepared=""),
        encoder=dataclasses.replace(config.encoder, name=ENCODER_FOLDER, tokenizer="", layers=0, lora_rank=0),
        output=dataclasses.replace(config.output, momentum=0.0),
        launch=LaunchConfig(),
    )


def _scores(fitted: calibration.Calibration, form: str) -> str:
    """What turns logits into scores: who runs the ONNX model must do it."""
    told = (
        "sigmoid(logit)" if fitted == calibration.Calibration() else "calibrated: sigmoid(scale * logit + offset), as in `calibration.json`"
    )
    return f"Scores are {told}{'; `model.onnx` gives logits' if form == 'onnx' else ''}."


def _card(run: Path, page: dict[str, Any], config: Config, step: int, scores: str) -> str:
    """The model card, with the metrics of the evaluation after ``step``, where there was one."""
    try:
        scored = [event for event in read_events(run) if event["event"] == "eval" and event["step"] == step]
    except DataError:
        scored = []
    metrics = "Not evaluated at this step.\n"
    if scored:
        names = [name for name in scored[-1] if "@" in name]
        metrics = f"On {scored[-1]['rows']:,} texts of the {scored[-1]['split']} split, percent:\n\n| metric | |\n|---|---|\n"
        metrics += "".join(f"| {name} | {100 * scored[-1][name]:.2f} |\n" for name in names)
    projected = " with a linear layer behind its pooling (`projection.safetensors`)" if config.encoder.project else ""
    base = "an encoder from scratch" if config.encoder.name == "scratch" else f"`{Path(config.encoder.name).name}`"
    return f"""---
library_name: haste_dist
pipeline_tag: text-classification
tags: [extreme-multi-label-classification]
---

# Extreme multi-label text classifier, {page["labels"]:,} labels

A text in, ranked labels out. The encoder started from {base}; {page["head_rows"]:,} frequent labels have dense rows,
the others stand in {page["groups"]:,} groups of {page["group_size"]} that read {page["fan_in"]} features of the embedding each (HASTE,
arXiv 2606.01117). Trained for {step:,} steps.

## Metrics

{metrics}
## Use

    haste predict . --text "a text"
    python predict.py "a text"

The second needs torch, transformers, safetensors and pyarrow only. `model.json` and `output.safetensors` are the output layer,
`encoder/` is a Hugging Face model{projected}, `labels.arrow` says which label a row is.
{scores}
`haste verify .` holds all against `checksums.json`.
"""
