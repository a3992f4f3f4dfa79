"""``haste inspect``: one page about the texts, the labels or the groups of a prepared folder, as Markdown, with a plot.

Everything is counted a shard at a time. Groups can be looked at in a run folder, too.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from haste_dist.errors import DataError
from haste_dist.label_groups import COHESION_FILE, COHESION_SCHEMA, GROUPS_FILE, LABELS_FILE, ORDER_SCHEMA, load_label_order
from haste_dist.manifest import LABEL_SCHEMA, LABEL_TEXTS, Manifest, open_split, read_arrow, read_manifest, replacing
from haste_dist.metrics import FREQUENCY_BINS

EXAMPLE_GROUPS, EXAMPLE_LABELS, TEXT_WIDTH = 3, 10, 60
KINDS = ("data", "labels", "groups")


@dataclass
class Page:
    """What there is to say and to draw. ``series``: the numbers behind the plot, by name."""

    title: str
    lines: list[str] = field(default_factory=list)
    series: dict[str, NDArray] = field(default_factory=dict)

    def table(self, columns: list[str], rows: list[list[str]]) -> None:
        self.lines += [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}", *(f"| {' | '.join(row)} |" for row in rows), ""]


def inspect(kind: str, folder: str | Path) -> tuple[str, Path, Path]:
    """Writes inspect-<kind>.md and .png into ``folder``; returns the page's text and both paths. Raises DataError."""
    from haste_dist.inspection_plot import draw  # matplotlib: a second to import

    folder = Path(folder)
    page = {"data": data_page, "labels": labels_page, "groups": groups_page}[kind](folder)
    text, image = folder / f"inspect-{kind}.md", folder / f"inspect-{kind}.png"
    figure = draw(kind, page.title, page.series)
    with replacing(image) as file:
        figure.savefig(file, format="png", dpi=130)
    written = "\n".join([f"# {page.title}", "", *page.lines])
    with replacing(text) as file:
        file.write(f"{written}\n![{kind}]({image.name})\n".encode())
    return written, text, image


def data_page(folder: Path) -> Page:
    """Texts: how many, how long, how many labels each. ``series``: counts by length, "<split> tokens" and "<split> labels"."""
    manifest = read_manifest(folder)
    page = Page(f"Texts of {folder.resolve().name}")
    rows = []
    for name, split in manifest.splits.items():
        table = open_split(folder, manifest, name)
        tokens, labels = (_length_counts(table[column]) for column in ("input_ids", "labels"))
        page.series |= {f"{name} tokens": tokens, f"{name} labels": labels}
        cut = tokens[manifest.max_length] / split.rows if len(tokens) > manifest.max_length else 0.0
        rows.append([name, f"{split.rows:,}", _spread(tokens), f"{cut:.1%}", _spread(labels), f"{split.unlabelled:,}"])
    longest = f"at {manifest.max_length} tokens, cut or just fitting"
    page.table(
        ["split", "texts", "tokens a text (median, 95%, most)", longest, "labels a text (median, 95%, most)", "without labels"], rows
    )
    if manifest.quarantined:
        page.lines += ["Left out: " + ", ".join(f"{count:,} {reason}" for reason, count in manifest.quarantined.items()), ""]
    return page


def labels_page(folder: Path) -> Page:
    """Labels: the long tail of their frequencies, and their texts. ``series``: "frequency" (L,), descending, and "words" counts."""
    manifest = read_manifest(folder)
    table = read_arrow(folder / LABEL_TEXTS, LABEL_SCHEMA)
    frequency = table["frequency"].to_numpy()
    page = Page(f"Labels of {folder.resolve().name}")
    order = np.argsort(-frequency, kind="stable")
    head = _head_rows(folder)
    page.series = {"frequency": frequency[order], "words": _word_counts(table["text"]), "head": np.array([head])}
    half = int(np.searchsorted(np.cumsum(frequency[order]), frequency.sum() / 2)) + 1
    page.lines += [
        f"{manifest.labels:,} labels, {frequency.sum():,} times on training texts; {half:,} of them ({half / manifest.labels:.1%}) "
        "make half of it.",
        _text_facts(table["text"], manifest),
        "",
    ]
    rows = []
    for low, high, name in ((0, 0, "never"), *FREQUENCY_BINS):
        inside = (frequency >= low) & (frequency <= high)
        shares = (inside.mean(), frequency[inside].sum() / max(1, frequency.sum()))
        words = name.replace("_", " " if name.startswith("over") else "-")
        rows.append([words, f"{inside.sum():,}", *(f"{share:.1%}" for share in shares)])
    page.table(["training texts", "labels", "of all labels", "of all occurrences"], rows)
    best = order[:EXAMPLE_LABELS]
    page.table(
        ["most frequent", "training texts"], [[_short(table["text"][int(i)].as_py() or f"label {i}"), f"{frequency[i]:,}"] for i in best]
    )
    return page


