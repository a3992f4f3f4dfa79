"""``haste scale``: a scaling study from one command. Measures every point that the study does not hold yet, then draws, fits and predicts.

Ranks are started once for each number of ranks, as ``haste train`` starts them. The first of them writes a row after every point, so a
killed study goes on where it was. A point that does not fit a GPU is a row that says so.

Exit status: 0 done, 2 wrong words, 130 stopped by Ctrl-C with every finished point kept.
"""

import dataclasses
import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from haste_dist.config import Config
from haste_dist.cost_model import FEWEST, FILE, FREE, CostModel, Load, Network, fit, kept_path, load_model, load_of_row
from haste_dist.errors import ConfigError, DataError, Interrupted, OutOfMemory
from haste_dist.manifest import writable_folder
from haste_dist.measure import Effort, device_name
from haste_dist.records import stamp
from haste_dist.study import Efficiency, Point, Row, add_row, layer_ms, measured, missing, of_page, read_study, strong_scaling, weak_scaling
from haste_dist.synthetic import LabelLaw
from haste_launch.progress import short
from haste_launch.ray_session import ray_session
from haste_launch.ray_train import absolute_paths, count_ranks, run_ranks
from haste_launch.scale_settings import CPU_RANKS, Words, choose_ranks, filled, points_of

TABLE_WIDTH = 132  # where the output is no terminal
RECORDS = "benchmarks/records"
PREDICTED = (8, 64, 256, 1024)  # GPUs
PREDICTED_LABELS = (10**8, 10**9, 10**10)


def scale(config: Config, words: Words) -> int:
    """Runs the study and prints it; returns the exit status. Raises Interrupted and HasteError."""
    config = study_config(config, words)
    law, folder = law_of(words), Path(config.run.folder)
    rows = read_study(folder)  # a damaged study is told before ranks start
    writable_folder(folder, "choose another --out")
    with ray_session(config):
        import ray

        most, cuda = _most_ranks(config, ray.cluster_resources())
        if not cuda and not config.launch.threads:  # else one rank would have all cores, and more ranks no more of them
            config = dataclasses.replace(config, launch=dataclasses.replace(config.launch, threads=1))
        console = Console(stderr=True, highlight=False, soft_wrap=True)
        usual = most if cuda else config.launch.ranks or min(most, CPU_RANKS)
        ranks = choose_ranks(words, most, usual)
        said, words = words, filled(words, config, ranks, cuda)
        if not said.batch and words.batch != [config.train.batch_size]:
            console.print(f"on a CPU: {words.batch[0]} texts a batch, not {config.train.batch_size} (--batch says how many)")
        points = points_of(words, config, ranks, cuda)
        device = _device(cuda)
        left = missing(points, rows, config, law, device) if device else points
        if len(left) < len(points):
            console.print(f"{len(points) - len(left)} of {len(points)} points are in {folder} already and are kept")
        for count in sorted({point.ranks for point in left}):
            if _measure(config, [point for point in left if point.ranks == count], law, words, cuda, device):
                raise Interrupted(f"every finished point is kept in {folder}; the same command goes on from there")
    report(config, words)
    return 0


def study_config(config: Config, words: Words) -> Config:
    """The config with the study's folder as its run folder, paths absolute. Raises ConfigError for what a study has no points of."""
    if config.launch.label_parallel:
        raise ConfigError(
            f"launch.label_parallel={config.launch.label_parallel}: a scaling study measures ranks that share all labels; set it to 0"
        )
    return absolute_paths(dataclasses.replace(config, run=dataclasses.replace(config.run, folder=os.fspath(words.out))))


def law_of(words: Words) -> LabelLaw:
    return LabelLaw(words.exponent, words.shift, words.positives)


def task_arguments(points: list[Point], law: LabelLaw, words: Words, cuda: bool) -> dict[str, Any]:
    """What ``measure_points`` needs, as plain values that travel to the ranks."""
    records = words.records or (RECORDS if cuda else "none")
    return {
        "points": [dataclasses.asdict(point) for point in points],
        "law": dataclasses.asdict(law),
        "effort": dataclasses.asdict(Effort(words.warmup, words.steps)),
        "records": "" if records == "none" else os.path.abspath(records),
    }


