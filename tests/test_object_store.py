"""Source, prepared folder and checkpoints in an object store: a real server that speaks S3, on this machine."""

import contextlib
import copy
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from in_turn import LABELS, contents, run_in_turn, settings
from pyarrow import fs
from raw_sources import json_lines, make_texts, make_wordpiece, write_lines, write_source
from tiny import free_port, haste, make_prepared, read_losses, run_ranks

import haste_dist.label_groups
import haste_dist.mirror
import haste_dist.prepare
from haste_dist.checkpoint import complete
from haste_dist.config import Config
from haste_dist.errors import CheckpointError, DataError
from haste_dist.evaluate import load_filters
from haste_dist.label_groups import load_label_order, make_label_order
from haste_dist.manifest import FILTER_SCHEMA, open_split, read_manifest, write_arrow, write_manifest
from haste_dist.mirror import copy_folder, local_copy
from haste_dist.model import open_prepared
from haste_dist.prepare import prepare
from haste_dist.runlog import read_events
from haste_dist.sealed import seal_data
from haste_dist.storage import Location
from haste_dist.train import train
from haste_dist.verify import verify
from haste_dist.world import World, join_world
from haste_launch.plan import Words, plan

pytest.importorskip("moto", reason="needs moto's S3 server")
TRAIN, TEST = make_texts(70, LABELS), make_texts(20, LABELS, "s")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[fs.S3FileSystem]:
    """An S3 server with a bucket named lake; the environment says where it is, as it would of a real one."""
    port = free_port()
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    environment = {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "any", "AWS_SECRET_ACCESS_KEY": "any"}
    environment |= {"AWS_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true", "HASTE_CACHE": str(tmp_path_factory.mktemp("cache"))}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        patch.delenv("HTTP_PROXY", raising=False)
        patch.delenv("http_proxy", raising=False)
        for _ in range(300):
            try:
                urllib.request.urlopen(environment["AWS_ENDPOINT_URL"], timeout=5).read()
                break
            except OSError:
                time.sleep(0.1)
        filesystem = fs.S3FileSystem(
            endpoint_override=environment["AWS_ENDPOINT_URL"], allow_bucket_creation=True, allow_bucket_deletion=True
        )
        filesystem.create_dir("lake")
        yield filesystem
    server.terminate()
    server.wait()


@pytest.fixture(scope="module")
def wordpiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_wordpiece(tmp_path_factory.mktemp("tokenizer"))


def upload(store: fs.S3FileSystem, folder: Path, to: str) -> str:
    fs.copy_files(str(folder), to, destination_filesystem=store)
    return f"s3://{to}"


