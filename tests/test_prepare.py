"""From a source folder to a prepared one, through Ray: the same bytes whatever the layout of the work, and no silent loss."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from raw_sources import WORDS, json_lines, make_texts, make_wordpiece, write_lines, write_source
from transformers import AutoTokenizer

from haste_dist.config import Config, load_config
from haste_dist.errors import ConfigError, DataError
from haste_dist.manifest import FILTER_SCHEMA, LABEL_SCHEMA, Manifest, open_split, read_arrow, read_manifest
from haste_dist.prepare import prepare
from haste_dist.tokens import tokenise, tokenizer_rules

LABELS = 40
TRAIN, TEST = make_texts(50, LABELS - 5), make_texts(12, LABELS, "s")
Configure = Callable[..., Config]


@pytest.fixture(scope="module")
def wordpiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_wordpiece(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def configure(tmp_path: Path, wordpiece: Path) -> Configure:
    """A config that prepares tmp_path/source into tmp_path/prepared in shards of 16 rows."""

    def make(*overrides: str) -> Config:
        words = [
            f"data.source={tmp_path}/source",
            f"data.prepared={tmp_path}/prepared",
            "data.rows_per_shard=16",
            "data.max_length=8",
            f"encoder.tokenizer={wordpiece}",
            "groups.method=frequency",
            "output.group_size=16",
        ]
        return load_config(None, [*words, *overrides])

    return make


def contents(folder: Path) -> dict[str, bytes]:
    """Every file under the folder, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def data_files(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name not in ("groups.json", "labels.arrow")}


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.rglob("*.arrow")}