def report(config: Config, words: Words) -> None:
    """Prints the table of the points that were measured with these settings, their efficiencies and the cost model; writes the model and
    the plot."""
    console = Console(width=None if sys.stdout.isatty() else TABLE_WIDTH, highlight=False)
    folder = Path(config.run.folder)
    whole = read_study(folder)
    rows = of_page(whole, config, law_of(words))
    if len(rows) < len(whole):
        others = f"{len(whole) - len(rows)} points in {folder} are of other settings (encoder, types, law of the labels)"
        console.print(f"{others}: left out here, shown by a command that has theirs", soft_wrap=True)
    console.print(_table(rows))
    for title, found in (("weak scaling", weak_scaling(rows)), ("strong scaling", strong_scaling(rows))):
        for one in found:
            console.print(f"{title}: {_efficiency(one)}", soft_wrap=True)
    network = Network(gpus_a_host=words.gpus_a_host, gb_s=words.between_gb_s)
    models = []
    for device in dict.fromkeys(row["device"] for row in measured(rows)):
        mine = [row for row in measured(rows) if row["device"] == device]
        if len(mine) < FEWEST:
            console.print(f"{device}: {len(mine)} points; a cost model needs {FEWEST}")
            continue
        model = fit(mine, stamp())
        models.append(model)
        here = folder / (FILE if len(models) == 1 else f"cost_model-{len(models)}.json")
        model.save(here)
        _print_model(console, model, load_of_row(mine[-1]), network)
        console.print(_keep(model, here), soft_wrap=True)
    console.print(str(folder / "study.parquet"), soft_wrap=True)
    if words.plot and measured(rows):
        from haste_launch.scale_plot import plot_study

        console.print(str(plot_study(folder, rows, models[0] if models else None)), soft_wrap=True)


def _keep(model: CostModel, here: Path) -> str:
    """Keeps the device's model for ``haste plan``, unless the kept one knows larger runs; returns what to say of it."""
    path = kept_path(model.device)
    try:
        before = load_model(path)
    except DataError:  # none, or of another version
        before = model
    if not all(model.ranges[name][1] >= before.ranges[name][1] for name in FREE):
        return f"{path}: kept for haste plan, since it was measured on more labels or ranks; haste plan --model {here} reads this one"
    model.save(path)
    return f"{path}: the cost model that haste plan reads"


def scaled(load: Load, labels: int, ranks: int) -> Load:
    """The same step with other labels on other ranks, the head growing as the labels do."""
    grown = labels / load.labels
    own = grown * load.ranks / ranks
    tail_rows = math.ceil(load.tail_rows * own / load.group) * load.group
    return dataclasses.replace(
        load,
        labels=labels,
        ranks=ranks,
        head_rows=math.ceil(load.head_rows * own),
        tail_rows=tail_rows,
        tail_bytes=load.tail_bytes / max(1, load.tail_rows) * tail_rows,
        encoder_flops=load.encoder_flops * load.ranks / ranks,
    )


def _most_ranks(config: Config, resources: dict[str, float]) -> tuple[int, bool]:
    """The most ranks there can be here, and whether each has a GPU."""
    anything = dataclasses.replace(config, launch=dataclasses.replace(config.launch, ranks=0))
    gpus, on_gpu = count_ranks(anything, resources)
    return (gpus, True) if on_gpu else (max(1, config.launch.ranks, int(resources.get("CPU", 1))), False)


def _device(cuda: bool) -> str:
    """The name of the ranks' device, or "" where this machine cannot know it."""
    import torch

    if not cuda:
        return "cpu"
    return device_name(torch.device("cuda", 0)) if torch.cuda.is_available() else ""


