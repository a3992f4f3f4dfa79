"""Label order: a partition of the labels into rows and groups, pure in seed and data, that finds groups which are there."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import make_prepared

from haste_dist import bisection
from haste_dist.bisection import bisect, cohesion
from haste_dist.config import Config
from haste_dist.errors import DataError
from haste_dist.label_groups import (
    GROUPS_FILE,
    LABELS_FILE,
    ORDER_SCHEMA,
    head_size,
    label_order_is_current,
    load_label_order,
    make_label_order,
    order_labels,
)
from haste_dist.manifest import read_arrow, read_manifest


def unit_vectors(n: int, width: int = 12, seed: int = 0) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((n, width)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def planted(clusters: int, size: int, width: int = 24, noise: float = 0.15, seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    """Shuffled unit vectors around ``clusters`` random centres, and the cluster of each."""
    rng = np.random.default_rng(seed)
    cluster = rng.permutation(np.repeat(np.arange(clusters), size))
    centre = rng.standard_normal((clusters, width)).astype(np.float32)
    x = torch.from_numpy(centre[cluster] + noise * rng.standard_normal((len(cluster), width)).astype(np.float32))
    return torch.nn.functional.normalize(x), cluster


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


@settings(max_examples=60, deadline=None)
@given(
    labels=st.integers(1, 300),
    group_size=st.sampled_from([1, 16, 32, 64, 128]),
    head_fraction=st.sampled_from([0.0, 0.01, 0.1, 0.5, 0.99, 1.0]),
    method=st.sampled_from(["semantic", "random", "frequency"]),
    seed=st.integers(0, 2**31 - 1),
)
def test_every_label_has_one_row(labels: int, group_size: int, head_fraction: float, method: str, seed: int) -> None:
    frequency = np.random.default_rng(seed).integers(0, 9, labels)
    order, report = order_labels(
        frequency, lambda: unit_vectors(labels), head_fraction=head_fraction, group_size=group_size, method=method, seed=seed, iterations=2
    )
    head = order.head_rows
    assert order.rows == head + order.groups * group_size == len(order.frequency_of_row)
    assert order.labels == labels
    real = order.label_of_row >= 0
    assert np.array_equal(np.sort(order.label_of_row[real]), np.arange(labels))
    assert np.array_equal(order.label_of_row[order.row_of_label], np.arange(labels))
    assert np.array_equal(order.frequency_of_row[real], frequency[order.label_of_row[real]])
    assert order.frequency_of_row[~real].sum() == 0
    assert real.argmin() == labels or real.all()  # padding stands at the end ...
    assert order.rows - labels < group_size  # ... and in the last group only
    assert head >= head_fraction * labels - 1e-6
    assert head == labels or head % group_size == 0
    assert head - group_size < head_fraction * labels
    rank = list(zip(-frequency, range(labels), strict=True))
    assert sorted(rank[i] for i in order.label_of_row[:head]) == sorted(rank)[:head]  # the most frequent, ties by label id
    assert (report["cohesion"] is not None) == (method == "semantic" and group_size > 1 and head < labels)


def test_head_size_of_decimal_fractions() -> None:
    assert head_size(30, 0.1, 1) == 3  # 30 * 0.1 is a little over 3 in binary
    assert head_size(1000, 0.07, 1) == 70
    assert head_size(10, 0.01, 1) == 1
    assert head_size(100, 0.1, 16) == 16


def test_frequency_order_and_random_order() -> None:
    frequency = np.array([1, 5, 5, 0, 9, 2])
    order, _ = order_labels(frequency, unit_vectors, head_fraction=0.0, group_size=1, method="frequency")  # type: ignore[arg-type]
    assert order.label_of_row.tolist() == [4, 1, 2, 5, 0, 3]
    many = np.zeros(200, np.int64)
    shuffled = [order_labels(many, unit_vectors, head_fraction=0.0, group_size=16, method="random", seed=s)[0] for s in (1, 1, 2)]  # type: ignore[arg-type]
    assert shuffled[0].fingerprint == shuffled[1].fingerprint != shuffled[2].fingerprint


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 400), group_size=st.sampled_from([16, 32, 64, 128]), seed=st.integers(0, 1000), iterations=st.integers(1, 4))
def test_bisect_is_a_pure_permutation(n: int, group_size: int, seed: int, iterations: int) -> None:
    x = torch.from_numpy(unit_vectors(n, seed=seed))
    with threads(1):
        order = bisect(x, group_size, iterations=iterations, seed=seed)
    assert torch.equal(order.sort().values, torch.arange(n))
    with threads(2):
        assert torch.equal(order, bisect(x, group_size, iterations=iterations, seed=seed))


@pytest.mark.parametrize("iterations", [1, 3])
def test_padding_goes_last_in_every_cut(iterations: int) -> None:
    """Else the last group would not be the short one, and all groups behind it would be cut in the wrong places."""
    x = torch.from_numpy(unit_vectors(64)).view(2, 32, 12)
    padding = torch.zeros(2, 32, dtype=torch.bool)
    padding[1, [0, 3, 9, 20, 31]] = True
    x = x.masked_fill(padding[..., None], 0)
    order = bisection._cut(x, padding, torch.rand(2, 32), x.double().sum(1), torch.zeros(2, 12), 16, iterations)
    assert order[1, -5:].sort().values.tolist() == [0, 3, 9, 20, 31]
    assert torch.equal(order.sort(dim=1).values, torch.arange(32).expand(2, 32))


def test_order_is_the_same_for_any_threads_and_any_block(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.from_numpy(unit_vectors(9001, width=40))
    with threads(1):
        order = bisect(x, 16)
    with threads(4):
        assert torch.equal(order, bisect(x, 16))
    monkeypatch.setattr(bisection, "BLOCK_BYTES", 2**16)
    monkeypatch.setattr(bisection, "EXACT_ROWS", 100)
    assert torch.equal(order, bisect(x, 16))
    assert not torch.equal(order, bisect(x, 16, seed=1))


def test_sums_do_not_round() -> None:
    """What the independence of threads rests on: the largest sums and products that can occur are exact in float32."""
    ones = torch.ones(1, bisection.EXACT_ROWS, 1)
    grid = bisection._on_grid(torch.full((1, bisection.EXACT_ROWS, 1), 0.99951171875))
    assert grid[0, 0, 0] == 2047 / 2048
    assert bisection._exact_sum(ones[..., 0], grid).item() == bisection.EXACT_ROWS * 2047 / 2048
    rows = 3 * bisection.EXACT_ROWS + 1  # times 2047 is odd and over 2^24: float32 cannot hold this one
    assert bisection._exact_sum(torch.ones(1, rows), grid[:, :1].expand(1, rows, 1)).item() == rows * 2047 / 2048
    x = bisection._on_grid(torch.from_numpy(unit_vectors(500, 768)))
    exact = x.double() @ x.double().T
    assert torch.equal((x @ x.T).double(), exact)


@pytest.mark.parametrize(("clusters", "size", "group_size"), [(8, 16, 16), (16, 32, 16), (5, 32, 32), (4, 128, 64), (7, 48, 16)])
def test_planted_clusters_are_found(clusters: int, size: int, group_size: int) -> None:
    x, cluster = planted(clusters, size)
    order = bisect(x, group_size)
    groups = cluster[order.numpy()].reshape(-1, group_size)
    assert (groups == groups[:, :1]).all(axis=1).mean() >= 0.6  # a cut into halves may have to go through a cluster
    truth = cohesion(x, torch.from_numpy(cluster).argsort(stable=True), group_size)
    chance = cohesion(x, torch.randperm(len(x), generator=torch.Generator().manual_seed(0)), group_size)
    assert cohesion(x, order, group_size) > chance + 0.8 * (truth - chance)


def test_neighbouring_groups_are_close() -> None:
    """Points on a half circle: groups must come out as arcs, one beside the other, as one walk along it."""
    angle = torch.linspace(0, torch.pi, 512)[torch.randperm(512, generator=torch.Generator().manual_seed(1))]
    x = torch.stack([angle.cos(), angle.sin()], 1)
    middle = angle[bisect(x, 16)].view(-1, 16).mean(1)
    steps = middle.diff().abs()
    assert steps.max() < 0.2
    assert (middle.diff() > 0).all() or (middle.diff() < 0).all()


def test_cohesion_is_the_mean_cosine_to_the_centroid(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.from_numpy(unit_vectors(40)).double()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    cosines = []
    for group in order.split(16):  # the last has 8
        centre = torch.nn.functional.normalize(x[group].mean(0), dim=0)
        cosines += (x[group] @ centre).tolist()
    assert cohesion(x, order, 16) == pytest.approx(np.mean(cosines), rel=1e-9)
    monkeypatch.setattr(bisection, "BLOCK_BYTES", 1)
    assert cohesion(x, order, 16) == pytest.approx(np.mean(cosines), rel=1e-9)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Config:
    return make_prepared(tmp_path_factory.mktemp("groups"), labels=101, overrides=["groups.method=semantic", "run.seed=3"])


def test_files_round_trip(prepared: Config) -> None:
    folder = Path(prepared.data.prepared)
    manifest = read_manifest(folder)
    order = load_label_order(folder)
    assert (order.labels, order.head_rows, order.groups, order.group_size, order.rows) == (101, 16, 6, 16, 112)
    table = read_arrow(folder / LABELS_FILE, ORDER_SCHEMA).to_pylist()
    for row, line in enumerate(table):
        label = line["label"]
        assert line["row"] == row
        assert line["group"] == (-1 if row < 16 else (row - 16) // 16)
        assert line["text"] == (f"w{7 * label % 200}" if label >= 0 else "")
        assert line["frequency"] == order.frequency_of_row[row]
    page = json.loads((folder / GROUPS_FILE).read_text())
    assert page["fingerprint"] == order.fingerprint
    assert page["cohesion"] > page["cohesion_random"]
    assert label_order_is_current(prepared, folder, manifest)


def test_rerun_writes_the_same_bytes(prepared: Config) -> None:
    folder = Path(prepared.data.prepared)
    before = [(folder / name).read_bytes() for name in (LABELS_FILE, GROUPS_FILE)]
    page = make_label_order(prepared, folder, read_manifest(folder))
    assert set(page["seconds"]) == {"embedding", "grouping"}
    assert before == [(folder / name).read_bytes() for name in (LABELS_FILE, GROUPS_FILE)]
    assert not [path for path in folder.iterdir() if path.suffix == ".part"]


@pytest.mark.parametrize(
    "change", ["output.group_size=32", "output.head_fraction=0.3", "groups.method=random", "run.seed=4", "groups.iterations=2"]
)
def test_other_settings_make_the_order_stale(tmp_path: Path, change: str) -> None:
    config = make_prepared(tmp_path)
    folder = Path(config.data.prepared)
    manifest = read_manifest(folder)
    part, name = change.split("=")[0].split(".")
    other = make_prepared(tmp_path / "other", overrides=[change])
    assert label_order_is_current(config, folder, manifest)
    assert getattr(getattr(other, part), name) != getattr(getattr(config, part), name)
    assert not label_order_is_current(other, folder, manifest)
    manifest.fingerprint = "of other data"
    assert not label_order_is_current(config, folder, manifest)


def test_damage_is_named_in_one_line(tmp_path: Path) -> None:
    config = make_prepared(tmp_path)
    folder = Path(config.data.prepared)
    manifest = read_manifest(folder)
    page, table = (folder / GROUPS_FILE).read_text(), (folder / LABELS_FILE).read_bytes()

    def refused(match: str) -> None:
        with pytest.raises(DataError, match=match) as caught:
            load_label_order(folder)
        assert "\n" not in str(caught.value)
        assert not label_order_is_current(config, folder, manifest)

    (folder / GROUPS_FILE).unlink()
    refused(r"groups\.json: no such file; run haste prepare")
    (folder / GROUPS_FILE).write_text(page[:50])
    refused(r"groups\.json: damaged")
    (folder / GROUPS_FILE).write_text(page.replace('"schema_version": 1', '"schema_version": 99'))
    refused("schema version 99")
    (folder / GROUPS_FILE).write_text(page.replace('"head_rows": 16', '"head_rows": 32'))
    refused(r"labels\.arrow: does not give each of the 101 labels one row")
    (folder / GROUPS_FILE).write_text(page)
    (folder / LABELS_FILE).write_bytes(table[:-100])
    refused(r"labels\.arrow: not a complete Arrow file")
    (folder / LABELS_FILE).unlink()
    refused(r"labels\.arrow: no such file")
    other = make_prepared(tmp_path / "other", overrides=["groups.method=random"])
    (folder / LABELS_FILE).write_bytes((Path(other.data.prepared) / LABELS_FILE).read_bytes())
    refused("is not the order that groups.json tells of")
