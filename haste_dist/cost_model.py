"""How long a step takes on more GPUs than were measured: terms of compute, memory and network, fitted on a scaling study's points.

    head       H D N products, H D bytes, one constant            tail       R F N, R F N / G, R N, bytes of state, one constant
    encoder    operations, one constant, its gradients' exchange  optimizer  weights of a partition, all weights, their exchange
    gather, scatter   bytes / bandwidth + hops * latency          host       what no stage accounts for

Each part is fitted on its own measured time by non-negative least squares on relative errors: a coefficient is seconds a unit, never
below 0. The step is the sum of its parts. An exchange of V bytes over W ranks moves V (W - 1) / W through each rank and takes W - 1
hops (a ring). Between hosts, where nothing was measured, the bandwidth and latency are given, and said. With replicas of the labels
N and W of head, tail, gather and scatter are those of one, and the sum of the gradients over them is a part of its own.

Letters: W ranks, N texts of the global batch, D width, H head rows and R tail rows of a rank, F fan-in, G group size.
"""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls

from haste_dist.errors import DataError
from haste_dist.sharding import label_parts

SCHEMA_VERSION = 1
FILE = "cost_model.json"
PARTS = ("encoder", "gather", "head", "tail", "scatter", "optimizer")
STAGES_OF = {"encoder": ("forward", "backward"), **{part: (part,) for part in PARTS[1:]}}
FEWEST = 4  # points that a fit needs
RANGED = ("ranks", "labels_a_rank", "batch", "fan_in", "group", "tail_width", "tokens", "parameters")
FREE = ("ranks", "labels_a_rank")  # what the model is for: others than measured are extrapolated, else a note warns

# Data sheet of one 400 Gb/s network card a GPU; a hop through it. Assumed wherever ranks lie on several hosts.
BETWEEN_GB_S, BETWEEN_HOP_US, GPUS_A_HOST = 50.0, 10.0, 8


@dataclass(frozen=True)
class Load:
    """What one rank has to do in a step."""

    ranks: int
    labels: int
    batch: int
    tokens: int
    width: int
    head_rows: int  # H
    head_width: int
    tail_rows: int  # R
    tail_width: int
    fan_in: int
    group: int
    tail_bytes: float  # of state, read and written
    encoder_flops: float
    parameters: int  # that are trained
    partitioned: bool  # ZeRO 1 or 2
    x_bytes: int
    copies: int = 1  # replicas of the labels
    updates: float = 1.0  # of the encoder

    @property
    def shards(self) -> int:
        return self.ranks // self.copies

    @property
    def labels_a_rank(self) -> float:
        return self.labels / self.shards

    @property
    def rows(self) -> float:
        """Of the batch, that a rank's output layer sees."""
        return self.batch / self.copies