def _measure(config: Config, points: list[Point], law: LabelLaw, words: Words, cuda: bool, device: str) -> bool:
    """Measures points of one number of ranks, starting ranks again after one that filled its device. True: stopped by the user."""
    folder = Path(config.run.folder)
    while points:
        on = dataclasses.replace(config, launch=dataclasses.replace(config.launch, ranks=points[0].ranks, retries=0))
        try:
            return run_ranks(on, "scale", task_arguments(points, law, words, cuda)) in (signal.SIGINT, signal.SIGTERM)
        except OutOfMemory:
            if not device:
                raise
            # Points are measured in order, so the first that has no row is the one.
            points = missing(points, read_study(folder), config, law, device)
            add_row(folder, {**points[0].key(config, law), "device": device, "note": "out of memory", **stamp()})
            points = points[1:]
    return False


def _table(rows: list[Row]) -> Table:
    title = "median ms of a step, of its parts and of the encoder alone; memory of the fullest rank"
    made = Table(title=title, title_style="", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    parts = ("forward", "head", "tail", "backward", "optimizer")
    short_parts = ("forward", "head", "tail", "backw.", "optim.", "exch.")
    for name in ("device", "L", "W", "N", "F", "G", "step", "p20", "p80", *short_parts, "alone", "MFU", "texts/s", "GiB", "planned"):
        made.add_column(name, justify="left" if name == "device" else "right", no_wrap=True)
    for row in rows:
        cells = [row["device"].removeprefix("NVIDIA ")[:8], *(short(row[name]) for name in ("labels", "ranks", "batch", "fan_in", "group"))]
        if row["note"]:
            cells.append(row["note"])
        else:
            exchange = sum(row[f"{part}_p50_ms"] or 0.0 for part in ("gather", "scatter"))
            figures = [row["p50_ms"], row["p20_ms"], row["p80_ms"], *(row[f"{part}_p50_ms"] or 0.0 for part in parts), exchange]
            figures.append(row["encoder_only_ms"] or 0.0)
            cells += [f"{value:.0f}" if value >= 100 else f"{value:.3g}" for value in figures]
            cells.append("" if row["encoder_mfu"] is None else f"{row['encoder_mfu']:.0%}")
            cells += [f"{row['samples_per_s']:,.0f}", f"{row['peak_gib']:.3g}", f"{row['planned_gib']:.3g}"]
        made.add_row(*cells)
    return made


def _efficiency(one: Efficiency) -> str:
    row, base = one.row, one.base
    sizes = f"{short(row['labels'])} labels on {row['ranks']} ranks beside {short(base['labels'])} on 1"
    layer = f"output layer {100 * one.layer:.1f}% ({layer_ms(row):.3g} beside {layer_ms(base):.3g} ms)"
    return f"{sizes}: step {100 * one.step:.1f}%, {layer}; N={row['batch']} F={row['fan_in']} G={row['group']}"


def _print_model(console: Console, model: CostModel, load: Load, network: Network) -> None:
    """Errors, assumptions, and what the last point's step would take elsewhere."""
    console.print(f"cost model of {model.device}, relative error of the step (median, most):")
    for name, error in model.errors.items():
        console.print(f"  {name}: {100 * error['median']:.1f}%, {100 * error['most']:.1f}% of {error['points']:.0f} points")
    console.print("it assumes:")
    for line in model.assumptions(network):
        console.print(f"  {line}", soft_wrap=True)
    made = Table(title=f"predicted ms a step, N={load.batch} F={load.fan_in} G={load.group}", title_style="", title_justify="left")
    for name in ("GPUs", *(f"{short(labels)} labels" for labels in PREDICTED_LABELS)):
        made.add_column(name, justify="right")
    for ranks in PREDICTED:
        steps = [model.predict(scaled(load, labels, ranks), network).step for labels in PREDICTED_LABELS]
        made.add_row(f"{ranks:,}", *(f"{1e3 * step:,.4g}" for step in steps))
    console.print(made)
    corner = model.predict(scaled(load, PREDICTED_LABELS[-1], PREDICTED[0]), network)
    for note in corner.notes:
        console.print(f"note, of {short(PREDICTED_LABELS[-1])} labels on {PREDICTED[0]}: {note}", soft_wrap=True)
