"""Scoring a split: filters, the baseline, ranks that add up, the report; and the whole path on a small prepared folder."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tiny import make_prepared, run_ranks

from haste_dist.config import Config
from haste_dist.evaluate import (
    Filters,
    Popularity,
    Positions,
    TrueLabels,
    evaluate_baseline,
    evaluate_split,
    evaluate_texts,
    load_filters,
    load_frequency,
    position_batches,
    print_metrics,
    write_evaluation,
)
from haste_dist.manifest import FILTER_SCHEMA, SHARD_SCHEMA, write_arrow
from haste_dist.metrics import Metrics, Propensity, Ragged
from haste_dist.model import frozen_engine, make_classifier, make_encoder, open_prepared
from haste_dist.world import World, join_world

LABELS, TEXTS = 40, 23
RNG = np.random.default_rng(0)
FREQUENCY = RNG.permutation(LABELS) * 4
TRUE = [sorted(RNG.choice(LABELS, RNG.integers(0, 5), replace=False).tolist()) for _ in range(TEXTS)]
SCORES = RNG.permuted(np.tile(np.arange(LABELS, dtype=np.float32), (TEXTS, 1)), axis=1) + 15.5 * np.array(
    [[label in row for label in range(LABELS)] for row in TRUE]
)
PROPENSITY = Propensity(FREQUENCY, 300)


def table() -> pa.Table:
    """The true labels in three chunks, one of them empty."""
    batches = []
    for start, stop in ((0, 9), (9, 9), (9, TEXTS)):
        n = stop - start
        columns = [pa.array([""] * n), pa.array([[1]] * n, pa.list_(pa.int32())), pa.array(TRUE[start:stop], pa.list_(pa.int32()))]
        batches.append(pa.RecordBatch.from_arrays(columns, schema=SHARD_SCHEMA))
    return pa.Table.from_batches(batches)


def fake_model(batch: Positions, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ranks by SCORES; one row of padding behind the texts, as a rank's batch may have."""
    scores, labels = torch.from_numpy(SCORES[np.append(batch.texts, 0)]).topk(k)
    return labels, scores


def batches(*sizes: int) -> Iterator[Positions]:
    order = np.random.default_rng(1).permutation(TEXTS)
    for part in np.split(order, np.cumsum(sizes)):
        yield Positions(part)


def direct(excluded: set[tuple[int, int]] = frozenset()) -> dict[str, float]:  # type: ignore[assignment]
    """Ranks every label of every text, without the excluded pairs."""
    metrics = Metrics(PROPENSITY)
    for text in range(TEXTS):
        ranked = [label for label in np.argsort(-SCORES[text]).tolist() if (text, label) not in excluded]
        metrics.add([ranked], [TRUE[text]])
    return metrics.result()


def test_all_texts_in_any_order_and_batch() -> None:
    result = evaluate_split(fake_model, batches(7, 0, 9), TrueLabels(table()), PROPENSITY)
    assert result["rows"] == TEXTS
    assert {key: result[key] for key in direct()} == pytest.approx(direct(), abs=1e-12)
    assert 0 < result["P@1"] <= 1
    assert "r_at_5_freq_over_100" in result


def test_labels_never_trained_on_do_not_count() -> None:
    frequency = np.where(FREQUENCY > 80, FREQUENCY, 0)
    seen = [[label for label in row if frequency[label]] for row in TRUE]
    propensity = Propensity(frequency, 300)
    kept: list[tuple[np.ndarray, Ragged, np.ndarray, np.ndarray]] = []
    assert any(row and not some for row, some in zip(TRUE, seen, strict=True)), "a text that keeps no label"
    metrics = Metrics(propensity)
    for text in np.flatnonzero([len(row) for row in seen]).tolist():
        metrics.add([np.argsort(-SCORES[text]).tolist()], [seen[text]])
    result = evaluate_split(
        fake_model, batches(7, 0, 9), TrueLabels(table(), frequency), propensity, keep=lambda *parts: kept.append(parts)
    )
    assert {key: result[key] for key in metrics.result()} == pytest.approx(metrics.result(), abs=1e-12)
    assert result["rows"] == metrics.rows < TEXTS
    shown = {
        int(text): part.tolist()
        for texts, true, _, _ in kept
        if len(texts)
        for text, part in zip(texts, np.split(true.values, true.offsets[1:-1]), strict=True)
    }
    assert shown == {text: row for text, row in enumerate(seen) if row}


def test_true_labels_by_position() -> None:
    truth = TrueLabels(table())
    positions = np.array([22, 0, 9, 8, 9])
    got = truth.of(positions)
    assert len(truth) == TEXTS
    assert [part.tolist() for part in np.split(got.values, got.offsets[1:-1])] == [TRUE[i] for i in positions]


