"""Metrics: against pyxclib's own values, against a loop over texts, and that batches and ranks only add up."""

import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from haste_dist.errors import ConfigError
from haste_dist.metrics import KS, RECALL_KS, FrequencyRecall, Metrics, Propensity, Ragged, match

FIXTURES = sorted((Path(__file__).parent / "fixtures").glob("pyxclib_*.json"))


def case_propensity(case: dict) -> Propensity:
    return Propensity(np.array(case["frequency"]), case["train_rows"], case["a"], case["b"])


def by_hand(predicted: list[list[int]], true: list[list[int]], weight: np.ndarray) -> dict[str, float]:
    """The definitions, one text and one place at a time."""
    n, out = len(true), {}
    for k in KS:
        p = ndcg = psp = best_psp = psdcg = best_psdcg = 0.0
        for row, labels in zip(predicted, true, strict=True):
            places = [(place, label) for place, label in enumerate(row[:k]) if label in labels]
            heaviest = sorted((weight[label] for label in labels), reverse=True)[:k]
            norm = sum(1 / math.log2(place + 2) for place in range(min(k, len(labels)))) or 1.0
            p += len(places) / k
            ndcg += sum(1 / math.log2(place + 2) for place, _ in places) / norm
            psp += sum(weight[label] for _, label in places) / k
            best_psp += sum(heaviest) / k
            psdcg += sum(weight[label] / math.log2(place + 2) for place, label in places) / norm
            best_psdcg += sum(w / math.log2(place + 2) for place, w in enumerate(heaviest)) / norm
        out |= {f"P@{k}": p / n, f"nDCG@{k}": ndcg / n}
        out |= {f"PSP@{k}": psp / best_psp if best_psp else 0.0, f"PSnDCG@{k}": psdcg / best_psdcg if best_psdcg else 0.0}
    for k in RECALL_KS:
        out[f"R@{k}"] = sum(len(set(row[:k]) & set(labels)) / max(1, len(labels)) for row, labels in zip(predicted, true, strict=True)) / n
    return out


@st.composite
def ranked_texts(draw: st.DrawFn) -> tuple[list[list[int]], list[list[int]], np.ndarray]:
    labels = draw(st.integers(1, 12))
    n, width = draw(st.integers(1, 6)), draw(st.integers(1, 12))
    ids = st.integers(0, labels - 1)
    true = [draw(st.lists(ids, unique=True, max_size=labels)) for _ in range(n)]
    predicted = []
    for _ in range(n):
        row = draw(st.lists(ids, unique=True, max_size=min(width, labels)))
        predicted.append(row + [-1] * (width - len(row)))
    frequency = np.array(draw(st.lists(st.integers(0, 300), min_size=labels, max_size=labels)))
    return predicted, true, frequency


@pytest.mark.parametrize("path", FIXTURES, ids=lambda path: path.stem)
def test_equal_to_pyxclib(path: Path) -> None:
    case = json.loads(path.read_text())
    metrics = Metrics(case_propensity(case))
    metrics.add(case["predicted"], case["true"])
    assert metrics.result() == pytest.approx(case["expected"], abs=1e-6, rel=0)


def test_there_are_fixtures() -> None:
    assert len(FIXTURES) >= 4


@given(ranked_texts())
@settings(max_examples=200, deadline=None)
def test_equal_to_the_definitions(texts: tuple[list[list[int]], list[list[int]], np.ndarray]) -> None:
    predicted, true, frequency = texts
    propensity = Propensity(frequency, 300)
    metrics = Metrics(propensity)
    metrics.add(predicted, true)
    assert metrics.result() == pytest.approx(by_hand(predicted, true, propensity.weights(np.arange(len(frequency)))), abs=1e-12)


