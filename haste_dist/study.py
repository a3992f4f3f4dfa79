"""What a scaling study measures and where it keeps it: points, and one row a measured point in ``study.parquet``.

The file is replaced whole after every point, so a killed study loses at most the point it was measuring, and a rerun skips what is there.

Letters: L labels, W ranks, N texts of the global batch, F fan-in, G group size.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from haste_dist.config import Config
from haste_dist.errors import DataError
from haste_dist.label_groups import head_size
from haste_dist.manifest import replacing
from haste_dist.meters import STAGES
from haste_dist.records import append_record
from haste_dist.synthetic import LabelLaw

FILE = "study.parquet"
QUANTILES = ("p20", "p50", "p80")
Row = dict[str, Any]


@dataclass(frozen=True)
class Point:
    """One configuration to measure, beside what the config says."""

    labels: int
    ranks: int
    batch: int
    fan_in: int
    group: int

    def config(self, config: Config) -> Config:
        """The config with this point's numbers in it."""
        output = dataclasses.replace(config.output, fan_in=self.fan_in, group_size=self.group)
        train = dataclasses.replace(config.train, batch_size=self.batch, accumulation=1)
        launch = dataclasses.replace(config.launch, ranks=self.ranks)
        return dataclasses.replace(config, output=output, train=train, launch=launch)

    def head_rows(self, config: Config) -> int:
        return head_size(self.labels, config.output.head_fraction, self.group)

    def key(self, config: Config, law: LabelLaw) -> Row:
        """All that the figures of a device depend on: the columns that tell rows apart."""
        encoder, output = config.encoder, config.output
        return {
            **dataclasses.asdict(self),
            "head_rows": self.head_rows(config),
            "tokens": config.data.max_length,
            "encoder": encoder.name,
            "encoder_width": encoder.width if encoder.name == "scratch" else 0,
            "encoder_layers": encoder.layers,
            "frozen": encoder.frozen,
            "checkpointing": encoder.checkpointing,
            "compiled": encoder.compile,
            "fused": encoder.fused,
            "graphs": encoder.graphs,
            "zero": encoder.zero,
            "precision": encoder.precision,
            "attention": encoder.attention,
            "pooling": encoder.pooling,
            "weight_dtype": output.weight_dtype,
            "momentum_dtype": output.momentum_dtype if output.momentum else "none",
            "bias": output.bias,
            "loss": output.loss,
            **dataclasses.asdict(law),
        }


_INTS = ("labels", "ranks", "batch", "fan_in", "group", "head_rows", "tokens", "encoder_width", "encoder_layers", "zero")
_FLOATS = ("exponent", "shift", "positives")
_TEXTS = ("encoder", "precision", "attention", "pooling", "weight_dtype", "momentum_dtype", "loss")
_BOOLS = ("frozen", "checkpointing", "compiled", "fused", "graphs", "bias")
KEYS = (*_INTS, *_FLOATS, *_TEXTS, *_BOOLS, "device")
# What is measured, or known only when the encoder stands; null in a row whose ``note`` says why nothing was measured.
_COUNTS = ("width", "head_width", "tail_width", "encoder_parameters", "gpus_a_host", "steps")
_FIGURES = (
    *(f"{q}_ms" for q in QUANTILES),
    *(f"{part}_{q}_ms" for part in STAGES for q in QUANTILES),
    *("samples_per_s", "tokens_per_s", "encoder_mfu", "encoder_flops", "peak_gib", "start_gib", "state_gib", "planned_gib", "rewire_ms"),
    *("encoder_only_ms", "topk_ms", "loss_first", "loss_last"),
)
_STAMPS = ("note", "haste", "torch", "triton", "deepspeed", "commit", "date")
SCHEMA = pa.schema(
    [(name, pa.int64()) for name in _INTS]
    + [(name, pa.float64()) for name in _FLOATS]
    + [(name, pa.string()) for name in _TEXTS]
    + [(name, pa.bool_()) for name in _BOOLS]
    + [("device", pa.string())]
    + [(name, pa.int64()) for name in _COUNTS]
    + [(name, pa.float64()) for name in _FIGURES]
    + [(name, pa.string()) for name in _STAMPS]
)


def read_study(folder: str | Path) -> list[Row]:
    """The rows of a study folder, in the order measured; none where there is no study yet. Raises DataError for a damaged file."""
    path = Path(folder) / FILE
    if not path.exists():
        return []
    try:
        return pq.read_table(path, schema=SCHEMA).to_pylist()
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        raise DataError(f"{path}: no study that this version can read ({str(error).splitlines()[0]}); choose another --out") from None


