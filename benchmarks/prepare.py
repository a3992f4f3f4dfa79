"""Rows a second and memory over time of `haste prepare` beside Hugging Face's `datasets.map`, in turn, on texts resampled from real ones.

    python benchmarks/prepare.py data/wordnet --rows 1000000 --peer /path/to/python --turns 2 --plot memory.png

``--peer`` is a Python that has datasets and transformers (this project needs no datasets). It loads the same file, tokenises it with
two processes and writes Arrow. Memory is the proportional set size of all processes together, Ray's object store included. Ray gives its
workers a low priority, which on a busy machine would decide the comparison: it is switched off here.
"""

import argparse
import gzip
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from matplotlib.figure import Figure

from haste_dist.config import load_config
from haste_dist.encoder import load_tokenizer
from haste_dist.records import append_record

PEER = """
import sys
from datasets import disable_progress_bars, load_dataset
from transformers import AutoTokenizer
disable_progress_bars()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
def tokenise(batch):
    texts = [f"{title} {content}".strip() for title, content in zip(batch["title"], batch["content"])]
    kept = tokenizer(texts, truncation=True, max_length=32, return_token_type_ids=False, return_attention_mask=False)
    return {"input_ids": kept["input_ids"]}
rows = load_dataset("json", data_files={"train": sys.argv[1]}, cache_dir=sys.argv[3], split="train")
rows = rows.map(tokenise, batched=True, num_proc=2, remove_columns=["title", "content"])
print(len(rows))
"""


NO_MORE = ["groups.method=frequency", "output.start=random", "output.basis=embedding", "data.label_texts=0"]  # than the peer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder with trn.json.gz, tst.json.gz, lbl.json.gz")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--peer", default="", help="a Python with datasets and transformers; none: this project alone")
    parser.add_argument("--plot", default="", help="draw memory over time as .png")
    words = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as name:
        folder, curves = Path(name), {}
        resample(words.source, folder / "raw", words.rows)
        load_tokenizer(load_config("wordnet").encoder).save_pretrained(folder / "tokenizer")
        (folder / "peer.py").write_text(PEER)
        haste = [sys.executable, "-m", "haste_launch.cli", "prepare", "wordnet", f"data.source={folder}/raw", *NO_MORE]
        peer = [words.peer, str(folder / "peer.py"), str(folder / "raw/trn.json.gz"), str(folder / "tokenizer")]
        for turn in range(words.turns):
            sides = {"haste_dist": [*haste, f"data.prepared={folder}/out{turn}", "data.workers=2"]}
            if words.peer:
                sides["hugging_face_datasets"] = [*peer, str(folder / f"cache{turn}")]
            for provider, command in sides.items():
                curve, figures = watch(command)
                figures = {"rows": words.rows, "rows_per_s": round(words.rows / figures["seconds"]), **figures}
                print(append_record("prepare", provider, {}, figures))
                curves[f"{provider}, turn {turn + 1}"] = curve
    if words.plot:
        draw(curves, words.plot)


def resample(source: Path, out: Path, rows: int) -> None:
    """``rows`` training texts drawn with replacement, each with a uid of its own; test texts and labels as they are."""
    out.mkdir()
    for name in ("tst.json.gz", "lbl.json.gz"):
        (out / name).write_bytes((source / name).read_bytes())
    with gzip.open(source / "trn.json.gz", "rt", encoding="utf-8") as file:
        pages = [{key: value for key, value in json.loads(line).items() if key != "uid"} for line in file]
    tails = [json.dumps(page)[1:] for page in pages]
    draw_one = random.Random(0).choice
    with gzip.open(out / "trn.json.gz", "wt", compresslevel=1) as file:
        file.writelines(f'{{"uid": "r{i}", {draw_one(tails)}\n' for i in range(rows))


def watch(command: list[str]) -> tuple[list[tuple[float, float]], dict[str, float]]:
    """Runs a command; (seconds, GiB) twice a second, and its wall and CPU seconds and peak memory with all its processes."""
    quiet = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "RAY_worker_niceness": "0", "HF_HUB_OFFLINE": "1"}
    started, curve = time.perf_counter(), []
    cpu: dict[int, float] = {}
    process = psutil.Popen(command, env=quiet, stdout=subprocess.DEVNULL)
    known: dict[int, psutil.Process] = {}
    while process.poll() is None:
        try:
            known |= {p.pid: p for p in (process, *process.children(recursive=True))}
        except psutil.NoSuchProcess:
            break
        total = 0.0
        for pid, one in list(known.items()):
            try:
                total += one.memory_full_info().pss / 2**30
                cpu[pid] = one.cpu_times().user + one.cpu_times().system
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                del known[pid]
        curve.append((time.perf_counter() - started, total))
        time.sleep(0.5)
    if process.returncode:
        sys.exit(f"{' '.join(command)}: exit status {process.returncode}")
    seconds = time.perf_counter() - started
    return curve, {"seconds": seconds, "cpu_seconds": sum(cpu.values()), "peak_gib": max(gib for _, gib in curve)}


def draw(curves: dict[str, Any], path: str) -> None:
    figure = Figure(figsize=(8, 4), layout="constrained")
    axis = figure.subplots()
    for name, curve in curves.items():
        axis.plot(*zip(*curve, strict=True), label=name)
    axis.set(xlabel="seconds", ylabel="memory of all processes, GiB", ylim=(0, None))
    axis.legend()
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
