"""Label texts as training texts: all of them, counted apart, in both readers, and none that is a test or dev text."""

import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from in_turn import contents, read_in_turn, run_in_turn, settings
from raw_sources import make_texts, make_wordpiece, write_lines, write_source, write_table

import haste_dist.prepare
from haste_dist import reembedding
from haste_dist.augmentation import SPLIT, TWINS, kept_rows
from haste_dist.config import Config
from haste_dist.errors import ConfigError
from haste_dist.label_groups import LabelOrder
from haste_dist.loader import BatchMaker, open_texts
from haste_dist.manifest import LABEL_SCHEMA, Manifest, open_split, read_arrow, read_manifest
from haste_dist.model import Prepared
from haste_dist.preflight import check_run
from haste_dist.prepare import prepare
from haste_dist.readers import training_batches
from haste_dist.verify import verify

LABELS = 40
TITLES = ["river red", "stone NIGHT", *(f"label {i}" for i in range(2, LABELS))]
TRAIN = [*make_texts(50, LABELS), ("t-twin", "Stone night", [3])]  # the text of label 1, in other letters
TEST = [*make_texts(12, LABELS, "s"), ("s-twin", "river red", [5]), ("s-second", " river  red", [6])]  # twice that of label 0
Epoch = Counter[tuple[tuple[int, ...], tuple[int, ...]]]  # tokens and labels of a text