@pytest.mark.parametrize("layout", ["jsonl.gz", "text", "parquet", "arrow"])
def test_a_source_in_a_store_gives_the_same_shards(
    tmp_path: Path, store: fs.S3FileSystem, wordpiece: Path, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(haste_dist.prepare, "run", run_in_turn)
    local = write_source(tmp_path / "source", layout, TRAIN, TEST, LABELS)
    address = upload(store, local, f"lake/raw-{layout}")
    prepare(settings(local, tmp_path / "local", wordpiece))
    prepare(settings(address, tmp_path / "remote", wordpiece))
    ours, theirs = contents(tmp_path / "remote"), contents(tmp_path / "local")
    assert {name for name in ours if ours[name] != theirs.get(name)} == {
        "manifest.json",
        "groups.json",
        "checksums.json",  # of those two
    }  # the source is told by its time there
    assert ours.keys() == theirs.keys()


def test_prepared_in_a_store_and_trained_from_a_copy(
    tmp_path: Path, store: fs.S3FileSystem, wordpiece: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_source(tmp_path / "source", "jsonl", TRAIN, TEST, LABELS)
    lines = json_lines(TRAIN)
    write_lines(source / "trn.json", [*lines[:50], b"{", lines[3], *lines[50:]])
    monkeypatch.setattr(haste_dist.prepare, "run", run_in_turn)
    prepare(settings(source, tmp_path / "local", wordpiece, "data.label_texts=1"))
    config = settings(source, "s3://lake/prepared/one", wordpiece, "data.label_texts=1")
    manifest = prepare(config)
    folder = open_prepared(config).folder
    assert folder == copy_folder(Location("s3://lake/prepared/one"))
    assert {n: d for n, d in contents(folder).items() if not n.startswith(".") and n != "quarantine.jsonl"} == {
        name: data for name, data in contents(tmp_path / "local").items() if name != "quarantine.jsonl"
    }
    listed = store.get_file_info(fs.FileSelector("lake/prepared/one", recursive=True))
    there = {info.path.removeprefix("lake/prepared/one/") for info in listed if info.is_file}
    assert there == contents(tmp_path / "local").keys()

    shutil.rmtree(folder)  # another machine
    assert plan(config, Words()) == 0
    assert f"{manifest.labels} labels" in capsys.readouterr().out
    assert open_split(open_prepared(config).folder, manifest, "train").num_rows == 70
    with store.open_output_stream("lake/prepared/one/train/00001.arrow") as file:
        file.write(b"x" * manifest.splits["train"].shards[1].bytes)
    shutil.rmtree(folder)
    with pytest.raises(DataError, match=r"s3://lake/prepared/one/train/00001.arrow: its checksum is not the manifest's"):
        local_copy("s3://lake/prepared/one")
    with pytest.raises(DataError, match=r"s3://lake/nothing/manifest.json: no such file; run haste prepare"):
        local_copy("s3://lake/nothing")
    with pytest.raises(DataError, match=r"s3://lake/nowhere: no such folder; set data.source"):
        prepare(settings("s3://lake/nowhere", tmp_path / "x", wordpiece))


def test_a_copy_loses_what_the_store_lost(tmp_path: Path, store: fs.S3FileSystem, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine prepares at the same address, without filters, centroids and basis; a fetch that breaks off leaves no mixture."""
    config = make_prepared(tmp_path)
    folder, address = Path(config.data.prepared), "lake/prepared/three"
    manifest = read_manifest(folder)
    for split in ("test", "train"):
        write_arrow(folder / f"filter_{split}.arrow", pa.table([[0], [3]], schema=FILTER_SCHEMA))
    (folder / "quarantine.jsonl").write_text("{}\n")
    manifest.filters = ["test", "train"]
    write_manifest(folder, manifest)
    config.output.start, config.output.basis = "centroids", "labels"
    make_label_order(config, folder, manifest)
    seal_data(folder)
    copy = local_copy(upload(store, folder, address))
    assert load_filters(copy, "test") is not None
    assert load_label_order(copy).basis is not None

    for name in ("filter_test.arrow", "filter_train.arrow", "quarantine.jsonl"):
        (folder / name).unlink()
    manifest.filters = []
    write_manifest(folder, manifest)
    config.output.start, config.output.basis = "random", "embedding"
    make_label_order(config, folder, manifest)
    seal_data(folder)
    store.delete_dir(address)
    upload(store, folder, address)
    with monkeypatch.context() as patch:
        patch.setattr(haste_dist.mirror, "_download_shard", killed)
        with pytest.raises(KeyboardInterrupt):
            local_copy(f"s3://{address}")
    with pytest.raises(DataError, match=r"manifest.json: no such file"):
        read_manifest(copy)
    local_copy(f"s3://{address}")
    assert {name: data for name, data in contents(copy).items() if not name.startswith(".")} == contents(folder)
    assert load_filters(copy, "test") is None
    assert load_label_order(copy).basis is None


def test_an_order_that_was_not_published_is_not_made_again(
    tmp_path: Path, store: fs.S3FileSystem, wordpiece: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(haste_dist.prepare, "run", run_in_turn)
    config = settings(write_source(tmp_path / "source", "jsonl", TRAIN, TEST, LABELS), "s3://lake/prepared/four", wordpiece)
    with monkeypatch.context() as patch:
        patch.setattr(haste_dist.prepare, "seal_data", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(config)
    monkeypatch.setattr(haste_dist.label_groups, "make_label_order", lambda *_: pytest.fail("made again"))
    prepare(config)
    assert "groups.json" in keys(store, "lake/prepared/four")
    verify(open_prepared(config).folder)


def killed(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.slow
def test_the_command_from_store_to_store(tmp_path: Path, store: fs.S3FileSystem, wordpiece: Path) -> None:
    address = upload(store, write_source(tmp_path / "source", "jsonl.gz", TRAIN, TEST, LABELS), "lake/raw")
    config: Config = settings(address, "s3://lake/prepared/two", wordpiece)
    words = [f"data.source={address}", "data.prepared=s3://lake/prepared/two", "data.rows_per_shard=16", "data.max_length=8"]
    words += [f"encoder.tokenizer={wordpiece}", "groups.method=frequency", "output.group_size=16"]
    (tmp_path / "empty.yaml").write_text("{}")
    done = haste("prepare", str(tmp_path / "empty.yaml"), *words, "--on-error", "quarantine")
    assert done.returncode == 0, done.stderr
    assert "90 rows written" in done.stdout
    assert open_split(open_prepared(config).folder, open_prepared(config).manifest, "train").num_rows == 70


def train_some(world: World, config: Config) -> None:
    train(config, world)


def keys(store: fs.S3FileSystem, folder: str) -> set[str]:
    found = store.get_file_info(fs.FileSelector(folder, recursive=True))
    return {info.path.removeprefix(f"{folder}/") for info in found if info.is_file}


@pytest.mark.slow
def test_a_run_goes_on_from_the_store_on_another_machine(tmp_path: Path, store: fs.S3FileSystem) -> None:
    """Two ranks copy checkpoints behind the steps; a run in an empty folder, on one rank, goes on from the newest that is whole there."""
    config = make_prepared(tmp_path, overrides=["train.max_steps=30", "train.evaluate_every=1", "train.checkpoint_every=5"])
    config.checkpoint.store = "s3://lake/runs/one"
    unbroken, stopped = copy.deepcopy(config), copy.deepcopy(config)
    unbroken.run.folder, unbroken.checkpoint.store = f"{config.run.folder}-unbroken", ""
    train(unbroken, join_world("cpu"))
    stopped.train.max_steps = 20
    run_ranks(2, train_some, stopped)
    saved = Path(stopped.run.folder) / "checkpoints"
    assert {name.partition("/")[0] for name in keys(store, "lake/runs/one")} == {path.name for path in complete(saved)}
    for path in complete(saved):
        assert {f"{path.name}/{file.name}" for file in path.iterdir()} <= keys(store, "lake/runs/one")

    shutil.rmtree(stopped.run.folder)  # another machine
    torn = "lake/runs/one/step-00000099/encoder.safetensors"  # a save that was killed before it was published
    with store.open_output_stream(torn) as file:
        file.write(b"half")
    train(config, join_world("cpu"))
    assert [e["step"] for e in read_events(config.run.folder) if e["event"] == "start"] == [20]
    np.testing.assert_allclose(read_losses(config.run.folder), read_losses(unbroken.run.folder)[20:], rtol=1e-5)
    verify(config.run.folder)
    assert not any(name.startswith("step-00000099") for name in keys(store, "lake/runs/one"))

    page = f"lake/runs/one/{complete(saved)[-1].name}/encoder.safetensors"
    data = bytearray(store.open_input_stream(page).read())
    data[-3] ^= 1
    with store.open_output_stream(page) as file:
        file.write(bytes(data))
    shutil.rmtree(config.run.folder)
    with pytest.raises(CheckpointError, match=r"s3://lake/runs/one/step-00000030: encoder.safetensors: damaged"):
        train(config, join_world("cpu"))
    assert not list(saved.glob("*"))
    config.run.resume = "never"
    with pytest.raises(CheckpointError, match="s3://lake/runs/one: holds a run already"):
        train(config, join_world("cpu"))


def test_a_store_that_fails_costs_the_copies_only(tmp_path: Path, store: fs.S3FileSystem) -> None:
    """The bucket is gone between two saves: the run goes on, tells, and ends with one line; what it saved here loads."""
    store.create_dir("pond")
    config = make_prepared(tmp_path, overrides=["train.max_steps=20", "train.evaluate_every=0", "train.checkpoint_every=5"])
    config.checkpoint.store = "s3://pond/run"
    run = Path(config.run.folder)

    def drain() -> bool:
        while (run / "checkpoints/step-00000010").is_dir() and store.get_file_info("pond").type == fs.FileType.Directory:
            with contextlib.suppress(OSError):  # a file came in meanwhile
                store.delete_dir("pond")
        return False

    with pytest.raises(CheckpointError, match=r"training ended \(max_steps\), but its last .* alone: s3://pond/run/.* cannot be") as caught:
        train(config, join_world("cpu"), drain)
    assert "\n" not in str(caught.value)
    told = {e["step"]: e["copy_problem"] for e in read_events(run) if e["event"] == "checkpoint"}
    assert not told[5]
    assert told[20].startswith("s3://pond/run/step-00000020/")
    verify(run)
    with pytest.raises(DataError, match=r"s3://pond/run/writable: cannot be written"):  # it is not begun without its store
        train(config, join_world("cpu"))
    store.create_dir("pond")
    config.train.max_steps = 25
    assert train(config, join_world("cpu")).step == 25
    assert any(name.startswith("step-00000025/") for name in keys(store, "pond/run"))
