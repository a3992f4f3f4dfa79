"""One model whose weights are the mean of several runs' (``haste average``): a model soup, arXiv 2203.05482.

Runs that start from the same weights and differ in their seed alone (order of texts, dropout) end close enough to each other that the mean
of their weights is a model too, and about as good as the mean of their answers, at the cost of one. In the sparse tail that holds where
groups read much the same features in all runs, as with output.start=centroids; of those that not all have, the mean keeps the F in which it
is largest. Runs with less than half of their features in common are refused. So are runs with a weight matrix of the encoder that has
nothing in common, such as one that was drawn by each seed anew: it has no mean.

Label rows are averaged in float32, a shard at a time, and rounded to the nearest value that is kept. Checkpoints of one run can be averaged
too: a run is named by its folder or by that of one of its checkpoints.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from haste_dist.checkpoint import ENCODER, OPTIMIZER, STEP_NAME, read_page, rows_file, step_of, verify_files
from haste_dist.classifier import Classifier
from haste_dist.config import OutputConfig, load_config
from haste_dist.errors import CheckpointError, ConfigError
from haste_dist.export import is_export
from haste_dist.new_run import check_free, new_run
from haste_dist.predictor import ModelFiles
from haste_dist.runlog import RunLog
from haste_dist.storage import whole_address
from haste_dist.tensor_file import FileRecord, write_tensors
from haste_kernels import STORED, TailState

ALIKE = {
    "encoder": ("pooling", "project", "normalize"),
    "output": ("group_size", "fan_in", "head_features", "tail_features", "basis", "bias"),
}
"""Settings without which two runs' weights do not mean the same."""
COMMON = 0.1  # cosine of two runs' weights in a matrix: those of one start keep most of it, of two starts it is 1 / sqrt(numbers)
SHARD_BYTES = 2**30  # of label rows as they are kept, averaged at once
LEAST_SHARED = 0.5  # of the features of two runs
GROUPS = 256  # averaged at once where features differ
NUMBERS = 4096  # in a matrix that is looked at: of fewer the cosine of two starts may be large by chance