def groups_page(folder: Path) -> Page:
    """Groups: how close their labels are, and examples. ``series``: "cohesion", "random", "next" (T,) where labels were embedded."""
    order = load_label_order(folder)
    about = json.loads((folder / GROUPS_FILE).read_text(encoding="utf-8"))
    page = Page(f"Groups of {folder.resolve().name}")
    page.lines += [
        f"{order.labels:,} labels: {order.head_rows:,} in the head, {order.labels - order.head_rows:,} in {order.groups:,} groups of "
        f"{order.group_size} ({about['method']}).",
        "",
    ]
    if not order.groups:
        return page
    path = folder / COHESION_FILE
    if not path.is_file():
        why = "" if about["method"] != "semantic" else "; haste prepare writes how close each group is"
        page.lines += [f"Nothing is known of how close the labels of each group are{why}.", ""]
        chosen = {"groups": np.linspace(0, order.groups - 1, EXAMPLE_GROUPS).astype(int)}
        closeness = None
    else:
        table = read_arrow(path, COHESION_SCHEMA)
        page.series = {name: table[name].to_numpy() for name in ("cohesion", "random", "next")}
        closeness = page.series["cohesion"]
        if len(closeness) != order.groups:
            raise DataError(f"{path}: tells of {len(closeness)} groups, there are {order.groups}; run haste prepare again")
        rows = [
            [name, *(f"{np.quantile(page.series[key], at):.3f}" for at in (0.05, 0.5, 0.95)), f"{page.series[key].mean():.3f}"]
            for name, key in (
                ("labels to their group's centroid", "cohesion"),
                ("the same, random groups", "random"),
                ("centroid to the next group's", "next"),
            )
        ]
        page.table(["cosine", "5%", "median", "95%", "mean"], rows)
        by_closeness = np.argsort(-closeness, kind="stable")
        middle = (len(by_closeness) - EXAMPLE_GROUPS) // 2
        parts = {
            "closest": slice(0, EXAMPLE_GROUPS),
            "middling": slice(max(0, middle), middle + EXAMPLE_GROUPS),
            "loosest": slice(-EXAMPLE_GROUPS, None),
        }
        chosen = {name: by_closeness[part] for name, part in parts.items()}
    text = read_arrow(folder / LABELS_FILE, ORDER_SCHEMA)["text"]
    for name, groups in chosen.items():
        page.lines += [f"## {name.capitalize()}{'' if name == 'groups' else ' groups'}", ""]
        for group in groups:
            first = order.head_rows + int(group) * order.group_size
            real = order.label_of_row[first : first + order.group_size]
            texts = text[first : first + int((real >= 0).sum())].to_pylist()
            shown = [_short(one or f"label {label}", 40) for one, label in zip(texts, real, strict=False)]
            more = f"; and {len(shown) - EXAMPLE_LABELS} more" if len(shown) > EXAMPLE_LABELS else ""
            close = "" if closeness is None else f" ({closeness[group]:.3f})"
            page.lines += [f"- {group}{close}: {'; '.join(shown[:EXAMPLE_LABELS])}{more}"]
        page.lines += [""]
    return page


def _length_counts(column: pa.ChunkedArray) -> NDArray[np.int64]:
    """How many lists have each length."""
    counts = np.zeros(1, np.int64)
    for chunk in column.chunks:
        more = np.bincount(pc.list_value_length(chunk).to_numpy(), minlength=len(counts))
        more[: len(counts)] += counts
        counts = more
    return counts


def _word_counts(texts: pa.ChunkedArray) -> NDArray[np.int64]:
    """How many labels have a text of each number of words; none is 0."""
    return _length_counts(
        pa.chunked_array(
            [
                pc.split_pattern_regex(pc.utf8_trim_whitespace(pc.if_else(pc.equal(c, ""), None, c)), r"\s+").fill_null([])
                for c in texts.chunks
            ]
        )
    )


def _spread(counts: NDArray[np.int64]) -> str:
    """Median, 95th percentile and most of the lengths that ``counts`` counts."""
    below = np.cumsum(counts)
    at = [int(np.searchsorted(below, share * below[-1])) for share in (0.5, 0.95)] if below[-1] else [0, 0]
    return f"{at[0]}, {at[1]}, {len(counts) - 1}"


def _text_facts(texts: pa.ChunkedArray, manifest: Manifest) -> str:
    filled = texts.filter(pc.not_equal(texts, "")).cast(pa.large_string())  # all different ones in one array
    same = len(filled) - len(filled.unique())
    facts = [f"{manifest.labels - len(filled):,} have no text", f"{same:,} have one that another label has, too"]
    if manifest.unseen_test_labels:
        facts.append(f"{manifest.unseen_test_labels:,} of the test split never occur in training")
    return f"Of the labels, {', '.join(facts)}."


def _head_rows(folder: Path) -> int:
    try:
        return load_label_order(folder).head_rows
    except DataError:  # not ordered yet
        return 0


def _short(text: str, width: int = TEXT_WIDTH) -> str:
    text = " ".join(text.split()).replace("|", "/")
    return text if len(text) <= width else f"{text[: width - 1]}…"
