"""New labels for a trained run (``haste labels add``): its label order goes on at the end, and no row that is there changes.

The new data are the old ones grown: the label file begins with the old labels, in their order. New labels take the free rows of the last
tail group and new groups behind it, close labels together. A new row starts as the mean of its nearest tail labels: their weights, spread
over all features, of which the row keeps those that its group reads. A new group reads the F features that weigh most for its labels.
Nearness is that of label embeddings, by the run's own encoder unless ``groups.encoder`` names another. The head stays as it is.

Of the checkpoint only the file of the last rank is written again, with the rows that were there as they were; all others are copied.

Letters: L labels, m new ones, k neighbours, U distinct neighbours, T groups, G group size, F fan-in, D features that the tail reads.
"""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from safetensors import safe_open
from torch import Tensor

from haste_dist import checkpoint
from haste_dist.bisection import matmul, take
from haste_dist.checkpoint import PIECE
from haste_dist.columns import text_parts
from haste_dist.config import Config, load_config
from haste_dist.errors import CheckpointError, ConfigError, DataError
from haste_dist.label_groups import (
    LABELS_FILE,
    ORDER_SCHEMA,
    WORK,
    LabelOrder,
    load_label_order,
    measure_closeness,
    order_settings,
    write_order,
)
from haste_dist.manifest import LABEL_SCHEMA, LABEL_TEXTS, Manifest, read_arrow
from haste_dist.mirror import local_copy
from haste_dist.new_run import Files, check_free, new_run
from haste_dist.packing import pack
from haste_dist.prepare import prepare
from haste_dist.storage import whole_address
from haste_dist.tensor_file import FileRecord, write_tensors
from haste_dist.verify import check_run_files, run_tail_width
from haste_dist.world import choose_device

NEW_STREAM = 5  # keeps the random streams of one seed apart
LAYER = ("group_size", "fan_in", "head_features", "tail_features", "basis", "bias")  # output.* that its rows are made by
SIMILAR_BYTES = 2**28  # similarities held at once


def add_labels(config: Config, run: Path, name: str, neighbours: int) -> int:
    """Prepares the grown data of ``config`` and writes its run folder from a checkpoint of ``run``; returns how many are new.

    Ray must be running. Raises ConfigError, DataError or CheckpointError; ``run`` is only read.
    """
    if load_label_order(run).groups == 0:
        raise ConfigError(
            f"{run}: has no tail (all its labels are in the dense head) that new labels could join; train a run on the grown data instead"
        )
    found = np.zeros((0, 0), np.int64)

    def order(config: Config, folder: Path, manifest: Manifest) -> None:
        nonlocal found
        found = extend_order(config, folder, manifest, run, neighbours)

    prepare(config, order)
    extend_run(config, run, name, found, local_copy(config.data.prepared))
    return len(found)


def extend_order(config: Config, folder: Path, manifest: Manifest, run: Path, neighbours: int) -> np.ndarray:
    """Gives a prepared folder the label order of ``run``, with the labels that the run lacks behind. Raises ConfigError, DataError.

    Returns (m, k) int64: the rows of the old tail whose labels are nearest to those of rows L, L + 1, ... of the new order.
    """
    from haste_dist.label_embeddings import embed_labels, remove_work

    old = load_label_order(run)
    table = read_arrow(folder / LABEL_TEXTS, LABEL_SCHEMA)
    _check_labels(run, old, folder, table)
    work = folder / WORK / "extension"
    device = choose_device(config.launch.device)
    groups = config.groups
    if groups.features == "encoder" and not groups.encoder:
        groups = dataclasses.replace(groups, encoder=str(run))
    vectors = torch.from_numpy(embed_labels(dataclasses.replace(config, groups=groups), folder, manifest, device, work).vectors)
    added = _place(vectors, old, len(table), config.run.seed, device)
    tail = old.label_of_row[old.head_rows : old.labels]
    found = old.head_rows + nearest(vectors, torch.from_numpy(added), torch.tensor(tail), neighbours, device).numpy()
    order = extended(old, added, table["frequency"].to_numpy())
    whole = torch.from_numpy(order.label_of_row[order.head_rows : order.labels])
    chance = whole[torch.randperm(len(whole), generator=torch.Generator().manual_seed(config.run.seed))]
    closeness = measure_closeness(vectors, whole, chance, order.group_size, device)
    write_order(folder, order, table["text"], closeness, {**order_settings(config, manifest), "extends": old.fingerprint})
    remove_work(folder / WORK)
    return found


