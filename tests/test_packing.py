"""Packing and seriation: a partition, pure in seed and data, that finds groups which are there."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from haste_dist import bisection, packing
from haste_dist.bisection import cohesion, halve, on_grid, seriate
from haste_dist.errors import DataError
from haste_dist.packing import nearest, pack

CPU = torch.device("cpu")


def unit_vectors(n: int, width: int = 12, seed: int = 0) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(n, width, generator=torch.Generator().manual_seed(seed)))


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


def packed(x: torch.Tensor, group_size: int, **more: object) -> torch.Tensor:
    return pack(x, torch.arange(len(x)), group_size, **more)  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 500),
    group_size=st.sampled_from([2, 16, 32, 128]),
    seed=st.integers(0, 1000),
    search=st.sampled_from([16, 64, 1000]),
    copies=st.booleans(),
    kept=st.integers(0, 3),
)
def test_groups_are_a_partition(n: int, group_size: int, seed: int, search: int, copies: bool, kept: int) -> None:
    """Each row once, kept groups whole, and the same for any number of threads and blocks; also where many vectors are equal."""
    x = unit_vectors(n, seed=seed)
    if copies:
        x = x[torch.arange(n) % 7]
    stay = torch.randperm(n)[: min(kept, n // group_size) * group_size].view(-1, group_size)
    rows = torch.from_numpy(np.setdiff1d(np.arange(n), stay.numpy()))
    with threads(1):
        order = pack(x, rows, group_size, iterations=2, seed=seed, search=search, kept=stay)
    assert torch.equal(order.sort().values, torch.arange(n))
    whole = n // group_size * group_size
    assert {frozenset(g) for g in stay.tolist()} <= {frozenset(g) for g in order[:whole].view(-1, group_size).tolist()}
    with threads(2), pytest.MonkeyPatch.context() as patch:
        for module in (bisection, packing):
            patch.setattr(module, "BLOCK_BYTES", 2**10)
        patch.setattr(bisection, "EXACT_ROWS", 100)
        patch.setattr(packing, "COMPACT", 0.5)
        again = pack(x, rows[torch.randperm(len(rows))], group_size, iterations=2, seed=seed, search=search, kept=stay)
    assert torch.equal(order, again)


@given(
    seeds=st.integers(1, 5), m=st.integers(1, 900), count=st.integers(1, 9), values=st.sampled_from([2, 5, 1000]), seed=st.integers(0, 99)
)
def test_nearest_is_exact(seeds: int, m: int, count: int, values: int, seed: int) -> None:
    similar = torch.randint(0, values, (seeds, m), generator=torch.Generator().manual_seed(seed)) / values
    expected = similar.sort(dim=1, descending=True, stable=True).indices[:, : min(count, m)]
    assert torch.equal(nearest(similar, min(count, m)), expected)


def test_a_vector_goes_to_the_nearest_of_the_seeds_that_want_it() -> None:
    similar = torch.tensor([[1.0, 0.0, 0.5, 0.75, 0.25, 0.0], [0.0, 1.0, 0.75, 0.5, 0.0, 0.25]])
    groups = packing._choose(similar, 4, 2)
    assert [sorted(group) for group in groups.tolist()] == [[0, 3], [1, 2]]
    same = torch.ones(2, 3)  # both want all three, equally: the first seed has them
    assert packing._choose(same, 3, 2).tolist() == [[0, 1]]
    none = torch.tensor([[1.0, 0.5, 0.75], [0.25, 1.0, 0.5]])  # neither gets three, so the first goes ahead
    assert packing._choose(none, 3, 3).tolist() == [[0, 2, 1]]


@pytest.mark.parametrize(("clusters", "size", "group_size"), [(8, 16, 16), (16, 32, 16), (5, 32, 32), (4, 128, 64), (7, 48, 16)])
def test_planted_clusters_are_found(clusters: int, size: int, group_size: int) -> None:
    x, cluster = planted(clusters, size)
    groups = cluster[packed(x, group_size).numpy()].reshape(-1, group_size)
    assert (groups == groups[:, :1]).all()


def test_no_worse_than_one_seed_after_the_other() -> None:
    """The authors' greedy search, by definition: a free vector in random order takes its G - 1 nearest free ones."""
    x = on_grid(planted(300, 8, noise=0.8)[0], CPU)
    free, greedy = torch.ones(len(x), dtype=torch.bool), []
    for row in torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).tolist():
        if free[row]:
            group = (x @ x[row]).masked_fill(~free, -2).topk(min(16, int(free.sum()))).indices
            free[group] = False
            greedy.append(group)
    chance = cohesion(x, torch.randperm(len(x), generator=torch.Generator().manual_seed(1)), 16)
    assert cohesion(x, packed(x, 16), 16) > cohesion(x, torch.cat(greedy), 16) - 0.01 > chance + 0.1
    cut = cohesion(x, packed(x, 16, search=1024), 16)
    assert cut > chance + 0.1


