"""The plot: what is drawn is what was logged, resumed runs included; panels without data say so."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes

from haste_dist.errors import DataError
from haste_dist.plot import draw_run, plot_run, valid_events
from haste_dist.runlog import RunLog


def log_run(folder: Path, start: int, stop: int, shift: float = 0.0) -> None:
    """Steps start+1..stop; the loss is 100 - step + shift."""
    with RunLog(folder) as log:
        log.event("start", step=start, labels=1234, texts=99, ranks=2, device="cpu")
        for step in range(start + 1, stop + 1):
            log.step(step=step, epoch=step / 10, loss=100.0 - step + shift, step_ms=20.0 + step % 3, samples_per_s=5000.0)
            if step % 5 == 0:
                log.event("rewire", step=step, replaced=step, connections=200, fraction=step / 150)
            if step % 10 == 0:
                log.event("eval", step=step, epoch=step / 10, split="dev", **{"P@1": step / 100, "P@3": step / 200, "P@5": step / 400})


def line(axis: Axes, label: str) -> tuple[list[float], list[float]]:
    (found,) = [one for one in axis.get_lines() if str(one.get_label()).startswith(label)]
    return np.asarray(found.get_xdata()).tolist(), np.asarray(found.get_ydata()).tolist()


def events(folder: Path) -> list[dict[str, Any]]:
    from haste_dist.runlog import read_events

    return read_events(folder)


def test_a_png_is_written(tmp_path: Path) -> None:
    log_run(tmp_path, 0, 30)
    path = plot_run(tmp_path)
    data = path.read_bytes()
    assert path == tmp_path / "plot.png"
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert data[-8:-4] == b"IEND"
    width, height = struct.unpack(">II", data[16:24])
    assert width > 1200
    assert height > 800
    from matplotlib.image import imread

    pixels = imread(path)[..., :3]
    for half in (pixels[: height // 2], pixels[height // 2 :]):
        for quarter in (half[:, : width // 2], half[:, width // 2 :]):
            spread = np.ptp(quarter, axis=2)
            assert (spread > 0.3).sum() > 200, "each panel has a coloured curve"


def test_what_is_drawn_is_what_was_logged(tmp_path: Path) -> None:
    log_run(tmp_path, 0, 30)
    figure = draw_run(events(tmp_path), "my run")
    loss, precision, churn, speed, right = figure.axes
    steps = list(range(1, 31))
    assert line(loss, "logged") == (steps, [100.0 - step for step in steps])
    assert line(precision, "P@1, best 30.0") == ([1, 2, 3], pytest.approx([10, 20, 30]))
    assert line(precision, "P@3")[1] == pytest.approx([5, 10, 15])
    assert line(precision, "P@5")[1] == pytest.approx([2.5, 5, 7.5])
    assert line(churn, "replaced")[1] == pytest.approx([2.5, 5, 7.5, 10, 12.5, 15])
    assert line(churn, "schedule")[1] == pytest.approx([100 * step / 150 for step in (5, 10, 15, 20, 25, 30)])
    middle, half = line(speed, "time a step, median 21 ms")
    assert half == [21] * 6
    assert middle == [3, 8, 13, 18, 23, 28]
    assert line(right, "texts a second")[1] == [5000] * 6
    band = speed.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (20, 22)


def test_panels_are_labelled(tmp_path: Path) -> None:
    log_run(tmp_path, 0, 30)
    figure = draw_run(events(tmp_path), "my run")
    texts = [(axis.get_title(), axis.get_xlabel(), axis.get_ylabel()) for axis in figure.axes[:4]]
    assert texts == [
        ("Training loss", "step", "loss (sum over all labels)"),
        ("Precision on dev", "epoch", "P@k (%)"),
        ("Sparsity churn", "step", "tail connections replaced (%)"),
        ("Speed", "step", "time a step (ms)"),
    ]
    assert figure.get_suptitle() == "my run  ·  1,234 labels  ·  99 training texts  ·  2 ranks  ·  cpu"
    legend = figure.axes[3].get_legend()
    assert legend is not None
    assert any("texts a second" in text.get_text() for text in legend.get_texts())


def test_a_resumed_run_is_one_curve(tmp_path: Path) -> None:
    log_run(tmp_path, 0, 34)
    log_run(tmp_path, 20, 28, shift=0.25)  # steps 29..34 of the first process are void, 21..28 were taken again
    kept = valid_events(events(tmp_path))
    assert [event["step"] for event in kept["step"]] == list(range(1, 29))
    assert [event["loss"] for event in kept["step"]] == [100.0 - s for s in range(1, 21)] + [100.25 - s for s in range(21, 29)]
    assert [event["step"] for event in kept["eval"]] == [10, 20]
    assert [event["step"] for event in kept["rewire"]] == [5, 10, 15, 20, 25]
    loss = draw_run(events(tmp_path), "run").axes[0]
    assert line(loss, "resumed")[0] == [20, 20]


def test_a_long_noisy_loss_gets_a_running_mean() -> None:
    rng = np.random.default_rng(0)
    noisy = 5 + rng.normal(size=1000)
    steps = [{"event": "step", "step": i, "loss": value, "step_ms": 1.0, "samples_per_s": 1.0} for i, value in enumerate(noisy)]
    figure = draw_run(steps, "run")
    smooth = np.array(line(figure.axes[0], "running mean")[1])
    assert len(smooth) == 1000
    assert smooth[500] == pytest.approx(noisy[480:520].mean())
    assert smooth.std() < 0.3 * noisy.std()
    assert len(line(figure.axes[3], "time a step")[0]) == 60


def test_a_wide_loss_is_drawn_on_a_log_scale() -> None:
    def scale(values: list[float]) -> str:
        return draw_run([{"event": "step", "step": i, "loss": v} for i, v in enumerate(values)], "run").axes[0].get_yscale()

    assert scale([100.0, 1.0]) == "log"
    assert scale([100.0, 50.0]) == "linear"
    assert scale([100.0, 0.0]) == "linear"


def test_start_up_does_not_flatten_the_speed() -> None:
    steps = [{"event": "step", "step": i, "step_ms": ms, "samples_per_s": 1e3 / ms} for i, ms in enumerate([900.0, 10.0, 11.0, 12.0])]
    assert line(draw_run(steps, "run").axes[3], "time a step") == ([1, 2, 3], [10, 11, 12])


@pytest.mark.parametrize("lines", ["", '{"event": "start", "step": 0}\n', '{"event": "step", "step": 1, "loss": null}\n'])
def test_panels_without_data_say_so(tmp_path: Path, lines: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(lines)
    figure = draw_run(events(tmp_path), "run")
    told = [axis.texts[0].get_text() for axis in figure.axes]
    assert told == ["no training step logged yet", "no evaluation yet", "no rewiring yet", "no training step logged yet"]
    assert plot_run(tmp_path).stat().st_size > 1000


def test_no_log_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        plot_run(tmp_path)
    assert not list(tmp_path.iterdir())