def extended(old: LabelOrder, added: np.ndarray, frequency: np.ndarray) -> LabelOrder:
    """``old`` with the labels ``added`` in the rows behind its labels; ``frequency`` (L,) of all labels now. Pure."""
    real = np.concatenate([old.label_of_row[: old.labels], added])
    groups = -(-(len(real) - old.head_rows) // old.group_size)
    label_of_row = np.full(old.head_rows + groups * old.group_size, -1, np.int64)
    label_of_row[: len(real)] = real
    row_of_label = np.empty(len(real), np.int64)
    row_of_label[real] = np.arange(len(real))
    frequency_of_row = np.zeros(len(label_of_row), np.int64)
    frequency_of_row[: len(real)] = frequency[real]
    return dataclasses.replace(
        old,
        label_of_row=label_of_row,
        row_of_label=row_of_label,
        groups=groups,
        frequency_of_row=frequency_of_row,
        base=old.base or old.labels,
    )


def nearest(vectors_LD: Tensor, rows: Tensor, among: Tensor, count: int, device: torch.device) -> Tensor:
    """(m, k) int64 places in ``among`` of the vectors nearest to those of ``rows``, nearest first, k at most ``count``."""
    count = min(count, len(among))
    found = []
    for part in rows.split(1024):
        x_mD = take(vectors_LD, part, device)
        best_mk, place_mk = x_mD.new_zeros(len(part), 0, dtype=torch.float32), torch.zeros(len(part), 0, dtype=torch.int64, device=device)
        start = 0
        for others in among.split(max(count, SIMILAR_BYTES // (4 * len(part)))):
            similar = matmul(x_mD[None], take(vectors_LD, others, device).T[None])[0]
            value, at = similar.topk(min(count, len(others)), dim=1)
            joined = torch.cat([best_mk, value], 1)
            best_mk, chosen = joined.topk(min(count, joined.shape[1]), dim=1)
            place_mk = torch.cat([place_mk, at + start], 1).gather(1, chosen)
            start += len(others)
        found.append(place_mk.cpu())
    return torch.cat(found)


def _place(vectors: Tensor, old: LabelOrder, labels: int, seed: int, device: torch.device) -> np.ndarray:
    """(m,) the new labels in the order of their rows: the nearest to the last group's labels fill it up, the others are grouped."""
    new = torch.arange(old.labels, labels)
    free = min(old.rows - old.labels, len(new))
    if free:
        last = torch.tensor(old.label_of_row[old.rows - old.group_size : old.labels])
        centre_D = take(vectors, last, device).double().mean(0)
        near = (take(vectors, new, device).double() @ centre_D).argsort(descending=True, stable=True).cpu()
        filling, new = new[near[:free]], new[near[free:]].sort().values
    else:
        filling = new[:0]
    order = pack(vectors, new, old.group_size, seed=seed, devices=[device]) if len(new) else new
    return torch.cat([filling, order]).numpy()


def _check_labels(run: Path, old: LabelOrder, folder: Path, table: pa.Table) -> None:
    if len(table) <= old.labels:
        raise ConfigError(f"{folder}: has {len(table):,} labels, the run {run} has {old.labels:,} already; put the new ones behind the old")
    for at, texts in text_parts(read_arrow(run / LABELS_FILE, ORDER_SCHEMA)["text"], old.row_of_label):
        same = pc.equal(texts, table["text"][at]).to_numpy()
        if not same.all():
            first = int(np.flatnonzero(~same)[0])
            label, theirs = at.start + first, texts[first].as_py()[:60]
            raise DataError(
                f"{folder}: its label {label} is '{table['text'][label].as_py()[:60]}', that of {run} is '{theirs}'; "
                "old labels must come first, as they were"
            )


def check_words(config: Config, run: Path) -> None:
    """Nothing of ``run`` may be written over, nor what it has trained on be held out. Raises ConfigError."""
    if config.data.dev_fraction:
        raise ConfigError(
            f"data.dev_fraction={config.data.dev_fraction}: it would hold out texts that {run} has trained on; "
            "set data.dev_fraction=0 and evaluate on the test split"
        )
    old = load_config(run / "config.yaml")
    check_run_files(run)
    for name, mine, theirs in (
        ("run folder", config.run.folder, str(run)),
        ("data.source", config.data.source, old.data.source),
        ("data.prepared", config.data.prepared, old.data.prepared),
    ):
        if whole_address(mine) == whole_address(theirs):
            raise ConfigError(f"{name} {mine}: is that of the trained run; name another one for the grown data")
    for name in LAYER:
        mine, theirs = getattr(config.output, name), getattr(old.output, name)
        if mine != theirs:
            raise ConfigError(f"output.{name}={mine}: new labels join the layer of {run}, which has {theirs}; set it to that")
    check_free(config.run.folder)


def extend_run(config: Config, run: Path, name: str, found: np.ndarray, prepared: Path) -> Path:
    """Writes the run folder ``config.run.folder``: ``run`` with the order of ``prepared`` and its checkpoint ``name``, at step 0.

    Raises CheckpointError for a checkpoint that is damaged or cannot be written.
    """
    source = checkpoint.resolve(run / checkpoint.CHECKPOINTS, name)
    page = checkpoint.read_page(source)
    old, new = load_label_order(run), load_label_order(prepared)
    if page["label_order"] != old.fingerprint:
        raise CheckpointError(f"{source}: belongs to another label order than {run}'s")
    checkpoint.verify_files(source, page)
    records = {name: FileRecord(**record) for name, record in page["files"].items() if name != checkpoint.KEPT}
    with new_run(config, run, prepared, new.fingerprint, step=0) as (folder, files):
        last = _row_files(source, records)[-1][1]
        for file, record in records.items():
            if file != last:
                shutil.copyfile(source / file, folder / file)
                files[file] = record
        tensors, starts = _extend_rows(source, records, last, old, new, found, config)
        files[last] = write_tensors(folder / last, tensors, starts)
    return folder


def _row_files(source: Path, files: Files) -> list[tuple[int, str]]:
    """(first group, name) of the files of label rows, in the order of their groups."""
    found = []
    for name in (name for name in files if name.startswith("output")):
        with safe_open(source / name, framework="pt") as file:
            groups = file.get_slice("tail.weight").get_shape()[0]
            found.append((int((file.metadata() or {})["tail.weight"]), groups, name))
    return [(start, name) for start, _, name in sorted(found)]


def _extend_rows(
    source: Path, files: Files, last: str, old: LabelOrder, new: LabelOrder, found: np.ndarray, config: Config
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of the ``last`` file with the new rows, and its metadata."""
    unique, place_mk = np.unique(found, return_inverse=True)
    weight_UF, index_UF, bias_U = _gather(source, files, unique - old.head_rows, old.group_size)
    with safe_open(source / last, framework="pt") as file:
        tensors, starts = {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    width = run_tail_width(source.parent.parent)
    weight = _grown(tensors["tail.weight"], new.groups - old.groups)
    index = _grown(tensors["tail.index"], new.groups - old.groups)
    bias = _grown(tensors["tail.bias"], new.groups - old.groups) if "tail.bias" in tensors else None
    first_group = len(weight) - (new.groups - old.groups)  # of the new ones, in this file
    begin = first_group * old.group_size - (old.rows - old.labels)  # the first new row, in this file
    fan_in = weight.shape[2]
    place_mk = place_mk.reshape(found.shape)
    rows = np.arange(len(place_mk)) + begin
    generator = torch.Generator().manual_seed(config.run.seed * 64 + NEW_STREAM)
    for group in np.unique(rows // old.group_size):
        here = np.flatnonzero(rows // old.group_size == group)
        mean_gD = _mean_rows(place_mk[here], weight_UF, index_UF, width)
        if group >= first_group:
            ties = torch.rand(width, generator=generator) * 1e-12  # features that no neighbour reads are drawn at random
            index[group] = (mean_gD.abs().sum(0) + ties).topk(fan_in).indices.sort().values.to(index.dtype)
        slots = torch.from_numpy(rows[here] % old.group_size)
        weight[group, slots] = mean_gD[:, index[group].long()].to(weight.dtype)
        if bias is not None and bias_U is not None:
            bias[group, slots] = bias_U[torch.from_numpy(place_mk[here])].mean(1).to(bias.dtype)
    for name in ("tail.momentum", "tail.bias_momentum"):
        if name in tensors:
            tensors[name] = _grown(tensors[name], new.groups - old.groups)
            tensors[name].view(-1, *tensors[name].shape[2:])[begin:] = 0
    tensors |= {"tail.weight": weight, "tail.index": index} | ({} if bias is None else {"tail.bias": bias})
    return tensors, starts


def _gather(source: Path, files: Files, rows_U: np.ndarray, group_size: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Weights (U, F), features (U, F) and biases (U,) of rows of the tail (ascending), a piece of a file at a time."""
    weights, indices, biases = [], [], []
    for start, name in _row_files(source, files):
        with safe_open(source / name, framework="pt") as file:
            source_weight, source_index = file.get_slice("tail.weight"), file.get_slice("tail.index")
            groups, _, fan_in = source_weight.get_shape()
            step = max(1, PIECE // (4 * group_size * fan_in))
            for at in range(0, groups, step):
                stop = min(at + step, groups)
                low, high = np.searchsorted(rows_U, ((start + at) * group_size, (start + stop) * group_size))
                if low == high:
                    continue
                local = torch.from_numpy(rows_U[low:high] - (start + at) * group_size)
                weights.append(source_weight[at:stop].reshape(-1, fan_in)[local].float())
                indices.append(source_index[at:stop][local // group_size].long())
                if "tail.bias" in file.keys():  # noqa: SIM118
                    biases.append(file.get_slice("tail.bias")[at:stop].reshape(-1)[local].float())
    return torch.cat(weights), torch.cat(indices), torch.cat(biases) if biases else None


def _mean_rows(place_mk: np.ndarray, weight_UF: Tensor, index_UF: Tensor, width: int) -> Tensor:
    """(m, D) float32: the mean of each row's neighbours over all features."""
    place = torch.from_numpy(place_mk)
    mean_mD = torch.zeros(len(place), width)
    for at in range(place.shape[1]):
        mean_mD.scatter_add_(1, index_UF[place[:, at]], weight_UF[place[:, at]])
    return mean_mD / place.shape[1]


def _grown(tensor: Tensor, groups: int) -> Tensor:
    """The tensor with ``groups`` more groups of zeros."""
    return torch.cat([tensor, tensor.new_zeros(groups, *tensor.shape[1:])])