@given(st.sets(st.tuples(st.integers(0, TEXTS - 1), st.integers(0, LABELS - 1)), max_size=60))
@settings(max_examples=40, deadline=None)
def test_filtered_pairs_are_as_if_never_predicted(excluded: set[tuple[int, int]]) -> None:
    pairs = np.array(sorted(excluded), np.int64).reshape(-1, 2)[::-1]
    filters = Filters(pairs[:, 0], pairs[:, 1])
    result = evaluate_split(fake_model, batches(5, 6), TrueLabels(table()), PROPENSITY, filters=filters)
    want = direct(excluded)
    assert {key: result[key] for key in want} == pytest.approx(want, abs=1e-12)


def test_as_many_more_predictions_are_asked_for_as_a_text_has_filters() -> None:
    asked = []
    frequency = np.ones(500, np.int64)

    def model(batch: Positions, k: int) -> tuple[np.ndarray, np.ndarray]:
        asked.append(k)
        labels = np.arange(k)[None].repeat(len(batch.texts), 0)
        return labels, -labels.astype(np.float32)

    seen = []
    evaluate_split(
        model,
        [Positions(np.array([0, 1])), Positions(np.array([2]))],
        TrueLabels(table()),
        Propensity(frequency, 300),
        filters=Filters(np.array([1, 1, 0, 7, 7, 7]), np.array([0, 2, 1, 3, 4, 5])),
        keep=lambda rows, true, labels, scores: seen.append((rows, labels, scores)),
    )
    assert asked == [103, 103], "the same for each batch, so that ranks agree"
    (_, labels, scores), (rows, other, _) = seen
    assert labels[:, :3].tolist() == [[0, 2, 3], [1, 3, 4]]
    assert labels.shape == (2, 100)
    assert scores[1, :2].tolist() == [-1, -3]
    assert (rows.tolist(), other[0, :3].tolist()) == ([2], [0, 1, 2])


def test_too_few_predictions_end_in_none() -> None:
    filters = Filters(np.array([5]), np.array([3]))
    labels, scores = filters.apply(np.array([5, 6]), np.array([[3, 1], [3, 1]]), np.array([[2, 1], [2, 1]], np.float32))
    assert labels.tolist() == [[1, -1], [3, 1]]
    assert scores.tolist() == [[1, -np.inf], [2, 1]]


def test_ranks_add_up() -> None:
    whole = evaluate_split(fake_model, batches(), TrueLabels(table()), PROPENSITY)
    vectors: list[np.ndarray] = []

    def record(values: np.ndarray) -> np.ndarray:
        vectors.append(values)
        return values

    for texts in (np.arange(0, TEXTS, 2), np.arange(1, TEXTS, 2), np.arange(0)):  # the third rank has no text
        evaluate_split(fake_model, [Positions(texts)], TrueLabels(table()), PROPENSITY, sum_ranks=record)
    total = np.sum(vectors, axis=0)
    result = evaluate_split(fake_model, [], TrueLabels(table()), PROPENSITY, sum_ranks=lambda values: total)
    assert result == pytest.approx(whole, abs=1e-12)


def test_popularity_answers_the_most_frequent_labels() -> None:
    labels, scores = Popularity(np.array([1, 5, 5, 9, 0, 5]))(Positions(np.arange(2)), 3)
    assert labels.tolist() == [[3, 1, 2]] * 2, "ties: lower label first"
    assert scores.tolist() == [[9, 5, 5]] * 2
    popular = Popularity(FREQUENCY)
    assert popular(Positions(np.arange(1)), 2)[0].tolist() == [np.argsort(-FREQUENCY)[:2].tolist()]
    assert popular(Positions(np.arange(1)), 99)[0].tolist() == [np.argsort(-FREQUENCY).tolist()], "more than was asked before"
    assert [len(batch.texts) for batch in position_batches(np.arange(10), 4)] == [4, 4, 2]


def test_filters_come_from_the_prepared_folder(tmp_path: Path) -> None:
    pairs = pa.RecordBatch.from_arrays([pa.array([0, 2, 2], pa.int64()), pa.array([1, 0, 3], pa.int32())], schema=FILTER_SCHEMA)
    write_arrow(tmp_path / "filter_test.arrow", pairs)
    filters = load_filters(tmp_path, "test")
    assert filters is not None
    assert (len(filters), filters.most, filters.of(np.array([2, 1])).values.tolist()) == (3, 2, [0, 3])
    assert load_filters(tmp_path, "train") is None
    write_arrow(tmp_path / "filter_train.arrow", pairs.slice(1))
    dev = load_filters(tmp_path, "dev")
    assert dev is not None
    assert len(dev) == 2