@pytest.mark.usefixtures("ray_session")
class TestWithRay:
    def test_the_whole_path(self, tmp_path: Path, configure: Configure, wordpiece: Path, capfd: pytest.CaptureFixture[str]) -> None:
        write_source(tmp_path / "source", "jsonl.gz", TRAIN, TEST, LABELS)
        folder = tmp_path / "prepared"
        manifest = prepare(configure())
        assert manifest == read_manifest(folder)
        assert manifest.labels == LABELS
        assert manifest.max_length == 8
        assert [shard.rows for shard in manifest.splits["train"].shards] == [16, 16, 16, 2]
        tokenizer = AutoTokenizer.from_pretrained(wordpiece)
        for split, texts in (("train", TRAIN), ("test", TEST)):
            rows = open_split(folder, manifest, split).to_pylist()
            ids = tokenizer([text for _, text, _ in texts], truncation=True, max_length=8)["input_ids"]
            expected = [{"uid": uid, "input_ids": i, "labels": labels} for (uid, _, labels), i in zip(texts, ids, strict=True)]
            assert rows == expected
            sums = manifest.splits[split]
            assert sums.positives == sum(len(labels) for _, _, labels in texts)
            assert sums.max_labels == max(len(labels) for _, _, labels in texts)
            assert sums.unlabelled == sum(not labels for _, _, labels in texts)
            assert sums.tokens == sum(map(len, ids))
        labels = read_arrow(folder / "label_texts.arrow", LABEL_SCHEMA)
        frequency = np.bincount([label for _, _, labels in TRAIN for label in labels], minlength=LABELS)
        assert labels["frequency"].to_pylist() == frequency.tolist()
        assert labels["text"].to_pylist() == [f"label {i}" for i in range(LABELS)]
        unseen = [label for _, _, labels in TEST for label in labels if not frequency[label]]
        assert len(unseen) > 0
        assert (manifest.unseen_test_labels, manifest.unseen_test_positives) == (len(set(unseen)), len(unseen))
        assert sorted(contents(folder)) == [
            "checksums.json",
            "groups.json",
            "label_texts.arrow",
            "labels.arrow",
            "manifest.json",
            "test/00000.arrow",
            *(f"train/0000{i}.arrow" for i in range(4)),
        ]
        shown = capfd.readouterr()
        assert "62 rows written" in shown.out
        assert f"{len(set(unseen))} test labels ({len(unseen)} positives) never seen in training" in shown.out
        assert all(line.startswith("prepare: ") for line in shown.err.splitlines())  # nothing of Ray's

    def test_bytes_do_not_depend_on_workers_or_layout_and_a_rerun_writes_nothing(self, tmp_path: Path, configure: Configure) -> None:
        write_source(tmp_path / "source", "jsonl", TRAIN, TEST, LABELS)
        prepare(configure("data.workers=1"))
        one = contents(tmp_path / "prepared")
        before = stamps(tmp_path / "prepared")
        prepare(configure("data.workers=2"))
        assert stamps(tmp_path / "prepared") == before
        prepare(configure(f"data.prepared={tmp_path}/two", "data.workers=2"))
        assert contents(tmp_path / "two") == one
        shards = {name: data for name, data in one.items() if "/" in name}
        for layout in ("text.gz", "parquet", "arrow"):
            write_source(tmp_path / layout, layout, TRAIN, TEST, LABELS)
            prepare(configure(f"data.source={tmp_path}/{layout}", f"data.prepared={tmp_path}/{layout}-out"))
            if layout != "text.gz":  # which has no uids
                assert {name: data for name, data in contents(tmp_path / f"{layout}-out").items() if "/" in name} == shards
            else:
                manifest = read_manifest(tmp_path / "text.gz-out")
                table = open_split(tmp_path / "text.gz-out", manifest, "train")
                assert (
                    table["input_ids"].to_pylist()
                    == open_split(tmp_path / "two", read_manifest(tmp_path / "two"), "train")["input_ids"].to_pylist()
                )

    def test_a_rerun_mends_what_is_damaged_and_starts_anew_when_settings_change(self, tmp_path: Path, configure: Configure) -> None:
        write_source(tmp_path / "source", "jsonl", TRAIN, TEST, LABELS)
        folder = tmp_path / "prepared"
        prepare(configure())
        whole = contents(folder)
        shard = folder / "train/00001.arrow"
        shard.write_bytes(shard.read_bytes().replace(b"t17", b"t99"))
        prepare(configure())
        assert contents(folder) == whole
        manifest = prepare(configure("data.limit=20", "data.max_length=5"))
        assert [s.rows for s in manifest.splits["train"].shards] == [16, 4]
        assert manifest.splits["test"].rows == len(TEST)
        assert max(map(len, open_split(folder, manifest, "train")["input_ids"].to_pylist())) == 5
        assert sorted(path.name for path in (folder / "train").iterdir()) == [Path(s.file).name for s in manifest.splits["train"].shards]
        write_lines(tmp_path / "source/trn.json", json_lines(TRAIN[:-1]))
        assert prepare(configure()).splits["train"].rows == len(TRAIN) - 1

    @pytest.mark.slow
    def test_a_kill_halfway_leaves_shards_that_the_rerun_keeps(self, tmp_path: Path, configure: Configure) -> None:
        many = make_texts(4000, LABELS)
        write_source(tmp_path / "source", "jsonl", many, TEST, LABELS)
        config = configure("data.rows_per_shard=25")
        program = f"""
import logging, ray
from haste_dist.config import load_config
from haste_dist.prepare import prepare
ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
prepare(load_config(None, ["data.source={config.data.source}", "data.prepared={config.data.prepared}", "data.rows_per_shard=25",
    "data.max_length=8", "encoder.tokenizer={config.encoder.tokenizer}", "groups.method=frequency", "output.group_size=16"]))
"""
        process = subprocess.Popen([sys.executable, "-c", program], env={k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"})
        folder = tmp_path / "prepared"
        while process.poll() is None and len(list(folder.glob("train/*.arrow"))) < 20:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        time.sleep(1.5)  # its workers notice and end
        kept = {name: stamp for name, stamp in stamps(folder).items() if name.startswith("train")}
        assert 20 <= len(kept) < 160
        assert not (folder / "manifest.json").exists()
        prepare(config)
        after = stamps(folder)
        assert {name: after[name] for name in kept} == kept
        prepare(configure("data.rows_per_shard=25", f"data.prepared={tmp_path}/clean"))
        assert contents(folder) == contents(tmp_path / "clean")

    def test_bad_input_stops_with_its_line_alone(self, tmp_path: Path, configure: Configure, capfd: pytest.CaptureFixture[str]) -> None:
        write_source(tmp_path / "source", "jsonl", TRAIN, TEST, LABELS)
        lines = json_lines(TRAIN)
        lines[33] = json.dumps({"uid": "x", "title": "red", "target_ind": [LABELS]}).encode()
        write_lines(tmp_path / "source/trn.json", lines)
        with pytest.raises(DataError) as error:
            prepare(configure())
        bound = f"label {LABELS} is out of range (the label file has {LABELS} labels)"
        assert str(error.value) == f"trn.json:34: {bound}; fix the line or set data.on_error=quarantine"
        assert not (tmp_path / "prepared/manifest.json").exists()
        shown = capfd.readouterr()
        assert shown.out == ""
        assert all(line.startswith("prepare: ") for line in shown.err.splitlines())

    def test_quarantine_names_counts_and_skips(self, tmp_path: Path, configure: Configure) -> None:
        source = write_source(tmp_path / "source", "jsonl", TRAIN, TEST, LABELS)
        lines = json_lines(TRAIN)
        lines[0], lines[20], lines[49] = b"\xff", lines[7], b"{"
        write_lines(source / "trn.json", lines)
        write_lines(source / "filter_labels_train.txt", [b"20 3", b"21 3", b"1 9", b"1 9", b"0 1", b"48 2", b"50 1", b"1 z"])
        write_lines(source / "filter_labels_test.txt", [b"11 39"])
        labels = (source / "lbl.json").read_bytes().splitlines()
        write_lines(source / "lbl.json", [*labels[:3], b"?", *labels[4:]])
        manifest = prepare(configure("data.on_error=quarantine"))
        folder = tmp_path / "prepared"
        uids = open_split(folder, manifest, "train")["uid"].to_pylist()
        assert uids == [uid for i, (uid, _, _) in enumerate(TRAIN) if i not in (0, 20, 49)]
        assert manifest.quarantined == {
            "duplicate uid": 1,
            "filter line": 1,
            "invalid JSON": 2,
            "invalid UTF-8": 1,
            "label not an integer": 1,
        }
        listed = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]
        places = [(page["file"], page["line"]) for page in listed]
        assert places == [
            ("filter_labels_train.txt", 7),
            ("filter_labels_train.txt", 8),
            ("lbl.json", 4),
            ("trn.json", 1),
            ("trn.json", 21),
            ("trn.json", 50),
        ]
        assert manifest.labels_without_text == 1
        pairs = read_arrow(folder / "filter_train.arrow", FILTER_SCHEMA)
        assert [(TRAIN[int(uids[row][1:])][0], label) for row, label in zip(*pairs.to_pydict().values(), strict=True)] == [
            ("t1", 9),
            ("t21", 3),
            ("t48", 2),
        ]
        assert read_arrow(folder / "filter_test.arrow", FILTER_SCHEMA).to_pylist() == [{"row": 11, "label": 39}]
        with pytest.raises(DataError, match=r"lbl.json:4: not valid JSON"):
            prepare(configure())

    @pytest.mark.parametrize(
        ("file", "bad"),
        [("trn.json", b"{"), ("trn.json", b'{"uid": "t0", "title": "again", "target_ind": [1]}'), ("lbl.json", b"{"), ("filter", b"x")],
    )
    def test_bad_input_leaves_what_was_prepared(self, file: str, bad: bytes, tmp_path: Path, configure: Configure) -> None:
        source = write_source(tmp_path / "source", "jsonl", TRAIN, TEST, LABELS)
        folder = tmp_path / "prepared"
        prepare(configure())
        (folder / "groups.json").write_text("the order")
        before = contents(folder)
        path = source / ("filter_labels_test.txt" if file == "filter" else file)
        good = path.read_bytes().splitlines() if path.exists() else []
        write_lines(path, [*good, bad])
        with pytest.raises(DataError, match=rf"{path.name}:{len(good) + 1}: "):
            prepare(configure())
        assert not (folder / ".tables").exists()
        assert {name: data for name, data in contents(folder).items() if name in before} == before
        assert open_split(folder, read_manifest(folder), "train").num_rows == len(TRAIN)
        write_lines(path, good)
        write_lines(source / "trn.json", json_lines(TRAIN[:40]))
        manifest = prepare(configure())
        assert open_split(folder, manifest, "train").num_rows == 40
        assert len(list((folder / "train").iterdir())) == len(manifest.splits["train"].shards)
        once = contents(folder)
        prepare(configure())  # all is there
        assert contents(folder) == once

    def test_input_that_no_setting_can_use(self, tmp_path: Path, configure: Configure) -> None:
        source = write_source(tmp_path / "source", "jsonl", [(uid, text, []) for uid, text, _ in TRAIN], TEST, LABELS)
        with pytest.raises(DataError, match=r"trn.json: all 50 texts have no label; add labels"):
            prepare(configure("data.on_error=quarantine"))
        write_lines(source / "trn.json", [b"{", b"}"])
        with pytest.raises(DataError, match=r"trn.json: no texts that can be used \(2 bad ones\)"):
            prepare(configure("data.on_error=quarantine"))
        write_source(tmp_path / "hidden", "jsonl", TRAIN, [(uid, text, []) for uid, text, _ in TEST], LABELS)
        with pytest.raises(DataError, match=r"tst.json: all 12 texts have no label; add labels, or take the file away and set "):
            prepare(configure(f"data.source={tmp_path}/hidden"))
        write_source(tmp_path / "tables", "parquet", TRAIN, [], LABELS)
        with pytest.raises(DataError, match=r"test.parquet: no texts; put the test texts there"):
            prepare(configure(f"data.source={tmp_path}/tables"))
        write_lines(source / "trn.json.gz", [])
        (source / "trn.json").unlink()
        with pytest.raises(DataError, match=r"trn.json.gz: no texts; put the train texts there"):
            prepare(configure())

    def test_labels_are_counted_where_no_file_names_them(self, tmp_path: Path, configure: Configure) -> None:
        write_source(tmp_path / "source", "jsonl", TRAIN, TEST, None)
        manifest = prepare(configure())
        assert manifest.labels == 1 + max(label for _, _, labels in TRAIN + TEST for label in labels)
        assert manifest.labels_without_text == manifest.labels

    def test_a_shard_that_cannot_be_written_is_named_and_the_rest_stays(self, tmp_path: Path, configure: Configure) -> None:
        write_source(tmp_path / "source", "jsonl", TRAIN, TEST, LABELS)
        shutil.rmtree(tmp_path / "prepared", ignore_errors=True)
        (tmp_path / "prepared/train/00002.arrow/in the way").mkdir(parents=True)
        with pytest.raises(DataError, match=r"train/00002.arrow: cannot be (written|made or replaced) \(Is a directory\)"):
            prepare(configure())

    def test_a_full_disk_stops_in_one_line_and_a_rerun_goes_on(self, tmp_path: Path, configure: Configure, small_disk: Path) -> None:
        many = make_texts(6000, LABELS)
        write_source(tmp_path / "source", "jsonl", many, TEST, LABELS)
        overrides = (f"data.prepared={small_disk}/prepared", "data.rows_per_shard=500")
        with pytest.raises(DataError, match=r"/prepared/\S+: no space left on device while writing \([0-9.]+ MiB free on that disk\)"):
            prepare(configure(*overrides))
        folder = small_disk / "prepared"
        kept = {name: stamp for name, stamp in stamps(folder).items() if name.startswith("train")}
        assert 0 < len(kept) < 12
        assert not [name for name in contents(folder) if name.endswith(".part")]
        subprocess.run(["mount", "-o", "remount,size=16m", small_disk], check=True)
        prepare(configure(*overrides))
        assert {name: stamps(folder)[name] for name in kept} == kept
        prepare(configure("data.rows_per_shard=500"))
        assert data_files(folder) == data_files(tmp_path / "prepared")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 KiB in memory."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs; tests/test_manifest.py simulates a full disk everywhere")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_settings_that_cannot_be_used(tmp_path: Path, configure: Configure) -> None:
    with pytest.raises(ConfigError, match=r"data.prepared is empty"):
        prepare(configure("data.prepared="))
    write_source(tmp_path / "raw", "arrow", TRAIN, TEST, LABELS)
    before = contents(tmp_path / "raw")
    with pytest.raises(ConfigError, match=r"raw holds raw texts; choose another folder"):
        prepare(configure(f"data.prepared={tmp_path}/raw"))
    assert contents(tmp_path / "raw") == before
    with pytest.raises(ConfigError, match=r"data.rows_per_shard=\d+: times data.max_length it must stay below 2\^31"):
        prepare(configure("data.rows_per_shard=16777216", "data.max_length=128"))


