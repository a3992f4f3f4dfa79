"""``haste predict`` into a folder: Ray started or joined, rankers counted, progress told."""

import os
import sys
import time
from pathlib import Path

from haste_dist.config import Config
from haste_dist.errors import ConfigError

REPORT_SECONDS = 5.0


def predict_into(config: Config, checkpoint: str, source: str, out: str, k: int) -> int:
    """Ranks labels for the texts of ``source``, a file or a folder of them, into the folder ``out``; returns the exit status."""
    import ray

    from haste_dist.predict_folder import plan, predict_folder
    from haste_dist.predictor import ModelFiles
    from haste_launch.ray_session import ray_session
    from haste_launch.ray_train import count_ranks

    settings = config.predict
    if settings.filter:
        settings.filter = os.path.abspath(settings.filter)
        if not os.path.isfile(settings.filter):
            raise ConfigError(f"predict.filter={settings.filter}: no such file")
    files = ModelFiles(config.run.folder, checkpoint)
    job = plan(files, source, out, k, settings)
    started = told = time.perf_counter()
    texts = 0
    with ray_session(config):
        ranks, on_gpu = count_ranks(config, ray.cluster_resources())
        rankers = ranks // settings.parts
        if on_gpu and not rankers:
            raise ConfigError(f"predict.parts={settings.parts}: the labels cannot be shared by so many GPUs, there are {ranks}")
        threads = config.launch.threads or max(1, int(ray.cluster_resources().get("CPU", 1)) // max(1, rankers))
        for fresh in predict_folder(job, max(1, rankers), on_gpu, threads):
            texts += fresh
            if time.perf_counter() - told >= REPORT_SECONDS:
                told = time.perf_counter()
                print(f"predict: {texts:,} texts, {texts / (told - started):,.0f} texts/s", file=sys.stderr, flush=True)
    seconds = time.perf_counter() - started
    kept = len(list(Path(out).glob("part-*.parquet")))
    parts = f"{kept:,} part{'s' if kept != 1 else ''}"
    print(f"{out}: {parts}; {texts:,} texts predicted now in {seconds:.1f} s ({texts / seconds:,.0f} texts/s)")
    return 0