def test_the_report(tmp_path: Path) -> None:
    model = {"P@1": 0.5, "P@3": 0.25, "PSP@1": 0.125, "nDCG@1": 0.5, "R@1": 0.2, "R@100": 0.75, "r_at_5_freq_1": 0.03, "rows": 11454}
    baseline = {"P@1": 0.04, "R@100": 0.01, "r_at_5_freq_1": 0.0}
    path = write_evaluation(tmp_path, "test", model, baseline, step=7)
    page = json.loads(path.read_text())
    assert path == tmp_path / "evaluate-test.json"
    assert (page["split"], page["step"], page["metrics"], page["most_frequent_labels"]) == ("test", 7, model, baseline)
    out = io.StringIO()
    print_metrics(model, baseline, Console(file=out, width=80))
    lines = [" ".join(line.split()) for line in out.getvalue().splitlines() if line.strip()]
    assert lines[:2] == ["11,454 texts, percent", "@1 @3 @5 @10 @100"]
    at = lines.index("precision 50.00 25.00")
    assert lines[at + 1] == "most frequent labels 4.00"
    at = lines.index("recall 20.00 75.00")
    assert lines[at + 1] == "most frequent labels 1.00"
    assert "1 2-5 6-20 21-100 over 100" in lines
    assert lines[-3:-1] == ["labels seen so often 3.00", "most frequent labels 0.00"]
    assert max(map(len, out.getvalue().splitlines())) <= 80
    assert lines[-1] == "P@1 is 12.5 times that of always answering the most frequent labels."


def score_and_write(world: World, config: Config, out: str) -> None:
    """What training does at an evaluation, with initial weights."""
    prepared = open_prepared(config)
    encoder = make_encoder(config, prepared.manifest)
    classifier = make_classifier(config, prepared.order, encoder.width, world)
    engine = frozen_engine(config, encoder, world)
    kept: list[tuple[np.ndarray, Ragged]] = []
    result = evaluate_texts(config, prepared, engine, classifier, world, "test", keep=lambda rows, true, *_: kept.append((rows, true)))
    some = evaluate_texts(config, prepared, engine, classifier, world, "test", limit=9)
    page = {"all": result, "some": some, "rows": np.concatenate([rows for rows, _ in kept]).tolist()}
    (Path(out) / f"{world.size}-{world.rank}.json").write_text(json.dumps(page))


def test_labels_never_trained_on_are_no_answer(tmp_path: Path) -> None:
    config = make_prepared(tmp_path, texts=60, overrides=["evaluate.labels=seen"])
    prepared, world = open_prepared(config), join_world("cpu")
    encoder = make_encoder(config, prepared.manifest)
    classifier, engine = make_classifier(config, prepared.order, encoder.width, world), frozen_engine(config, encoder, world)
    unseen = np.flatnonzero(load_frequency(prepared.folder) == 0)
    assert len(unseen) > 9
    found: dict[str, np.ndarray] = {}
    for labels in ("all", "seen"):
        config.evaluate.labels = labels
        kept: list[np.ndarray] = []
        evaluate_texts(
            config, prepared, engine, classifier, world, "test", keep=lambda rows, true, labels, scores, kept=kept: kept.append(labels)
        )
        found[labels] = np.concatenate(kept)
    assert np.isin(found["all"], unseen).any()
    assert not np.isin(found["seen"], unseen).any()
    answered = 101 - len(unseen)
    assert ((found["seen"] >= 0).sum(1) == min(answered, found["seen"].shape[1])).all()


def test_one_and_two_ranks_agree_on_a_prepared_folder(tmp_path: Path) -> None:
    config = make_prepared(tmp_path, texts=184, overrides=["evaluate.batch_size=7"])
    score_and_write(join_world("cpu"), config, str(tmp_path))  # not left again: DeepSpeed keeps the first group of a process
    run_ranks(2, score_and_write, config, str(tmp_path))
    one, two_a, two_b = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1"))
    assert one["rows"] != sorted(one["rows"]), "scored by length"
    assert sorted(one["rows"]) == sorted(two_a["rows"] + two_b["rows"]) == list(range(46))
    for part, rows in (("all", 46), ("some", 9)):
        seconds = [page[part].pop("seconds") for page in (one, two_a, two_b)]
        assert min(seconds) > 0
        assert one[part]["rows"] == rows
        assert two_a[part] == two_b[part] == pytest.approx(one[part], abs=1e-9)
    assert one["all"]["R@100"] > 0.9, "100 of 101 labels"
    baseline = evaluate_baseline(config, open_prepared(config), "test")
    assert baseline["rows"] == 46
    assert baseline["P@1"] > 0
    assert set(baseline) == set(one["all"])