def test_a_scratch_encoder_that_is_to_compare_labels_is_told_before_anything_is_written(configure: Configure, tmp_path: Path) -> None:
    for words, more in ((["groups.method=semantic"], "$"), (["output.start=centroids"], ", output.start=random, output.basis=embedding$")):
        config = configure("groups.features=encoder", *words)
        with pytest.raises(
            ConfigError, match=f"a scratch encoder has learnt nothing to compare labels by; set groups.features=tfidf{more}"
        ):
            prepare(config)
        assert not Path(config.data.prepared).exists()
    with pytest.raises(DataError, match=r"source: no such folder"):
        prepare(configure())


PLAIN = st.one_of(
    st.from_regex(r"[ -~]{1,60}", fullmatch=True), st.lists(st.sampled_from([*WORDS, "x" * 120, "[SEP]", "[sep]", "-", "e5"])).map(" ".join)
)
TEXTS = st.lists(st.one_of(st.text(min_size=1, max_size=60), PLAIN.filter(bool)), min_size=1, max_size=20)


@settings(max_examples=100)
@given(TEXTS, st.integers(4, 20), st.sampled_from(["left", "right"]))
def test_workers_tokenise_as_transformers_does(wordpiece: Path, texts: list[str], max_length: int, side: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(wordpiece, truncation_side=side)
    rules = tokenizer_rules(tokenizer.backend_tokenizer, max_length, side)
    assert tokenise(texts, rules).to_pylist() == tokenizer(texts, truncation=True, max_length=max_length)["input_ids"]


def test_a_manifest_is_the_same_wherever_the_source_lies(tmp_path: Path, configure: Configure, ray_session: None) -> None:
    manifests: list[Manifest] = []
    for place in ("here", "there"):
        write_source(tmp_path / place, "jsonl", TRAIN, TEST, LABELS)
        manifests.append(prepare(configure(f"data.source={tmp_path}/{place}", f"data.prepared={tmp_path}/{place}-out")))
    assert manifests[0] == manifests[1]
