"""Training through data.reader=mmap and data.reader=ray, in turn, seed by seed: the metrics at the end, and how long steps waited for data.

    python benchmarks/readers.py wordnet train.epochs=2 --seeds 3

One rank, all runs in one process and one Ray, so that nothing but the reader differs. The wait is over all steps but those up to the first
line of metrics, which hold the start; the first batches of later epochs count.
"""

import argparse
import json
import shutil
from pathlib import Path

import numpy as np

from haste_dist.config import Config, load_config
from haste_dist.records import append_record

METRICS = ("P@1", "P@3", "P@5")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*", help="a.b=c")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--records", default="benchmarks/records")
    words, overrides = parser.parse_known_args()
    overrides = [*words.overrides, *overrides]
    from haste_dist.train import train
    from haste_dist.world import join_world, leave_world
    from haste_launch.ray_session import ray_session

    base = load_config(words.config, overrides)
    found: dict[str, list[float]] = {"mmap": [], "ray": []}
    world = join_world(base.launch.device)
    with ray_session(base):
        for seed in range(words.seeds):
            for reader in found:
                folder = Path(base.run.folder) / f"{reader}-{seed}"
                shutil.rmtree(folder, ignore_errors=True)
                config = load_config(words.config, [*overrides, f"data.reader={reader}", f"run.seed={seed}", f"run.folder={folder}"])
                train(config, world)
                figures = read_run(folder, config)
                found[reader].append(float(figures["p_at_1"]))
                record = append_record("readers", reader, {"N": config.train.batch_size}, {**figures, "seed": seed}, words.records)
                print(json.dumps(record), flush=True)
    leave_world()
    for reader, scores in found.items():
        spread = np.std(scores, ddof=1) if len(scores) > 1 else 0.0
        print(f"{reader}: P@1 {100 * np.mean(scores):.2f}, standard deviation of {len(scores)} seeds {100 * spread:.2f}", flush=True)


def read_run(folder: Path, config: Config) -> dict[str, float | int | str]:
    """The last metrics of a run, and its mean step and wait."""
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps, scores = [e for e in events if e["event"] == "step"][1:], [e for e in events if e["event"] == "eval"][-1]
    step, wait = (float(np.mean([e[name] for e in steps])) for name in ("step_ms", "data_wait_ms"))
    waits = {"step_ms": round(step, 3), "data_wait_ms": round(wait, 3), "data_wait_share": round(wait / step, 5)}
    figures = {metric.lower().replace("@", "_at_"): round(scores[metric], 5) for metric in METRICS}
    return {**figures, **waits, "steps": events[-1]["step"], "data": Path(config.data.prepared).name}


if __name__ == "__main__":
    main()