def add_row(folder: str | Path, row: Row) -> None:
    """Adds a row; columns that it does not have are null."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    unknown = set(row) - set(SCHEMA.names)
    if unknown:
        raise ValueError(f"no column {sorted(unknown)[0]}")
    rows = [*read_study(folder), {name: row.get(name) for name in SCHEMA.names}]
    with replacing(folder / FILE) as file:
        pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), file)


def missing(points: Iterable[Point], rows: Sequence[Row], config: Config, law: LabelLaw, device: str) -> list[Point]:
    """The points that no row is about, on this device."""
    done = {tuple(row[name] for name in KEYS) for row in rows}
    return [point for point in points if tuple({**point.key(config, law), "device": device}[name] for name in KEYS) not in done]


def of_page(rows: Sequence[Row], config: Config, law: LabelLaw) -> list[Row]:
    """The rows that differ in their points alone: whose encoder, types and labels' law are those of ``config``."""
    point = Point(1, 1, 1, 1, 1)
    page = {name: value for name, value in point.key(config, law).items() if name not in (*dataclasses.asdict(point), "head_rows")}
    return [row for row in rows if all(row[name] == value for name, value in page.items())]


def measured(rows: Sequence[Row]) -> list[Row]:
    """The rows that have figures."""
    return [row for row in rows if not row["note"]]


@dataclass(frozen=True)
class Efficiency:
    """How a point fares against one rank: of the whole step, and of the output layer with what it exchanges."""

    row: Row
    base: Row
    step: float
    layer: float


def weak_scaling(rows: Sequence[Row]) -> list[Efficiency]:
    """Points of several ranks beside one rank with the same labels a rank and the same global batch: time at 1 over time at W."""
    return _against_one_rank(rows, lambda row: row["labels"] // row["ranks"] if row["labels"] % row["ranks"] == 0 else None, 1)


def strong_scaling(rows: Sequence[Row]) -> list[Efficiency]:
    """Points of several ranks beside one rank with the same labels and the same global batch: time at 1 over W times the time at W."""
    return _against_one_rank(rows, lambda row: row["labels"], 0)


def layer_ms(row: Row) -> float:
    """Head, tail and the exchange of embeddings and their gradient."""
    return sum(row[f"{part}_p50_ms"] or 0.0 for part in ("gather", "head", "tail", "scatter"))


def _against_one_rank(rows: Sequence[Row], size: Any, weak: int) -> list[Efficiency]:
    same = [name for name in KEYS if name not in ("labels", "ranks", "head_rows")]
    bases = {(row["labels"], *(row[name] for name in same)): row for row in measured(rows) if row["ranks"] == 1}
    found = []
    for row in measured(rows):
        base = bases.get((size(row), *(row[name] for name in same)))
        if row["ranks"] > 1 and base is not None:
            ranks = 1 if weak else row["ranks"]
            layer = layer_ms(row)
            of_layer = layer_ms(base) / layer / ranks if layer else 0.0
            found.append(Efficiency(row, base, base["p50_ms"] / row["p50_ms"] / ranks, of_layer))
    return found


def append_records(row: Row, rows: Sequence[Row], folder: Path) -> None:
    """Appends a new ``row`` of the study ``rows`` as a line of train_step, and the scalings that it completes as lines of theirs."""
    gpus = 0 if row["device"] == "cpu" else row["ranks"]
    shape = {"L": row["labels"], "N": row["batch"], "D": row["width"], "F": row["fan_in"], "G": row["group"], "W": row["ranks"]}
    names = [name for name, value in row.items() if name.endswith("_ms") and value is not None]
    names += ["labels", "samples_per_s", "tokens_per_s", "peak_gib", "planned_gib", "state_gib", "tokens", "head_rows"]
    names += ["encoder_parameters", "checkpointing", "compiled", "fused", "graphs", "attention", "pooling"]
    figures = {name: float(f"{row[name]:.5g}") if isinstance(row[name], float) else row[name] for name in names}
    if row.get("encoder_mfu") is not None:
        figures["mfu"] = float(f"{row['encoder_mfu']:.4g}")
    figures |= {"data_wait": 0, "momentum": row["momentum_dtype"], "zero": row["zero"], "texts": "synthetic, made before the clock starts"}
    append_record("train_step", "haste_dist", shape, figures, folder, gpus)
    for topic, found in (("weak_scaling", weak_scaling(rows)), ("strong_scaling", strong_scaling(rows))):
        for one in found:
            if not any(all(end[name] == row[name] for name in KEYS) for end in (one.row, one.base)):
                continue
            figures = {
                "efficiency": round(one.step, 4),
                "efficiency_layer": round(one.layer, 4),
                "p50_ms": one.row["p50_ms"],
                "p50_ms_one_rank": one.base["p50_ms"],
                "layer_ms": layer_ms(one.row),
                "labels_one_rank": one.base["labels"],
            }
            at = {**shape, "L": one.row["labels"], "W": one.row["ranks"]}
            append_record(topic, "haste_dist", at, figures, folder, one.row["ranks"] if gpus else 0)
