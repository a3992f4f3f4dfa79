"""Groups of labels by this project and by greedy FAISS, in one run: seconds, CPU seconds, cohesion. Needs faiss-cpu for the second.

    python benchmarks/grouping.py wordnet output.start=random output.basis=embedding groups.features=tfidf \\
        data.prepared=data/wordnet-prepared --group 32

Both group all labels of a prepared folder by the same embeddings. Greedy FAISS is the method of the published code of HASTE: an HNSW index
(M 32, efConstruction 200) of all labels, and for one label after another, in random order, a search for its 512 nearest; those that no
group has yet join it, nearest first, and random ones where they are too few. The time of the index counts.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from haste_dist.bisection import cohesion
from haste_dist.config import load_config
from haste_dist.label_embeddings import embed_labels
from haste_dist.manifest import read_manifest
from haste_dist.packing import pack
from haste_dist.records import append_record

SEARCHED = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--labels", type=int, default=0, help="only the first so many (default all)")
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--records", default="benchmarks/records")
    words, overrides = parser.parse_known_args()
    config = load_config(words.config, overrides)
    folder = Path(config.data.prepared)
    with tempfile.TemporaryDirectory() as work:
        made = embed_labels(config, folder, read_manifest(folder), torch.device("cpu"), Path(work)).vectors
        vectors_LD = np.array(made[: words.labels or None], np.float32)
    labels, width = vectors_LD.shape
    x_LD = torch.from_numpy(vectors_LD)
    ways: dict[str, Callable[[], np.ndarray]] = {
        "haste_dist": lambda: pack(x_LD, torch.arange(labels), words.group).numpy(),
        "greedy_faiss_hnsw": lambda: greedy(vectors_LD, words.group),
    }
    chance = cohesion(x_LD, torch.randperm(labels, generator=torch.Generator().manual_seed(0)), words.group)
    for _ in range(words.turns):
        for provider, way in ways.items():
            wall, cpu = time.perf_counter(), time.process_time()
            order = way()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            assert np.array_equal(np.sort(order), np.arange(labels)), provider
            close = {"cohesion": round(cohesion(x_LD, torch.from_numpy(order), words.group), 6), "cohesion_random": round(chance, 6)}
            figures: dict[str, Any] = {"seconds": round(wall, 2), "cpu_seconds": round(cpu, 2), **close, "threads": torch.get_num_threads()}
            figures["vectors"] = f"{folder.name}, {config.groups.features}"
            shape = {"L": labels, "D": width, "G": words.group}
            print(json.dumps(append_record("grouping", provider, shape, figures, words.records)), flush=True)


def greedy(vectors_LD: np.ndarray, group_size: int, seed: int = 0) -> np.ndarray:
    """(L,) labels: runs of G are groups; what is left over comes last."""
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexHNSWFlat(vectors_LD.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction, index.hnsw.efSearch = 200, SEARCHED
    index.add(vectors_LD)
    rng, free = np.random.default_rng(seed), np.ones(len(vectors_LD), bool)
    order: list[int] = []
    fill = rng.permutation(len(vectors_LD))  # where random ones are taken from, in turn
    place = 0
    for label in rng.permutation(len(vectors_LD)):
        if not free[label] or len(vectors_LD) - len(order) < group_size:
            continue
        free[label] = False
        found = index.search(vectors_LD[label : label + 1], SEARCHED)[1][0]
        chosen = [n for n in found if n >= 0 and free[n]][: group_size - 1]
        free[chosen] = False
        while len(chosen) < group_size - 1:
            if free[fill[place]]:
                chosen.append(fill[place])
                free[fill[place]] = False
            place += 1
        order += [label, *chosen]
    return np.concatenate([np.array(order, np.int64), np.flatnonzero(free)])


if __name__ == "__main__":
    main()