def load_of(
    *,
    labels: int,
    ranks: int,
    batch: int,
    tokens: int,
    width: int,
    head_rows: int,
    head_width: int,
    tail_width: int,
    fan_in: int,
    group: int,
    weight_bytes: int,
    momentum_bytes: int,
    x_bytes: int,
    encoder_flops: float,
    parameters: int,
    partitioned: bool,
    label_parallel: int = 0,
    accumulation: int = 1,
) -> Load:
    """``head_rows`` of all ranks; ``encoder_flops`` of all ranks a step; ``accumulation``: steps an update of the encoder."""
    groups, parts = -(-max(0, labels - head_rows) // group), label_parts(label_parallel, ranks)
    tail_rows = -(-groups // parts) * group
    tail_bytes = tail_rows * fan_in * (2 * (weight_bytes + momentum_bytes) + 2 / group)
    own_head = -(-head_rows // parts)
    return Load(
        ranks, labels, batch, tokens, width, own_head, head_width, tail_rows, tail_width, fan_in, group, tail_bytes,
        encoder_flops / ranks, parameters, partitioned, x_bytes, ranks // parts, 1 / accumulation,
    )  # fmt: skip


def load_of_row(row: Mapping[str, Any]) -> Load:
    """Of a measured row of a study."""
    cuda = row["device"] != "cpu"
    sizes = {"float32": 4, "bfloat16": 2, "float8": 1, "none": 0}
    weight = sizes.get(row["weight_dtype"], 2 if cuda else 4)
    x_bytes = sizes.get(row["precision"], 2 if cuda else 4)
    names = ("labels", "ranks", "batch", "tokens", "width", "head_rows", "head_width", "tail_width", "fan_in", "group")
    return load_of(
        **{name: row[name] for name in names},
        weight_bytes=weight,
        momentum_bytes=sizes.get(row["momentum_dtype"], max(weight, 2)),  # float8 weights have bfloat16 beside them
        x_bytes=x_bytes,
        encoder_flops=row["encoder_flops"] * row["ranks"],
        parameters=0 if row["frozen"] else row["encoder_parameters"],
        partitioned=row["zero"] > 0 or x_bytes == 2,
    )


def times_of_row(row: Mapping[str, Any]) -> dict[str, float]:
    """Measured seconds of each part and of the "step"; parts that did not run are 0."""
    parts = {part: sum(row[f"{name}_p50_ms"] or 0.0 for name in stages) / 1e3 for part, stages in STAGES_OF.items()}
    return {**parts, "step": row["p50_ms"] / 1e3}


@dataclass(frozen=True)
class Network:
    """Links between hosts; within a host the fit knows them."""

    gpus_a_host: int = GPUS_A_HOST
    gb_s: float = BETWEEN_GB_S  # of each GPU's card
    hop_us: float = BETWEEN_HOP_US


Features = dict[str, float]


def _exchange(ranks: int, size: float) -> Features:
    return {"bytes": size * (ranks - 1) / ranks, "hops": float(ranks - 1)}


def _encoder(load: Load) -> Features:
    return {"operations": load.encoder_flops, "constant": 1.0, **_exchange(load.ranks, 2.0 * load.x_bytes * load.parameters)}


def _gather(load: Load) -> Features:
    return {"constant": 1.0, **_exchange(load.shards, load.x_bytes * load.rows * load.width)}


def _scatter(load: Load) -> Features:
    return {"constant": 1.0, **_exchange(load.shards, 4.0 * load.rows * load.width)}


def _head(load: Load) -> Features:
    values = float(load.head_rows * load.head_width)
    return {"products": values * load.rows, "weights": values, "constant": float(load.head_rows > 0)}


def _tail(load: Load) -> Features:
    pairs = load.tail_rows * load.rows
    return {
        "products": pairs * load.fan_in,
        "gathered": pairs * load.fan_in / load.group,
        "logits": pairs,
        "state bytes": load.tail_bytes,
        "constant": float(load.tail_rows > 0),
    }


def _optimizer(load: Load) -> Features:
    weights, own = float(load.parameters), load.parameters / (load.ranks if load.partitioned else 1)
    exchanged = _exchange(load.ranks, load.x_bytes * weights if load.partitioned else 0.0)
    return {"own weights": own, "weights": weights, "constant": float(load.parameters > 0), **exchanged}


FEATURES: dict[str, Callable[[Load], Features]] = {
    "encoder": _encoder,
    "gather": _gather,
    "head": _head,
    "tail": _tail,
    "scatter": _scatter,
    "optimizer": _optimizer,
}


@dataclass(frozen=True)
class Prediction:
    """Seconds of a step, by part and in all, and what they rest on that was not measured."""

    parts: dict[str, float]
    step: float
    notes: tuple[str, ...]


@dataclass(frozen=True)
class CostModel:
    """Seconds a unit of each term on ``device``, where the points came from, and how far off it was on points it had not seen."""

    device: str
    coefficients: dict[str, dict[str, float]]
    host: float  # seconds
    points: int
    ranges: dict[str, list[float]]  # smallest and largest value of what was measured
    errors: dict[str, dict[str, float]]
    stamp: dict[str, str] = dataclasses.field(default_factory=dict)

    def predict(self, load: Load, network: Network | None = None) -> Prediction:
        network = network or Network()
        parts = {}
        for part in PARTS:
            features, seconds = FEATURES[part](load), dict(self.coefficients[part])
            among = load.shards if part in ("gather", "scatter") else load.ranks
            if among > network.gpus_a_host and "bytes" in seconds:
                # A host's cards work side by side; a ring is as fast as its slowest link.
                seconds["bytes"] = max(seconds["bytes"], 1 / (network.gb_s * 1e9 * network.gpus_a_host))
                seconds["hops"] = max(seconds["hops"], network.hop_us * 1e-6)
            parts[part] = sum(seconds[name] * value for name, value in features.items())
        parts["optimizer"] *= load.updates
        if load.copies > 1:
            parts["replicas"] = self._sum_over_replicas(load, network)
        return Prediction(parts, sum(parts.values()) + self.host, tuple(self._notes(load, network)))

    def _sum_over_replicas(self, load: Load, network: Network) -> float:
        """An all-reduce of the rank's weights in float32: twice a scatter's way, each shard's ring by the cards of its own ranks."""
        seconds = self.coefficients["scatter"]
        a_byte, a_hop = seconds["bytes"], seconds["hops"]
        if load.ranks > network.gpus_a_host:
            a_byte, a_hop = max(a_byte, 1 / (network.gb_s * 1e9)), max(a_hop, network.hop_us * 1e-6)
        moved = _exchange(load.copies, 4.0 * (load.head_rows * load.head_width + load.tail_rows * load.fan_in))
        return 2 * (a_byte * moved["bytes"] + a_hop * moved["hops"])

    def _notes(self, load: Load, network: Network) -> list[str]:
        notes = []
        for name in RANGED:
            low, high = self.ranges[name]
            value = getattr(load, name)
            if not low <= value <= high:
                how = "extrapolated" if name in FREE else "not measured, so this may be far off"
                measured = f"{low:,.6g}" if low == high else f"{low:,.6g} to {high:,.6g}"
                notes.append(f"{name.replace('_', ' ')} {value:,.6g}: {how} (measured: {measured})")
        if load.ranks > network.gpus_a_host:
            notes.append(f"between hosts of {network.gpus_a_host}: {network.gb_s:g} GB/s a GPU and {network.hop_us:g} us a hop are assumed")
        if load.copies > 1:
            notes.append(f"{load.copies} replicas: summing their gradients is taken to go as the scatter does, the update is left out")
        if self.ranges["ranks"][1] == 1 and load.ranks > 1:
            notes.append("no point had several ranks: what they exchange within a host counts nothing")
        return notes

    def assumptions(self, network: Network | None = None) -> list[str]:
        """What every prediction rests on, to be printed beside it."""
        network = network or Network()
        return [
            f"fitted on {self.points} points of {self.device}, of {_span(self.ranges['ranks'])} ranks and "
            f"{_span(self.ranges['labels_a_rank'])} labels a rank",
            "every rank has the same share of labels, positives and texts; the parts of a step do not overlap",
            "exchanges run as rings: (W - 1) / W of the bytes through each rank, W - 1 hops",
            f"beyond {network.gpus_a_host} GPUs a host: {network.gb_s:g} GB/s a GPU and {network.hop_us:g} us a hop, of data sheets, "
            "not measured",
            "evaluation, checkpoints, rewiring and waiting for data are not in a step",
        ]

    def save(self, path: Path) -> None:
        page = {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(self), "assumptions": self.assumptions()}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(page, indent=1) + "\n", encoding="utf-8")


def load_model(path: Path) -> CostModel:
    """What ``save`` wrote. Raises DataError."""
    try:
        page = json.loads(path.read_text(encoding="utf-8"))
        if page.pop("schema_version") != SCHEMA_VERSION:
            raise ValueError("of another version")
        page.pop("assumptions")
        return CostModel(**page)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file; haste scale writes one") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: no cost model ({error}); run haste scale again") from None


def kept_path(device: str) -> Path:
    """Where a device's model is kept on this machine: in $HASTE_CACHE, else $XDG_CACHE_HOME/haste_dist, else ~/.cache/haste_dist."""
    cache = os.environ.get("HASTE_CACHE")
    folder = Path(cache) if cache else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "haste_dist"
    return folder / f"cost_model-{device.lower().replace(' ', '-')}.json"


def fit(rows: Sequence[Mapping[str, Any]], stamp: Mapping[str, str] | None = None) -> CostModel:
    """A model of one device's measured rows. Raises ValueError for fewer than FEWEST.

    Its errors are of the step, relative: "left out" each point, predicted by a fit of all others; "largest left out" the points of the
    most labels a rank, and those of the most ranks, predicted by a fit of the smaller ones. A part is absent that leaves too few.
    """
    loads, times = [load_of_row(row) for row in rows], [times_of_row(row) for row in rows]
    if len(rows) < FEWEST:
        raise ValueError(f"{len(rows)} points; a fit needs {FEWEST}")
    everything = list(range(len(rows)))
    errors = {"fitted": _errors(loads, times, everything, everything)}
    if len(rows) > FEWEST:
        apart = [_relative(loads, times, [j for j in everything if j != i], i) for i in everything]
        errors["left out"] = _summary(apart)
    for name in FREE:
        largest = max(getattr(load, name) for load in loads)
        inside = [i for i in everything if getattr(loads[i], name) < 0.99 * largest]
        outside = [i for i in everything if i not in inside]
        if len(inside) >= FEWEST:
            errors[f"largest {name.replace('_', ' ')} left out"] = _errors(loads, times, inside, outside)
    coefficients, host = _fit(loads, times)
    ranges = {name: [float(min(getattr(x, name) for x in loads)), float(max(getattr(x, name) for x in loads))] for name in RANGED}
    return CostModel(rows[0]["device"], coefficients, host, len(rows), ranges, errors, dict(stamp or {}))


def _fit(loads: Sequence[Load], times: Sequence[Mapping[str, float]]) -> tuple[dict[str, dict[str, float]], float]:
    coefficients = {}
    for part in PARTS:
        table = [FEATURES[part](load) for load in loads]
        names = list(table[0])
        measured = np.array([time[part] for time in times])
        ran = measured > 0
        a = np.array([[row[name] for name in names] for row in table])[ran]
        seconds = np.zeros(len(names))
        if ran.any():
            a /= measured[ran, None]
            scale = np.maximum(a.max(0), 1e-300)  # columns of one size, or least squares cannot see the small ones
            seconds = nnls(a / scale, np.ones(len(a)))[0] / scale
        coefficients[part] = dict(zip(names, seconds.tolist(), strict=True))
    unaccounted = [time["step"] - sum(time[part] for part in PARTS) for time in times]
    return coefficients, max(0.0, float(np.median(unaccounted)))


def _relative(loads: Sequence[Load], times: Sequence[Mapping[str, float]], known: Sequence[int], asked: int) -> float:
    coefficients, host = _fit([loads[i] for i in known], [times[i] for i in known])
    predicted = host + sum(coefficients[p][name] * value for p in PARTS for name, value in FEATURES[p](loads[asked]).items())
    return predicted / times[asked]["step"] - 1


def _errors(loads: Sequence[Load], times: Sequence[Mapping[str, float]], known: Sequence[int], asked: Sequence[int]) -> dict[str, float]:
    return _summary([_relative(loads, times, known, i) for i in asked])


def _summary(errors: Sequence[float]) -> dict[str, float]:
    sizes = np.abs(errors)
    return {"points": float(len(sizes)), "median": float(np.median(sizes)), "most": float(sizes.max())}


def _span(values: Sequence[float]) -> str:
    low, high = values
    return f"{low:,.6g}" if low == high else f"{low:,.6g} to {high:,.6g}"
