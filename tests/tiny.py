"""A small made-up problem in a prepared folder, and ranks to run on it: what the tests of training share."""

import contextlib
import copy
import hashlib
import json
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.multiprocessing as mp
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from haste_dist.config import Config, load_config
from haste_dist.encoder import load_tokenizer, tokenizer_fingerprint
from haste_dist.label_groups import make_label_order
from haste_dist.manifest import (
    LABEL_SCHEMA,
    LABEL_TEXTS,
    SHARD_SCHEMA,
    Manifest,
    Shard,
    Split,
    TokenizerRecord,
    write_arrow,
    write_manifest,
)
from haste_dist.world import World

WORDS = 200
LOADED = ["haste_dist.train", "haste_dist.scoring", "transformers.models.bert.modeling_bert", "deepspeed.runtime.zero.muon.muon_optimizer"]
FULL = bool(os.environ.get("HASTE_FULL"))  # the long form of the tests that have one


def make_tokenizer(folder: Path) -> Path:
    """A word-level tokenizer over w0..w199, saved to ``folder``."""
    vocabulary = {"[PAD]": 0, "[UNK]": 1, **{f"w{i}": i + 2 for i in range(WORDS)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(folder)
    return folder


def make_prepared(folder: Path, labels: int = 101, texts: int = 192, seed: int = 0, overrides: list[str] | None = None) -> Config:
    """A prepared folder in which a text's words tell its labels; returns a small config that trains on it on the CPU."""
    folder.mkdir(parents=True, exist_ok=True)
    config = load_config(
        None,
        [
            f"run.folder={folder}/run",
            f"data.prepared={folder}/prepared",
            "data.max_length=16",
            "data.length_buckets=2",
            f"encoder.tokenizer={make_tokenizer(folder / 'tokenizer')}",
            "encoder.width=32",
            "encoder.heads=2",
            "encoder.layers=1",
            "encoder.dropout=0",
            "encoder.lr=1e-3",
            "groups.features=tfidf",
            "groups.method=frequency",
            "output.group_size=16",
            "output.fan_in=8",
            "output.lr=2.0",
            "output.reduction=mean",
            "rewire.interval=7",
            "train.batch_size=16",
            "train.epochs=3",
            "train.log_every=1",
            "evaluate.batch_size=32",
            "launch.device=cpu",
            *(overrides or []),
        ],
    )
    rng = np.random.default_rng(seed)
    prepared = Path(config.data.prepared)
    for split in ("train", "test"):
        (prepared / split).mkdir(parents=True, exist_ok=True)
    frequency = np.zeros(labels, np.int64)
    splits = {}
    for split, count in (("train", texts), ("test", texts // 4)):
        rows = []
        for i in range(count):
            chosen = np.unique((labels * rng.random(rng.integers(1, 4)) ** 2).astype(int))
            tokens = [int(2 + (7 * label + j) % WORDS) for label in chosen for j in range(2)] + list(
                rng.integers(2, WORDS, rng.integers(0, 4))
            )
            rows.append((f"{split}{i}", [int(t) for t in tokens], [int(c) for c in chosen]))
        if split == "train":
            np.add.at(frequency, np.concatenate([r[2] for r in rows]), 1)
        splits[split] = _write_split(prepared, split, rows)
    tokenizer = load_tokenizer(config.encoder)
    record = TokenizerRecord(config.encoder.tokenizer, tokenizer_fingerprint(tokenizer), 0, WORDS + 2)
    manifest = Manifest({"format": "made up"}, labels, 16, record, splits)
    columns = [pa.array([f"l{i}" for i in range(labels)]), pa.array([f"w{7 * i % WORDS}" for i in range(labels)]), pa.array(frequency)]
    write_arrow(prepared / LABEL_TEXTS, pa.RecordBatch.from_arrays(columns, schema=LABEL_SCHEMA))
    write_manifest(prepared, manifest)
    make_label_order(config, prepared, manifest)
    return config


def _write_split(prepared: Path, split: str, rows: list[tuple[str, list[int], list[int]]]) -> Split:
    shards, half = [], len(rows) // 2 + 1
    for number, part in enumerate((rows[:half], rows[half:])):
        name = f"{split}/{number:05d}.arrow"
        columns = [pa.array(list(column), type=field.type) for column, field in zip(zip(*part, strict=True), SHARD_SCHEMA, strict=True)]
        write_arrow(prepared / name, pa.RecordBatch.from_arrays(columns, schema=SHARD_SCHEMA))
        data = (prepared / name).read_bytes()
        shards.append(Shard(name, len(part), len(data), hashlib.sha256(data).hexdigest()))
    positives = [len(r[2]) for r in rows]
    return Split(len(rows), sum(positives), max(positives), sum(len(r[1]) for r in rows), 0, shards)


def run_ranks(ranks: int, function: Callable[..., Any], *arguments: Any) -> None:
    """``function(world, *arguments)`` on ``ranks`` gloo processes; a failure on any of them fails the test.

    They fork from a server that has loaded what they would load, which takes them seconds, and knows nothing of this process.
    """
    fork_context()
    mp.start_processes(_enter, (ranks, free_port(), dict(os.environ), function, arguments), nprocs=ranks, start_method="forkserver")


def fork_context() -> Any:
    """multiprocessing whose processes fork from a server that has loaded what ranks need."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(LOADED)
    return context


def _enter(rank: int, ranks: int, port: int, environment: dict[str, str], function: Callable[..., Any], arguments: tuple) -> None:
    from haste_dist.world import join_world, leave_world

    torch.set_num_threads(1)
    os.environ.clear()  # what the server was started with
    os.environ.update(environment)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank))
    function(join_world("cpu"), *arguments)
    leave_world()


def train_all(world: World, configs: list[Config]) -> None:
    from haste_dist.train import train

    for config in configs:
        train(config, world)


def check_resumed_and_shared(one: Config, stop: int) -> None:
    """``one`` was trained on a rank of its own for ``train.max_steps``: as many with a stop after ``stop`` have the same losses to the
    bit, and on two ranks within 1e-5."""
    from haste_dist.world import join_world

    broken, two = copy.deepcopy(one), copy.deepcopy(one)
    broken.run.folder += "-broken"
    two.run.folder += "-two"
    for steps in (stop, one.train.max_steps):
        broken.train.max_steps = steps
        train_all(join_world("cpu"), [broken])
    run_ranks(2, train_all, [two])
    losses = read_losses(one.run.folder)
    assert len(losses) == one.train.max_steps
    assert read_losses(broken.run.folder) == losses
    np.testing.assert_allclose(read_losses(two.run.folder), losses, rtol=1e-5)


def free_port() -> int:
    """A port that nobody has, of those below Linux's choice for connections, which might take it before it is used."""
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


def check_restored_engine(config: Config, world: World) -> None:
    """Steps an engine, restores its state into another one, and holds the next update of both against each other."""
    from haste_dist.engine import EncoderEngine
    from haste_dist.model import make_encoder, open_prepared

    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(2, WORDS, (4, 9), generator=generator).to(world.device)
    dx_BD = torch.randn(4, config.encoder.width, generator=generator).to(world.device)

    def engine() -> EncoderEngine:
        return EncoderEngine(make_encoder(config, open_prepared(config).manifest), config.encoder, world)

    def step(one: EncoderEngine) -> None:
        one.backward(one.forward(input_ids, torch.ones_like(input_ids)), dx_BD)
        one.step(1e-3)

    first, second = engine(), engine()
    for _ in range(3):
        step(first)
    weights, moments = first.state()
    assert all(w.dtype == torch.float32 for w in weights.values())
    assert moments["step"].item() == 3
    second.load_state(weights, moments)
    taken = {name: tensor.clone() for name, tensor in {**weights, **moments}.items()}
    step(first)
    for name, tensor in {**weights, **moments}.items():  # they are being written while steps go on
        assert torch.equal(tensor, taken[name]), name
    step(second)
    for ours, theirs in zip(first.state(), second.state(), strict=True):
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}")


def read_losses(run: str | Path) -> list[float]:
    """Loss of each step in a run's metrics; of repeated steps the last."""
    losses = {}
    for line in (Path(run) / "metrics.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "step":
            losses[event["step"]] = event["loss"]
    return [losses[step] for step in sorted(losses)]


def final_tensors(run: str) -> dict[str, torch.Tensor]:
    """Encoder, head and tail of a run's last checkpoint, label rows of all ranks joined."""
    folder = Path(run) / "checkpoints" / f"step-{json.loads((Path(run) / 'checkpoints/last.json').read_text())['step']:08d}"
    found = load_file(folder / "encoder.safetensors")
    parts: dict[str, list[tuple[int, torch.Tensor]]] = {}
    for path in folder.glob("output-*.safetensors"):
        with safe_open(path, framework="pt") as file:
            for name, start in file.metadata().items():
                parts.setdefault(name, []).append((int(start), file.get_tensor(name)))
    for name, pieces in parts.items():
        found[name] = torch.cat([tensor for start, tensor in sorted(pieces, key=lambda p: (p[0], len(p[1])))])
    return found


def haste(*words: str, **environment: str) -> subprocess.CompletedProcess:
    """The haste command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "haste_launch.cli", *words], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )
