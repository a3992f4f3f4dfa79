"""Texts a second of prediction beside the encoder alone: made-up weights, as many labels as asked for, an encoder of MiniLM's size.

    python benchmarks/predict.py runs/made-up --labels 1000000 --tokenizer FOLDER --texts data/icd10/tst.json.gz

Writes the model as an exported folder (which `haste serve` and `haste predict` take, too), then measures, in one process: the encoder
alone, encoder and top-k, and, with --pipeline, `haste predict` into a folder. Weights do not change the time; the texts' lengths do, so
texts are real ones, --join of them together.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from serve import read_texts

from haste_dist import export
from haste_dist.classifier import Classifier
from haste_dist.config import Config, load_config, save_config
from haste_dist.encoder import build_encoder, load_tokenizer
from haste_dist.label_groups import SCHEMA_VERSION, order_labels, write_order
from haste_dist.model import ENCODER_FOLDER
from haste_dist.predictor import ModelFiles
from haste_dist.records import append_record
from haste_dist.sealed import seal_folder
from haste_dist.sharding import label_shard
from haste_dist.tensor_file import write_tensors
from haste_dist.world import choose_device

K = 5


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--labels", type=int, default=1_000_000)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--texts", type=Path, required=True)
    parser.add_argument("--join", type=int, default=1, help="texts that make one")
    parser.add_argument("--count", type=int, default=65536, help="texts that are predicted")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--pipeline", type=int, default=0, help="texts for haste predict into a folder (0: not measured)")
    parser.add_argument("--records", default="none")
    args = parser.parse_args()
    began = time.perf_counter()
    config = load_config(
        None,
        [
            f"encoder.tokenizer={args.tokenizer}",
            *("encoder.width=384", "encoder.heads=12", "encoder.layers=6", "data.max_length=128"),
            *("output.head_fraction=0.01", "output.group_size=32", "output.fan_in=64", "output.momentum=0"),
            *args.overrides,
        ],
    )
    make_model(args.out, config, args.labels)
    print(f"{args.out}: {args.labels:,} labels, made in {time.perf_counter() - began:.1f} s", flush=True)
    real = read_texts(args.texts)
    texts = [" ".join(real[(i * args.join + j) % len(real)] for j in range(args.join)) for i in range(args.count)]
    figures = measure(args.out, texts, args.batch)
    if args.pipeline:
        figures |= measure_pipeline(args.out, [texts[i % len(texts)] for i in range(args.pipeline)])
    print(json.dumps(figures), flush=True)
    if args.records != "none":
        shape = {
            "L": args.labels,
            "N": args.batch,
            "D": config.encoder.width,
            "F": config.output.fan_in,
            "G": config.output.group_size,
            "K": K,
        }
        append_record("predict", "haste_dist", shape, figures, args.records)


def make_model(out: Path, config: Config, labels: int) -> None:
    """An exported folder with initial weights, in random groups."""
    shutil.rmtree(out, ignore_errors=True)
    (out / ENCODER_FOLDER).mkdir(parents=True)
    torch.manual_seed(0)
    tokenizer = load_tokenizer(config.encoder)
    encoder = build_encoder(config.encoder, len(tokenizer), int(tokenizer.pad_token_id), config.data.max_length)
    encoder.model.save_pretrained(out / ENCODER_FOLDER)  # type: ignore[operator]
    tokenizer.save_pretrained(out / ENCODER_FOLDER)
    settings = config.output
    order, _ = order_labels(
        np.arange(labels, 0, -1),
        lambda: np.empty((0, 0), np.float32),
        head_fraction=settings.head_fraction,
        group_size=settings.group_size,
        method="random",
    )
    texts = pa.chunked_array([pa.array(np.arange(labels)).cast(pa.string())])
    write_order(out, order, texts, None, {"schema_version": SCHEMA_VERSION, "group_size": order.group_size})
    shard = label_shard(order.head_rows, order.groups, order.group_size, labels, 1, 0)
    layer = Classifier(settings, shard, encoder.width, 0, choose_device("auto"))
    tensors = {name: tensor.cpu() for name, (tensor, _) in layer.tensors().items()}
    write_tensors(out / export.OUTPUT, tensors, dict.fromkeys(tensors, "0"))
    (out / export.PAGE).write_text(json.dumps(export._describe(config, order, encoder.width)))
    save_config(export._portable(config), out / "config.yaml")
    seal_folder(out, (path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()))


def measure(folder: Path, texts: list[str], batch: int) -> dict[str, float]:
    """Texts a second, tokens made beforehand; the second of two runs."""
    began = time.perf_counter()
    files = ModelFiles(folder)
    embedder, layer = files.embedder(), files.labels()
    figures = {"load_s": time.perf_counter() - began}
    began = time.perf_counter()
    tokens = embedder.tokens(texts)
    figures |= {"tokenise_texts_per_s": len(texts) / (time.perf_counter() - began), "tokens_a_text": len(tokens.flatten()) / len(texts)}

    def wait() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def alone() -> None:
        embedder.embed(tokens, batch)

    def both() -> None:
        x_ND = embedder.embed(tokens, batch)
        found = [layer.topk(x, K) for x in x_ND.split(batch)]
        torch.cat([rows for _, rows in found]).cpu()

    for name, work in (("encoder_texts_per_s", alone), ("predict_texts_per_s", both)):
        for _ in range(2):
            wait()
            began = time.perf_counter()
            with torch.no_grad():
                work()
            wait()
            figures[name] = len(texts) / (time.perf_counter() - began)
    figures["of_encoder_alone"] = figures["predict_texts_per_s"] / figures["encoder_texts_per_s"]
    if torch.cuda.is_available():
        figures["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return {name: round(value, 3) for name, value in figures.items()}


def measure_pipeline(folder: Path, texts: list[str]) -> dict[str, float]:
    """`haste predict` into a folder, from starting the command to its end, and what it tells of the time between."""
    source, out = folder / "texts.parquet", folder / "predictions"
    pq.write_table(pa.table({"text": texts}), source)
    shutil.rmtree(out, ignore_errors=True)
    torch.cuda.empty_cache()
    began = time.perf_counter()
    words = ["predict", str(folder), "--input", str(source), "--output", str(out), "-k", str(K)]
    done = subprocess.run([sys.executable, "-m", "haste_launch.cli", *words], capture_output=True, text=True, check=False)
    took = time.perf_counter() - began
    print(done.stderr[-3000:], done.stdout, flush=True)
    if done.returncode:
        raise SystemExit(f"haste predict ended with {done.returncode}")
    told = float(done.stdout.split("(")[1].split(" texts/s")[0].replace(",", ""))
    return {"pipeline_texts": len(texts), "pipeline_s": round(took, 1), "pipeline_texts_per_s": told}


if __name__ == "__main__":
    main()