@given(ranked_texts(), st.data())
@settings(max_examples=50, deadline=None)
def test_batches_and_ranks_add_up(texts: tuple[list[list[int]], list[list[int]], np.ndarray], data: st.DataObject) -> None:
    predicted, true, frequency = texts
    cut = data.draw(st.integers(0, len(true)))
    propensity = Propensity(frequency, 300)
    whole, first, second = Metrics(propensity), Metrics(propensity), Metrics(propensity)
    rare, rare_first, rare_second = FrequencyRecall(frequency), FrequencyRecall(frequency), FrequencyRecall(frequency)
    for one in (whole, rare):
        one.add(predicted, true)
    for one in (first, rare_first):
        one.add(np.array(predicted)[:cut], true[:cut])  # cut = 0: a rank without texts
    for one in (second, rare_second):
        one.add(np.array(predicted)[cut:], true[cut:])
    first.merge(second.state())
    rare_first.merge(rare_second.state())
    assert first.rows == len(true)
    assert first.result() == pytest.approx(whole.result(), abs=1e-12)
    assert rare_first.result() == pytest.approx(rare.result(), abs=1e-12)


def test_unseen_label_stays_in_the_denominator() -> None:
    metrics = Metrics(Propensity(np.array([9, 0]), 10))
    metrics.add([[0, -1]], [[0, 1]])
    result = metrics.result()
    assert (result["R@5"], result["P@1"]) == (0.5, 1.0)
    assert 0 < result["PSP@1"] < 1, "the best reachable at 1 is the unseen label, which weighs more"


def test_a_text_without_labels_counts() -> None:
    metrics = Metrics()
    metrics.add([[3], [4]], [[3], []])
    assert metrics.result() == {"P@1": 0.5, "P@3": 1 / 6, "P@5": 0.1} | {f"nDCG@{k}": 0.5 for k in KS} | {f"R@{k}": 0.5 for k in RECALL_KS}


def test_nothing_added_gives_zeros() -> None:
    assert set(Metrics(Propensity(np.array([1]), 1)).result().values()) == {0.0}
    assert FrequencyRecall(np.array([1])).result() == {}


def test_recall_by_frequency() -> None:
    frequency = np.array([0, 1, 2, 5, 6, 20, 21, 100, 101, 10**6])
    rare = FrequencyRecall(frequency)
    rare.add([[1, 2, -1, -1, -1, 3], [9, 8, 7, 6, 5, 4]], [[0, 1, 2, 3], [4, 5, 6, 8, 9]])  # 3 and 4 are sixth: too late
    assert rare.result() == {
        "r_at_5_freq_1": 1.0,
        "r_at_5_freq_2_5": 0.5,
        "r_at_5_freq_6_20": 0.5,
        "r_at_5_freq_21_100": 1.0,
        "r_at_5_freq_over_100": 1.0,
    }
    absent = FrequencyRecall(frequency)
    absent.add([[5]], [[1]])
    assert absent.result() == {"r_at_5_freq_1": 0.0}, "a bin without true pairs has no value"


def test_labels_may_be_repeated_unsorted_or_huge() -> None:
    big = 2**31 - 2
    found = match([[big, 0, 5], [0, big, -1]], [[5, big, 5], [7]])
    assert found.hits.tolist() == [[True, False, True], [False, False, False]]
    assert found.true_count.tolist() == [2, 1]
    assert found.label[found.place[found.hits]].tolist() == [big, 5]


def test_wrong_number_of_rows_is_refused() -> None:
    with pytest.raises(ValueError, match="for 2 texts"):
        match([[1]], [[1], [2]])


def test_ragged_from_arrow_slices_and_chunks() -> None:
    column = pa.chunked_array([pa.array([[1, 2], [], [3]], pa.list_(pa.int32())), pa.array([[4], [5, 6]], pa.list_(pa.int32()))])
    whole = Ragged.of(column.slice(1, 3))
    assert (whole.values.tolist(), whole.offsets.tolist()) == ([3, 4], [0, 0, 1, 2])
    assert whole.rows.tolist() == [1, 2]
    part = Ragged.of(column.chunk(0).slice(1))
    assert (part.values.tolist(), part.offsets.tolist()) == ([3], [0, 0, 1])


def test_infinite_weights_are_refused() -> None:
    Propensity(np.array([1, 2]), 10, b=0.0)
    with pytest.raises(ConfigError, match="propensity_b"):
        Propensity(np.array([1, 0]), 10, b=0.0)