def average_runs(new: str | Path, runs: Sequence[str | Path], name: str = "best", dtype: str = "") -> Path:
    """Writes the run folder ``new``: the mean of the checkpoints ``name`` of ``runs``; returns its checkpoint. ``runs`` are only read; one
    that is a checkpoint's folder is that checkpoint.

    Settings and steps are the first run's, without optimizer state. ``dtype``: what weights of labels are kept in (float32, bfloat16,
    float8; empty: as in the first run). Where the runs held out different texts there is no dev split.

    Raises HasteError; then nothing is left behind.
    """
    folders = [Path(run) for run in runs]
    if len({whole_address(str(run)) for run in (*folders, Path(new))}) < len(folders) + 1 or len(folders) < 2:
        raise ConfigError("haste average takes the folder to write and two runs or more, each once")
    check_free(new)
    models = [_model(run, name) for run in folders]
    for model in models[1:]:
        _check_alike(models[0], model)
    first, places = models[0].folder, [_place(model) for model in models]
    config = load_config(first / "config.yaml")
    config.run.folder, config.checkpoint.store, config.launch.address = str(new), "", ""  # the store and the cluster are the first run's
    if len({(model.config.data.dev_fraction, model.config.run.seed) for model in models}) > 1 and config.data.dev_fraction:
        # What one held out another has trained on.
        config.data.dev_fraction, config.evaluate.split = 0.0, "test"
    config.output.weight_dtype = dtype or config.output.weight_dtype
    kept = config.output if config.output.weight_dtype != "auto" else dataclasses.replace(config.output, weight_dtype=_stored(places[0]))
    step = step_of(places[0])
    for place in places:  # once, for all shards
        page = read_page(place)
        verify_files(place, page, [name for name in page["files"] if name == ENCODER or name.startswith("output")])
    with new_run(config, first, first, models[0].order.fingerprint, step) as (folder, files):
        files[ENCODER] = _write_encoder(folder / ENCODER, places)
        files[OPTIMIZER] = write_tensors(folder / OPTIMIZER, {})
        sizes = [record["bytes"] for name, record in read_page(places[0])["files"].items() if name.startswith("output")]
        parts = max(len(sizes), -(-sum(sizes) // SHARD_BYTES))
        for part in range(parts):
            name = rows_file(part, parts)
            files[name] = _write_labels(folder / name, kept, models, part, parts)
    with RunLog(new) as log:
        log.event("average", step=step, checkpoints=[str(place) for place in places])
    return folder


def _model(run: Path, name: str) -> ModelFiles:
    if is_export(run):
        raise ConfigError(f"{run}: was exported; name the run that haste train wrote")
    if STEP_NAME.fullmatch(run.name):
        return ModelFiles(run.parent.parent, run.name)
    return ModelFiles(run, name)


def _place(model: ModelFiles) -> Path:
    assert model.checkpoint is not None
    return model.checkpoint


def _check_alike(first: ModelFiles, other: ModelFiles) -> None:
    """Raises ConfigError, which names what differs."""
    for part, names in ALIKE.items():
        for name in names:
            a, b = (getattr(getattr(model.config, part), name) for model in (first, other))
            if a != b:
                raise ConfigError(f"{other.folder}: {part}.{name}={b}, in {first.folder} it is {a}; average runs that differ in their seed")
    if first.order.fingerprint != other.order.fingerprint:
        raise ConfigError(f"{other.folder}: has another label order than {first.folder}; average runs of the same prepared folder")


def _write_encoder(path: Path, places: list[Path]) -> FileRecord:
    """The mean of the encoders' float32 weights. Raises CheckpointError, and ConfigError for those that have none."""
    files = [safe_open(place / ENCODER, framework="pt") for place in places]
    names = set(files[0].keys())
    mean: dict[str, Tensor] = {}
    for place, file in zip(places[1:], files[1:], strict=True):
        if set(file.keys()) != names:
            raise CheckpointError(f"{place / ENCODER}: holds other weights than {places[0] / ENCODER}; average runs of one encoder")
    for name in sorted(names):
        first, *others = (file.get_tensor(name) for file in files)
        for place, other in zip(places[1:], others, strict=True):
            _check_common(name, first, other, places[0], place)
        mean[name] = torch.stack([first, *others]).double().mean(0).to(first.dtype)
    return write_tensors(path, mean)


def _check_common(name: str, first: Tensor, other: Tensor, place: Path, other_place: Path) -> None:
    if first.shape != other.shape:
        raise CheckpointError(f"{other_place / ENCODER}: {name} is {tuple(other.shape)}, in {place / ENCODER} {tuple(first.shape)}")
    if first.ndim < 2 or first.numel() < NUMBERS:
        return
    cosine = float(torch.nn.functional.cosine_similarity(first.double().flatten(), other.double().flatten(), 0))
    if not cosine >= COMMON:
        raise ConfigError(
            f"{other_place}: its {name} has nothing in common with that of {place} (cosine {cosine:.2f}), so there is no mean; "
            "average runs that started from one pretrained encoder and differ in their seed"
        )


def _write_labels(path: Path, output: OutputConfig, models: list[ModelFiles], part: int, parts: int) -> FileRecord:
    """A shard of the label rows, and where the settings have momentum one of zeros. Raises ConfigError for runs without a mean."""
    shards = [model.labels("cpu", part, parts, verified=True) for model in models]
    first, width = shards[0], shards[0].tail_slice.width
    for model, one in zip(models[1:], shards[1:], strict=True):
        if (shared := _in_common(first.tail.index, one.tail.index, width)) < LEAST_SHARED:
            raise ConfigError(
                f"{model.folder}: its groups read other features than those of {models[0].folder} ({shared:.0%} in common), so the weights "
                "have no mean; train the runs with output.start=centroids, and rewire.interval=0 or rewire.grow=embeddings"
            )
    alike = all(torch.equal(one.tail.index, first.tail.index) for one in shards[1:])
    mean = Classifier(output, first.shard, first.width, first.seed, first.device, basis=models[0].order.basis, drawn=False)
    every = [{name: tensor for name, (tensor, _) in one.tensors().items()} for one in shards]
    apart = {"tail.index"} if alike else {"tail.index", "tail.weight"}
    for name, (tensor, _) in mean.tensors().items():
        if name in every[0] and name not in apart:  # momentum is not in the first
            tensor.copy_(sum((one[name].float() for one in every), torch.zeros(())) / len(models))
    if alike:
        mean.tail.index.copy_(first.tail.index)
    else:
        _mean_of_tails(mean.tail, [one.tail for one in shards], width)
    found = mean.tensors()
    return write_tensors(path, {name: tensor for name, (tensor, _) in found.items()}, {name: str(at) for name, (_, at) in found.items()})


def _in_common(one_TF: Tensor, other_TF: Tensor, width: int) -> float:
    """What part of their features two tails share; 1 without a group."""
    if not len(one_TF):
        return 1.0
    shared = 0
    for start in range(0, len(one_TF), GROUPS):
        one, other = (index[start : start + GROUPS].long() for index in (one_TF, other_TF))
        shared += int(torch.zeros(len(one), width, dtype=torch.bool).scatter_(1, one, True).gather(1, other).sum())
    return shared / one_TF.numel()


def _mean_of_tails(mean: TailState, tails: list[TailState], width: int) -> None:
    """Sets features and weights of ``mean``: of all features that a group reads in some tail, those in which the mean is largest."""
    groups, size, fan_in = mean.weight.shape
    for start in range(0, groups, GROUPS):
        stop = min(start + GROUPS, groups)
        whole_TGM = torch.zeros(stop - start, size, width)
        for tail in tails:
            at_TGF = tail.index[start:stop, None].long().expand(-1, size, -1)
            whole_TGM.scatter_add_(2, at_TGF, tail.weight[start:stop].float() / len(tails))
        order = whole_TGM.square().sum(1).sort(dim=1, descending=True, stable=True).indices
        index_TF = order[:, :fan_in].sort(dim=1).values
        mean.index[start:stop] = index_TF.to(mean.index)
        mean.weight[start:stop] = whole_TGM.gather(2, index_TF[:, None].expand(-1, size, -1)).to(mean.weight)


def _stored(place: Path) -> str:
    """What a checkpoint keeps weights of labels in: a name of STORED."""
    name = next(name for name in read_page(place)["files"] if name.startswith("output"))
    with safe_open(place / name, framework="pt") as file:
        dtype = file.get_slice("head.weight")[:0].dtype
    return next(name for name, one in STORED.items() if one == dtype)