@pytest.fixture(scope="module")
def wordpiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_wordpiece(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(autouse=True)
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(haste_dist.prepare, "run", run_in_turn)
    read_in_turn(monkeypatch)


def source(folder: Path, layout: str = "jsonl") -> Path:
    write_source(folder, layout, TRAIN, TEST, LABELS)
    if layout.startswith("jsonl"):
        lines = [json.dumps({"uid": "same" if i < 2 else f"l{i}", "title": title}).encode() for i, title in enumerate(TITLES)]
        write_lines(folder / "lbl.json", lines)
    elif layout == "text":
        write_lines(folder / "label_raw_texts.txt", [title.encode() for title in TITLES])
    else:
        write_table(folder / f"labels.{layout}", {"text": TITLES})
    return folder


def an_epoch(config: Config, manifest: Manifest, split: str = "train") -> Epoch:
    folder, data = Path(config.data.prepared), config.data
    texts = open_texts(folder, manifest, split, data.dev_fraction, config.run.seed, data.label_texts)
    batches = training_batches(config, BatchMaker(texts, np.arange(LABELS), 5, 0, 1, 0), 16, folder)
    seen: Epoch = Counter()
    for batch in itertools.islice(batches.from_step(0), batches.steps_per_epoch):
        for ids, mask, labels in zip(batch.input_ids, batch.attention_mask.bool(), batch.label_rows, strict=True):
            seen[tuple(ids[mask].tolist()), tuple(labels[labels >= 0].tolist())] += 1
    return seen


def rows_of(config: Config, manifest: Manifest, split: str) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [(tuple(row["input_ids"]), tuple(row["labels"])) for row in open_split(config.data.prepared, manifest, split).to_pylist()]


@pytest.mark.parametrize("layout", ["jsonl", "text", "parquet", "arrow"])
def test_both_readers_deliver_every_label_text_but_test_texts(tmp_path: Path, wordpiece: Path, layout: str) -> None:
    words = (source(tmp_path / "source", layout), tmp_path / "prepared", wordpiece, "data.label_texts=2")
    config = settings(*words)
    manifest = prepare(config)
    train, own = rows_of(config, manifest, "train"), rows_of(config, manifest, SPLIT)
    assert (len(train), manifest.splits["train"].rows) == (51, 51)
    assert [labels for _, labels in own] == [(label,) for label in range(LABELS)]
    assert manifest.splits[SPLIT].rows == manifest.splits[SPLIT].positives == LABELS
    assert [shard.rows for shard in manifest.splits[SPLIT].shards] == [16, 16, 8]
    expected = Counter(train) + Counter(own[1:]) + Counter(own[1:])
    assert own[0][0] in {tokens for tokens, _ in rows_of(config, manifest, "test")}
    assert an_epoch(config, manifest) == an_epoch(settings(*words, "data.reader=ray"), manifest) == expected
    verify(config.data.prepared)


def test_label_embeddings_made_anew_take_each_label_text_once(tmp_path: Path, wordpiece: Path) -> None:
    config = settings(source(tmp_path / "source"), tmp_path / "prepared", wordpiece, "data.label_texts=2")
    manifest = prepare(config)
    order = LabelOrder(np.arange(LABELS), np.arange(LABELS), 0, 0, 1, np.ones(LABELS, np.int64))
    prepared = Prepared(Path(config.data.prepared), manifest, order)
    assert len(reembedding._texts(config, prepared)) == 51 + LABELS - 1  # the text of label 0 is a test text
    config.groups.label_text = False
    assert len(reembedding._texts(config, prepared)) == 51


def test_a_dev_text_is_no_training_text_by_its_label(tmp_path: Path, wordpiece: Path) -> None:
    words = (source(tmp_path / "source"), tmp_path / "prepared", wordpiece, "data.label_texts=1", "data.dev_fraction=0.5")
    manifest = prepare(settings(*words))
    twin, held_out = rows_of(settings(*words), manifest, SPLIT)[1], 0
    for seed in range(8):
        config = settings(*words, f"run.seed={seed}")
        dev = open_texts(Path(config.data.prepared), manifest, "dev", 0.5, seed)
        is_dev = 50 in dev.positions
        both = [an_epoch(settings(*words, f"run.seed={seed}", f"data.reader={reader}"), manifest) for reader in ("mmap", "ray")]
        assert both[0] == both[1]
        assert both[0][twin] == (not is_dev)
        assert sum(both[0].values()) == len(TRAIN) - len(dev) + LABELS - 1 - is_dev
        held_out += is_dev
    assert 0 < held_out < 8


def test_it_comes_and_goes_by_the_setting_and_leaves_all_else_as_it_is(tmp_path: Path, wordpiece: Path) -> None:
    folder = tmp_path / "prepared"
    words = (source(tmp_path / "source"), folder, wordpiece)
    prepare(settings(*words))
    plain = contents(folder)
    with pytest.raises(ConfigError, match=r"prepared without label texts as training texts; run haste prepare with data.label_texts=1"):
        check_run(settings(*words, "data.label_texts=1"))
    prepare(settings(*words, "data.label_texts=1"))
    augmented = contents(folder)
    changed = {name for name in plain if augmented[name] != plain[name]}
    assert changed == {"manifest.json", "checksums.json"}
    assert augmented.keys() - plain.keys() == {TWINS, *(f"label_texts/0000{i}.arrow" for i in range(3))}
    assert (
        read_arrow(folder / "label_texts.arrow", LABEL_SCHEMA)["frequency"].to_pylist()
        == np.bincount([label for _, _, labels in TRAIN for label in labels], minlength=LABELS).tolist()
    )
    check_run(settings(*words, "data.label_texts=1"))
    prepare(settings(*words))
    assert contents(folder) == plain
    prepare(settings(*words[:1], tmp_path / "at-once", *words[2:], "data.label_texts=3"))
    assert contents(tmp_path / "at-once") == augmented


def test_what_a_kill_left_is_finished(tmp_path: Path, wordpiece: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "prepared"
    config = settings(source(tmp_path / "source"), folder, wordpiece, "data.label_texts=1")
    prepare(config)
    whole = contents(folder)
    (folder / TWINS).unlink()  # the manifest comes just before it
    prepare(config)
    assert contents(folder) == whole
    prepare(settings(tmp_path / "source", folder, wordpiece))

    def killed(*_: object) -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("haste_dist.augmentation.write_twins", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(config)
    with pytest.raises(ConfigError, match="prepared without label texts"):
        kept_rows(folder, read_manifest(folder), np.zeros(0, np.int64))
    prepare(config)
    assert contents(folder) == whole


def test_labels_without_any_text_are_told(tmp_path: Path, wordpiece: Path) -> None:
    write_source(tmp_path / "source", "parquet", TRAIN, TEST, None)
    with pytest.raises(ConfigError, match=r"data.label_texts: no label has a text of its own; add a file of label texts"):
        prepare(settings(tmp_path / "source", tmp_path / "prepared", wordpiece, "data.label_texts=1"))
