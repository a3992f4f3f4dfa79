"""``haste bench kernels``: correctness first, then one table of this project, its baselines, its peers and the hardware's floor.

Every provider passes the gate (bench_gate) before anything is timed; one red comparison ends the run, with no speed printed. Then each
builds its states alone in memory and is timed. Each row of the table is a record. With --tune, tiles are chosen before that (bench_tune).

Exit status: 0 done, 1 a provider computes something wrong, 2 wrong words.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from haste_dist.records import append_record
from haste_kernels import tuning
from haste_launch.bench_case import STEPS, Case, Ceilings
from haste_launch.bench_gate import Check, check_full, check_small, small_case
from haste_launch.bench_measure import GIB, allocated, measure_ceilings, peak_gib, time_calls
from haste_launch.bench_problem import TIMED
from haste_launch.bench_providers import PROVIDERS, Provider, Unsupported
from haste_launch.bench_settings import Settings, Words, settle
from haste_launch.bench_tune import check_tunable, tune_cases

TABLE_WIDTH = 132  # where the output is no terminal
DENSE, FLOOR = "dense", "floor"
WRONG = 1
RESTLESS = 1.5  # p80 over p20 from which a reader is warned


@dataclass(frozen=True)
class Row:
    """A measured provider at one shape, or why there are no figures."""

    case: Case
    provider: str
    shape: dict[str, int]
    figures: dict[str, Any]
    note: str = ""


class Wrong(Exception):
    """A red gate: the comparisons that failed."""

    def __init__(self, checks: list[Check]):
        super().__init__()
        self.checks = checks


def bench_kernels(words: Words) -> int:
    """Runs the benchmark on this machine's first GPU, or on its CPU, and prints the table."""
    settings = settle(words, torch.cuda.is_available())
    if words.tune:
        check_tunable()
        before = tuning.kept()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    errors = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        with _progress(errors) as progress:
            if words.tune:
                tune_cases(settings.cases, device, settings.seconds, progress)
            rows, ceilings = run(settings, device, progress)
    except Wrong as error:
        for check in error.checks:
            errors.print(f"haste: gate: {check.what}: error {check.error:.3g}, at most {check.allowed:.3g} allowed", markup=False)
        errors.print(f"haste: {len(error.checks)} comparisons with the definition failed; no speed is shown")
        if words.tune:
            tuning.keep(before)
            errors.print("the tiles chosen just now are given up: the fastest may be the wrong one")
        return WRONG
    console = Console(width=None if sys.stdout.isatty() else TABLE_WIDTH, highlight=False)
    console.print(table(rows, ceilings, device))
    for number, note in enumerate(notes_of(rows), 1):
        console.print(f"[{number}] {note}", markup=False, soft_wrap=True)
    distinct = {(row.case.topic, row.provider, *row.shape.items()): row for row in rows if row.figures}
    restless = sum(row.figures["p80_ms"] > RESTLESS * row.figures["p20_ms"] for row in distinct.values())
    if restless:
        console.print(f"{restless} of {len(distinct)} vary by half and more from p20 to p80: was something else running?", soft_wrap=True)
    if settings.records:
        console.print(f"{len(distinct)} records appended under {settings.records}", soft_wrap=True)
    if settings.plot:
        from haste_launch.bench_plot import plot_rows

        for path in plot_rows(rows, settings.plot, _title(ceilings, device)):
            console.print(str(path), soft_wrap=True)
    return 0


Step = Callable[[str], None]  # tells what is done next
Stages = Callable[[str, int], Step]  # starts a stage of so many


def run(settings: Settings, device: torch.device, progress: Stages) -> tuple[list[Row], Ceilings]:
    """Gates, then measures, every case. Raises Wrong."""
    providers = _providers(settings, progress)
    _gate(settings, providers, device, progress)
    dtype = getattr(torch, settings.cases[0].x_dtype)
    progress("ceilings", 1)("copy and GEMM")
    ceilings = measure_ceilings(device, dtype, settings.seconds)
    rows: dict[tuple[Any, ...], Row] = {}
    step = progress("measuring", len(settings.cases) * len(settings.providers))
    shown = []
    for case in settings.cases:
        for name in settings.providers:
            step(f"{case.topic} {name} {_letters(case.shape())}")
            row = _floor(case, ceilings) if name == FLOOR else None
            if row is None and (name not in providers or case.topic not in providers[name].build):
                continue
            shape = row.shape if row else providers[name].case(case).shape(providers[name].letters)
            key = (name, case.topic, *shape.items())
            if key not in rows:
                rows[key] = row or _measure(case, name, providers[name], shape, device, settings.seconds)
                _record(rows[key], settings.records)
            shown.append(rows[key] if rows[key].case == case else Row(case, name, shape, rows[key].figures, rows[key].note))
    return shown, ceilings


def notes_of(rows: list[Row]) -> list[str]:
    """Why rows have no figures, each reason once: the table counts them from 1."""
    return list(dict.fromkeys(row.note for row in rows if row.note))


