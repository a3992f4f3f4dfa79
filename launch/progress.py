"""Shows how a run goes on by reading its metrics.jsonl: a bar on a terminal, a line now and then elsewhere."""

import json
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

from haste_dist.runlog import FILE

LINE_SECONDS = 15.0


class Progress:
    """Follows the metrics that the ranks append to from now on. Use as a context manager; call ``update`` now and then."""

    def __init__(self, run: Path, task: str):
        self._path = run / FILE
        self._at = self._path.stat().st_size if self._path.exists() else 0
        self._console = Console(stderr=True)
        self._lined = time.monotonic()
        self._task = task
        self._steps = 0
        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=self._console,
            disable=not sys.stderr.isatty(),
        )

    def __enter__(self) -> "Progress":
        self._bars.start()
        self._bar = self._bars.add_task("scoring" if self._task == "evaluate" else "starting ranks", total=None, note="")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.update()
        self._bars.stop()

    def update(self) -> None:
        """Shows the events that were written since the last call."""
        for event in self._new_events():
            shown = getattr(self, f"_on_{event['event']}", None)
            if shown is not None:
                shown(event)

    def _new_events(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._at)
            data = file.read()
        whole = data.rfind(b"\n") + 1
        self._at += whole
        return [json.loads(line) for line in data[:whole].splitlines() if line.strip()]

    def _on_start(self, event: dict[str, Any]) -> None:
        self._steps = event["steps"]
        self._bars.update(self._bar, description="training", total=self._steps, completed=event["step"])
        where = f"{event['ranks']} rank{'s' if event['ranks'] > 1 else ''} on {event['device'].split(':')[0]}"
        resumed = f", resumed at step {event['step']:,}" if event["step"] else ""
        self._say(f"training on {event['texts']:,} texts, {event['labels']:,} labels, {self._steps:,} steps, {where}{resumed}")
        if event.get("changed"):
            self._say(f"goes on with other settings than before: {', '.join(event['changed'])}")

    def _on_step(self, event: dict[str, Any]) -> None:
        loss = "-" if event["loss"] is None else f"{event['loss']:.4g}"
        note = f"loss {loss}  {event['samples_per_s']:,.0f} texts/s"
        self._bars.update(self._bar, completed=event["step"], note=note)
        if self._bars.disable and time.monotonic() - self._lined > LINE_SECONDS:
            self._lined = time.monotonic()
            self._say(f"step {event['step']:,} of {self._steps:,}  epoch {event['epoch']:.2f}  {note}")

    def _on_eval(self, event: dict[str, Any]) -> None:
        values = "  ".join(f"{name} {100 * event[name]:.2f}" for name in ("P@1", "P@3", "P@5", "PSP@1", "PSP@5") if name in event)
        self._say(f"epoch {event['epoch']:.2f}  {event['split']}: {values}  ({event['seconds']:.1f} s)")

    def _on_checkpoint(self, event: dict[str, Any]) -> None:
        if event.get("copy_problem"):
            self._say(f"the checkpoint of step {event['step']:,} is in the run folder alone: {event['copy_problem']}")

    def _on_skipped(self, event: dict[str, Any]) -> None:
        self._say(
            f"step {event['step']:,} was passed over, its embeddings are not finite (kept in bad-batches); {event['left']:,} more may be"
        )

    def _on_failure(self, event: dict[str, Any]) -> None:
        again = f"going on from step {event['step']:,}" if event["step"] else "starting over"
        lost = f", {event['lost_steps']:,} steps lost" if event["lost_steps"] else ""
        self._bars.update(self._bar, description="starting ranks again")
        self._say(f"ranks failed ({event['reason']}); {again}{lost}; {event['left']} restarts left without a new checkpoint")

    def _on_study(self, event: dict[str, Any]) -> None:
        self._steps = 0
        self._bars.update(self._bar, description="measuring", total=event["points"], completed=0)
        self._say(f"measuring {event['points']} points on {event['ranks']} rank{'s' if event['ranks'] > 1 else ''}, {event['device']}")

    def _on_point(self, event: dict[str, Any]) -> None:
        self._steps += 1
        self._bars.update(self._bar, completed=self._steps)
        shape = f"L={short(event['labels'])} W={event['ranks']} N={event['batch']} F={event['fan_in']} G={event['group']}"
        found = event["note"] or f"{event['p50_ms']:.4g} ms a step, {event['peak_gib']:.3g} GiB"
        self._say(f"{shape}: {found} ({event['seconds']:.1f} s)")

    def _on_end(self, event: dict[str, Any]) -> None:
        self._bars.update(self._bar, completed=event["step"])
        self._say(
            f"{event['reason']} at step {event['step']:,}; best {100 * max(0.0, event['best']):.2f} at step {max(0, event['best_step']):,}"
        )

    def _say(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def short(value: float) -> str:
    """A count in at most four digits: 4,096 is 4096, 655,360 is 655k, 2,812,288 is 2.81M."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= 10 * size or (unit != "k" and value >= size):
            return f"{float(f'{value / size:.3g}'):g}{unit}"
    return f"{value:g}"
