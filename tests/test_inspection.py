"""haste inspect: what its pages say, counted by hand, and that they can be drawn."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from tiny import make_prepared

from haste_dist import inspection
from haste_dist.config import Config
from haste_dist.inspection import data_page, groups_page, labels_page
from haste_dist.inspection_plot import draw
from haste_dist.label_groups import COHESION_FILE, load_label_order
from haste_dist.manifest import open_split, read_manifest
from haste_launch import cli


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return make_prepared(tmp_path_factory.mktemp("inspection"), overrides=["groups.method=semantic"])


@pytest.fixture
def prepared(config: Config) -> Path:
    return Path(config.data.prepared)


@pytest.mark.parametrize("kind", inspection.KINDS)
def test_the_command_writes_a_page_and_a_plot(prepared: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["inspect", kind, str(prepared)]) == 0
    page, image = prepared / f"inspect-{kind}.md", prepared / f"inspect-{kind}.png"
    printed = capsys.readouterr().out
    assert page.read_text().splitlines()[0] in printed
    assert f"]({image.name})" in page.read_text()
    assert printed.splitlines()[-2:] == [str(page), str(image)]
    assert image.read_bytes().startswith(b"\x89PNG")
    assert image.stat().st_size > 10_000


def test_texts_are_counted(prepared: Path) -> None:
    page = data_page(prepared)
    rows = open_split(prepared, read_manifest(prepared), "train").to_pylist()
    for what, column in (("tokens", "input_ids"), ("labels", "labels")):
        counts = Counter(len(row[column]) for row in rows)
        assert page.series[f"train {what}"].tolist() == [counts[i] for i in range(max(counts) + 1)]
    tokens = sorted(len(row["input_ids"]) for row in rows)
    line = next(line for line in page.lines if line.startswith("| train |"))
    assert f"| 192 | {tokens[len(tokens) // 2 - 1]}, " in line


def test_labels_are_counted(prepared: Path) -> None:
    page = labels_page(prepared)
    rows = open_split(prepared, read_manifest(prepared), "train").to_pylist()
    counts = Counter(label for row in rows for label in row["labels"])
    assert page.series["frequency"].tolist() == sorted((counts[i] for i in range(101)), reverse=True)
    assert page.series["words"].tolist() == [0, 101]  # one word each
    assert page.series["head"].tolist() == [16]
    never = sum(counts[i] == 0 for i in range(101))
    assert any(line.startswith(f"| never | {never} | {never / 101:.1%} | 0.0% |") for line in page.lines)
    assert any(line.startswith(f"| 1 | {sum(count == 1 for count in counts.values())} |") for line in page.lines)


def test_groups_are_shown_from_close_to_loose(prepared: Path) -> None:
    page, order = groups_page(prepared), load_label_order(prepared)
    close = page.series["cohesion"]
    assert len(close) == order.groups == 6
    assert page.series["random"].mean() < close.mean()
    examples = [int(line.split()[1]) for line in page.lines if line.startswith("- ")]
    assert close[examples[0]] == close.max()
    assert close[examples[-1]] == close.min()
    last = next(line for line in reversed(page.lines) if line.startswith("- "))
    members = order.label_of_row[16 + 16 * examples[-1] :][:10]
    assert last == f"- {examples[-1]} ({close.min():.3f}): " + "; ".join(f"w{7 * label % 200}" for label in members) + "; and 6 more"


def test_groups_that_nobody_embedded(tmp_path: Path) -> None:
    config = make_prepared(tmp_path)  # neighbours in frequency
    folder = Path(config.data.prepared)
    assert not (folder / COHESION_FILE).exists()
    page = groups_page(folder)
    assert page.series == {}
    assert any("Nothing is known" in line for line in page.lines)
    draw("groups", page.title, page.series)


def test_long_tails_of_lengths_end_in_one_bar() -> None:
    counts = np.zeros(5000, np.int64)
    counts[:50] = 100
    counts[4999] = 1
    figure = draw("data", "made up", {"train tokens": counts, "train labels": counts})
    assert sum(figure.axes[0].patches[0].get_data().values) == pytest.approx(100)
    assert figure.axes[0].patches[0].get_data().edges[-1] < 100


def test_no_prepared_folder_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for kind in inspection.KINDS:
        assert cli.main(["inspect", kind, str(tmp_path)]) == 2
        assert "run haste prepare" in capsys.readouterr().err