def table(rows: list[Row], ceilings: Ceilings, device: torch.device) -> Table:
    """One row a provider and shape; a rule after each shape."""
    made = Table(title=_title(ceilings, device), title_style="", title_justify="left")
    for name, justify in (("operation", "left"), ("provider", "left"), *((letter, "right") for letter in "LNDFGK")):
        made.add_column(name, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for name in ("p20 ms", "p50 ms", "p80 ms", "peak GiB", "x floor", "faster than dense"):
        made.add_column(name, justify="right", no_wrap=name != "faster than dense")
    notes = notes_of(rows)
    for i, row in enumerate(rows):
        beside = {other.provider: other.figures for other in rows if other.case == row.case and other.figures}
        cells = [row.case.topic, row.provider, *(f"{row.shape[letter]:,}" if letter in row.shape else "" for letter in "LNDFGK")]
        if row.figures:
            p50 = row.figures["p50_ms"]
            cells += [f"{row.figures[name]:.4g}" for name in ("p20_ms", "p50_ms", "p80_ms")] + [f"{row.figures['peak_gib']:.3g}"]
            cells.append(f"{p50 / beside[FLOOR]['p50_ms']:.2f}" if FLOOR in beside else "")
            cells.append(f"{beside[DENSE]['p50_ms'] / p50:.2f}" if DENSE in beside else "")
        else:
            cells += ["", f"[{notes.index(row.note) + 1}]"]
        last = i + 1 == len(rows) or rows[i + 1].case != row.case
        made.add_row(*cells, end_section=last, style="bold" if row.provider == "haste_dist" else "")
    return made


def _providers(settings: Settings, progress: Stages) -> dict[str, Provider]:
    """Those asked for that can run here; says why of the others."""
    wanted = [name for name in settings.providers if name in PROVIDERS]
    missing = {name: PROVIDERS[name].missing() for name in wanted}
    for name, why in missing.items():
        if why:
            progress(f"{name}: left out: {why}", 0)
    return {name: PROVIDERS[name] for name in wanted if not missing[name]}


def _gate(settings: Settings, providers: dict[str, Provider], device: torch.device, progress: Stages) -> None:
    todo: dict[tuple[Any, ...], tuple[str, Provider, Case]] = {}
    for case in settings.cases:
        for name, provider in providers.items():
            if case.topic in provider.build:
                key = (name, case.topic, *provider.case(small_case(case)).shape(provider.letters).items())
                todo.setdefault(key, (name, provider, case))
    step = progress("gate", len(todo))
    red: list[Check] = []
    for name, provider, case in todo.values():
        step(f"{case.topic} {name}")
        try:
            red += [check for check in check_small(name, provider, case, device) if check.red]
        except Unsupported:
            continue  # the table says so
    if red:
        raise Wrong(red)


def _measure(case: Case, name: str, provider: Provider, shape: dict[str, int], device: torch.device, seconds: float) -> Row:
    before = allocated(device)
    try:
        work = provider.build[case.topic](provider.case(case), device, TIMED)
        red = [check for check in check_full(name, provider, case, work, TIMED) if check.red]
        if red:
            raise Wrong(red)
        peak = peak_gib(work.run, device, work.tensors, before)
        times = time_calls(work.run, device, seconds)
    except Unsupported as error:
        return Row(case, name, shape, {}, f"not supported: {error}")
    except torch.OutOfMemoryError:
        return Row(case, name, shape, {}, "out of memory")
    return Row(case, name, shape, {**times._asdict(), "peak_gib": peak})


def _floor(case: Case, ceilings: Ceilings) -> Row:
    traffic, floor = case.traffic(), case.floor(ceilings)
    times = dict.fromkeys(("p20_ms", "p50_ms", "p80_ms"), floor.ms)
    counted = {"bytes": traffic.bytes, "flops": traffic.flops, "bound": floor.bound, **ceilings._asdict()}
    return Row(case, FLOOR, case.shape(), {**times, "peak_gib": traffic.held / GIB, **counted})


def _record(row: Row, folder: Path | None) -> None:
    if folder is None or row.note:
        return
    case = row.case
    figures = {name: float(f"{value:.5g}") if isinstance(value, float) else value for name, value in row.figures.items()}
    figures["dtype"] = case.dtype
    if case.topic in STEPS:
        figures["momentum"] = case.momentum
    figures["bias"] = "yes" if case.bias else "no"
    append_record(case.topic, row.provider, row.shape, figures, folder, gpus=None if not torch.cuda.is_available() else 1)


def _title(ceilings: Ceilings, device: torch.device) -> str:
    cuda = device.type == "cuda"
    where = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"
    rates = f"copies {ceilings.copy_gb_s:,.4g} GB/s, GEMM {ceilings.gemm_tflop_s:,.4g} TFLOP/s"
    return f"{where}: {rates} (measured); torch {torch.__version__}"


def _letters(shape: dict[str, int]) -> str:
    return " ".join(f"{letter}={value}" for letter, value in shape.items())


@contextmanager
def _progress(console: Console) -> Iterator[Stages]:
    """A bar on a terminal; elsewhere a line a stage."""
    bars = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )

    def stage(name: str, count: int) -> Step:
        if not count:
            console.print(name, markup=False)
            return lambda note: None
        if bars.disable:
            console.print(f"{name}: {count}", markup=False)
        bar = bars.add_task(name, total=count, note="")
        done = -1

        def step(note: str) -> None:
            nonlocal done
            done += 1
            bars.update(bar, completed=done, note=note)

        return step

    with bars:
        yield stage