def test_a_killed_packing_keeps_its_finished_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = unit_vectors(700)
    whole = packed(x, 16, search=200)
    real, calls = packing._pack_part, []

    def third_dies(*args: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(packing, "_pack_part", third_dies)
    with pytest.raises(KeyboardInterrupt):
        packed(x, 16, search=200, folder=tmp_path)
    counted: list[int] = []
    assert torch.equal(packed(x, 16, search=200, folder=tmp_path, done=counted.append), whole)
    assert len(counted) == 4
    assert len(calls) == 3 + 2  # of four parts, two were kept
    assert sum(counted) == 700


@pytest.mark.parametrize("count", [3, 5])
def test_any_number_of_devices_gives_the_same_order(count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Halves and parts are worked on at the same time, one a device; what is finished when one dies is kept."""
    x = unit_vectors(1900)[torch.arange(1900) % 1850]
    search, stay = 1900 // 13, torch.arange(64).view(4, 16)
    wanted = pack(x, torch.arange(64, 1900), 16, search=search, kept=stay)
    real, lock = packing._pack_part, threading.Lock()
    together, most, calls, dies = threading.Barrier(count, timeout=20), 0, 0, 10
    working = 0

    def watched(*args: object) -> torch.Tensor:
        nonlocal calls, working, most
        with lock:
            calls, working = calls + 1, working + 1
            mine, most = calls, max(most, working)
        if mine <= count:
            together.wait()  # of one device alone, nobody else would come
        try:
            if mine == dies:
                raise DataError("out of luck")
            return real(*args)  # type: ignore[arg-type]
        finally:
            with lock:
                working -= 1

    def grouped() -> torch.Tensor:
        told: list[int] = []
        order = pack(x, torch.arange(64, 1900), 16, search=search, kept=stay, devices=[CPU] * count, folder=tmp_path, done=told.append)
        assert sum(told) == 1900 - 64
        return order

    monkeypatch.setattr(packing, "_pack_part", watched)
    with pytest.raises(DataError, match="out of luck"):
        grouped()
    assert most == count
    finished = len(list(tmp_path.glob("part-*.npy")))
    assert dies - 1 <= finished == calls - 1 < 16
    calls, dies = count, 0
    assert torch.equal(grouped(), wanted)
    assert calls - count == 16 - finished
    monkeypatch.undo()
    assert torch.equal(pack(x, torch.arange(64, 1900), 16, search=search, kept=stay, devices=[CPU] * count), wanted)


def test_float16_in_a_mapped_file_gives_the_same_groups(tmp_path: Path) -> None:
    x = on_grid(unit_vectors(500), CPU)
    np.save(tmp_path / "x.npy", x.numpy().astype(np.float16), allow_pickle=False)
    mapped = torch.from_numpy(np.load(tmp_path / "x.npy", mmap_mode="c", allow_pickle=False))
    assert torch.equal(packed(mapped, 16, search=100), packed(x, 16, search=100))


def test_halves_have_their_sizes_and_meaning(monkeypatch: pytest.MonkeyPatch) -> None:
    x, cluster = planted(2, 64)
    left, right = halve(x, torch.arange(128), 64, iterations=8, seed=0, device=CPU)
    assert torch.equal(torch.cat([left, right]).sort().values, torch.arange(128))
    assert len(set(cluster[left])) == len(set(cluster[right])) == 1
    monkeypatch.setattr(bisection, "SAMPLE", 50)
    assert len(halve(x, torch.arange(10, 128), 30, iterations=3, seed=1, device=CPU)[0]) == 30


def test_sums_do_not_round() -> None:
    """What the independence of threads rests on: the largest sums and products that can occur are exact in float32."""
    ones = torch.ones(1, bisection.EXACT_ROWS, 1)
    grid = on_grid(torch.full((1, bisection.EXACT_ROWS, 1), 0.99951171875), CPU)
    assert grid[0, 0, 0] == 2047 / 2048
    assert bisection._exact_sum(ones[..., 0], grid).item() == bisection.EXACT_ROWS * 2047 / 2048
    rows = 3 * bisection.EXACT_ROWS + 1  # times 2047 is odd and over 2^24: float32 cannot hold this one
    assert bisection._exact_sum(torch.ones(1, rows), grid[:, :1].expand(1, rows, 1)).item() == rows * 2047 / 2048
    x = on_grid(unit_vectors(500, 768), CPU)
    exact = x.double() @ x.double().T
    assert torch.equal((x @ x.T).double(), exact)
    taken = (x @ x.T).add_(torch.ones(500), alpha=-packing.TAKEN)  # of vectors that have a group, which only must come last
    assert taken.max() < -1.5


@pytest.mark.parametrize("count", [1, 2, 3, 333])
def test_seriation_is_a_pure_permutation(count: int) -> None:
    x = unit_vectors(count, width=40)
    with threads(1):
        order = seriate(x, iterations=3, seed=5)
    assert torch.equal(order.sort().values, torch.arange(count))
    with threads(2):
        assert torch.equal(order, seriate(x, iterations=3, seed=5))


def test_neighbours_are_close() -> None:
    """Points on a half circle come out as one walk along it; so do groups of them."""
    angle = torch.linspace(0, torch.pi, 512)[torch.randperm(512, generator=torch.Generator().manual_seed(1))]
    x = torch.stack([angle.cos(), angle.sin()], 1)
    assert angle[seriate(x)].diff().abs().mean() < 0.03
    middle = angle[packed(x, 16)].view(-1, 16).mean(1)
    assert middle.diff().abs().median() < 0.2


def test_cohesion_is_the_mean_cosine_to_the_centroid(monkeypatch: pytest.MonkeyPatch) -> None:
    x = unit_vectors(40).double()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    cosines = []
    for group in order.split(16):  # the last has 8
        centre = torch.nn.functional.normalize(x[group].mean(0), dim=0)
        cosines += (x[group] @ centre).tolist()
    assert cohesion(x, order, 16) == pytest.approx(np.mean(cosines), rel=1e-9)
    monkeypatch.setattr(bisection, "BLOCK_BYTES", 1)
    assert cohesion(x, order, 16) == pytest.approx(np.mean(cosines), rel=1e-9)
