"""Damage of any kind is named by ``haste verify`` and refused by loading: cut, flipped, missing, out of range, of another version."""

import json
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pytest
from test_checkpoint import classifier
from test_saver import NoEncoder
from tiny import FULL, haste, make_prepared

from haste_dist import checkpoint
from haste_dist.checkpoint import RunState
from haste_dist.config import CheckpointConfig, Config
from haste_dist.errors import HasteError
from haste_dist.manifest import SHARD_SCHEMA, file_sha256, read_manifest, write_arrow, write_manifest
from haste_dist.model import open_prepared
from haste_dist.predictor import Predictor
from haste_dist.saver import Saver
from haste_dist.sealed import CHECKSUMS, inside, seal, seal_data, unseal
from haste_dist.train import train
from haste_dist.verify import check_data, verify
from haste_dist.world import join_world
from haste_launch import cli

FLIPS = 500 if FULL else 60


@contextmanager
def damaged(path: Path, data: bytes) -> Iterator[None]:
    whole = path.read_bytes()
    path.write_bytes(data)
    try:
        yield
    finally:
        path.write_bytes(whole)


def flip(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def cuts(data: bytes) -> set[int]:
    """Where a file can be cut: at nothing, inside and at the end of a header, at a page, before its last bytes."""
    header = 8 + int.from_bytes(data[:8], "little") if len(data) > 8 else 0
    places = {0, 1, 7, 8, 9, header - 1, header, header + 1, 512, 4096, len(data) // 2, len(data) - 8, len(data) - 2, len(data) - 1}
    return {at for at in places if 0 <= at < len(data)}


def campaign(files: list[Path], whole: Path, load: Callable[[], object]) -> None:
    """Each damage in turn to each file: ``verify`` names the file, ``load`` refuses."""
    verify(whole)
    load()
    rng = random.Random(0)
    bits = [(path, rng.randrange(8 * path.stat().st_size)) for path in rng.choices(files, k=FLIPS)]
    damages = [(path, flip(path.read_bytes(), bit)) for path, bit in bits]
    damages += [(path, path.read_bytes()[:at]) for path in files for at in sorted(cuts(path.read_bytes()))]
    damages += [(path, path.read_bytes() + b"\0") for path in files]
    for path, data in damages:
        with damaged(path, data):
            with pytest.raises(HasteError, match=path.name) as caught:
                verify(whole)
            assert "\n" not in str(caught.value)
            with pytest.raises(HasteError):
                load()
    for path in files:
        held = path.rename(path.with_name(f".{path.name}"))
        with pytest.raises(HasteError, match=path.name):
            verify(whole)
        if path.name != CHECKSUMS:  # an older version wrote none
            with pytest.raises(HasteError):
                load()
        held.rename(path)
    verify(whole)
    load()


def test_all_damage_to_a_checkpoint_is_found(tmp_path: Path) -> None:
    with Saver(tmp_path, CheckpointConfig(), join_world("cpu"), "order") as one:
        one.save(RunState(5, 0.25, 5), NoEncoder(), classifier(1, 0, 1))  # type: ignore[arg-type]
    folder = tmp_path / "step-00000005"
    files = [*folder.iterdir()]
    assert len(files) == 4
    campaign(files, folder, lambda: checkpoint.load(folder, None, classifier(1, 0, 2), "order"))


@pytest.fixture
def data(tmp_path: Path) -> Config:
    config = make_prepared(tmp_path, texts=32, labels=40)
    seal_data(Path(config.data.prepared))
    return config


def test_all_damage_to_a_data_set_is_found(data: Config) -> None:
    folder = Path(data.data.prepared)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"manifest.json", "groups.json", "labels.arrow", "label_texts.arrow", "00001.arrow", CHECKSUMS}

    def load() -> None:
        check_data(folder)
        open_prepared(data)

    campaign(files, folder, load)


def test_damage_to_a_run_is_found_before_it_is_used(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = make_prepared(tmp_path, overrides=["train.max_steps=2"])
    train(config, join_world("cpu"))
    run = Path(config.run.folder)
    done = haste("verify", str(run))
    assert (done.returncode, done.stderr) == (0, "")
    assert "all as they were written" in done.stdout
    assert cli.main(["verify", config.data.prepared]) == 2
    assert "missing (an older version wrote this folder); run haste prepare again" in capfd.readouterr().err
    for name in ("config.yaml", "labels.arrow", "groups.json", "encoder/config.json", "encoder/tokenizer.json", CHECKSUMS):
        with damaged(run / name, flip((run / name).read_bytes(), 8 * 40)):
            with pytest.raises(HasteError, match=(run / name).name):
                verify(run)
            with pytest.raises(HasteError):
                Predictor(run, "last", "cpu")
    for name in ("last.json", "best.json"):
        page = run / "checkpoints" / name
        for bit in range(8 * page.stat().st_size):
            with damaged(page, flip(page.read_bytes(), bit)), pytest.raises(HasteError, match=name):
                checkpoint.pointed(page.parent, page.stem)
        with damaged(page, b""), pytest.raises(HasteError, match=name):
            verify(run)
    files = [run / "config.yaml", run / "checkpoints/step-00000002/encoder.safetensors"]
    with damaged(files[0], b"x"), damaged(files[1], b"x"):
        assert cli.main(["verify", str(run)]) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1
    assert "config.yaml: damaged" in said
    assert "encoder.safetensors: damaged" in said
    verify(run)


def test_ids_out_of_range_are_found_under_right_checksums(data: Config) -> None:
    folder = Path(data.data.prepared)
    manifest = read_manifest(folder)
    shard = manifest.splits["train"].shards[0]
    table = pa.ipc.open_file(str(folder / shard.file)).read_all().to_pylist()
    for change, said in (
        ({"labels": [40]}, "label ids"),
        ({"input_ids": [202]}, "token ids"),
        ({"labels": [3, 3]}, "ascending and distinct"),
    ):
        rows = [{**table[0], **change}, *table[1:]]
        write_arrow(folder / shard.file, pa.RecordBatch.from_pylist(rows, schema=SHARD_SCHEMA))
        shard.bytes, shard.sha256 = (folder / shard.file).stat().st_size, file_sha256(folder / shard.file)
        write_manifest(folder, manifest)
        seal_data(folder)
        with pytest.raises(HasteError, match=said):
            verify(folder)


def test_what_is_no_folder_of_ours_is_told(tmp_path: Path) -> None:
    with pytest.raises(HasteError, match="no prepared folder, no run folder and no checkpoint"):
        verify(tmp_path)


def test_another_schema_version_is_refused_with_the_command(data: Config) -> None:
    folder = Path(data.data.prepared)
    page = unseal((folder / CHECKSUMS).read_bytes())
    (folder / CHECKSUMS).write_bytes(seal({**page, "schema_version": 7}))
    with pytest.raises(HasteError, match="schema version 7, this program reads 1; run haste prepare again"):
        check_data(folder)


def test_a_sealed_page_is_its_bytes() -> None:
    page = {"a": [1, 2.5, "x"], "b": {"c": None}}
    data = seal(page)
    assert unseal(data) == page
    assert json.loads(data)["b"] == {"c": None}
    for bit in range(8 * len(data)):
        with pytest.raises(ValueError, match=r"."):
            unseal(flip(data, bit))
    with pytest.raises(ValueError, match="checksum differs"):
        unseal(json.dumps(json.loads(data)).encode())


def test_names_stay_inside_the_folder(tmp_path: Path) -> None:
    assert inside(tmp_path, "train/00000.arrow") == tmp_path / "train/00000.arrow"
    for name in ("", "/etc/passwd", "../x", "a/../../x", "a//b", "./a", "a/", "a\0b", "~", ".hidden"):
        with pytest.raises(ValueError, match="no plain file name"):
            inside(tmp_path, name)


def test_a_manifest_cannot_name_a_file_elsewhere(data: Config, tmp_path: Path) -> None:
    folder = Path(data.data.prepared)
    manifest = read_manifest(folder)
    (tmp_path / "secret.arrow").write_bytes((folder / manifest.splits["train"].shards[0].file).read_bytes())
    manifest.splits["train"].shards[0].file = "../secret.arrow"
    write_manifest(folder, manifest)
    seal_data(folder)
    with pytest.raises(HasteError, match="no plain file name"):
        check_data(folder)
