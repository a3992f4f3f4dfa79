"""Debian's packages as a data set: relations, descriptions, the split by source package, and sources that cannot be had."""

import functools
import gzip
import http.server
import json
import lzma
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from haste_dist.datasets import build_dataset
from haste_dist.debian_packages import PATHS, _names, debian_texts
from haste_dist.errors import DataError
from haste_launch import cli

PACKAGES = """\
Package: viewer
Source: pictures (1.2-3)
Pre-Depends: dpkg (>= 1.15)
Depends: libpicture1 (= 1.2), libc6 (>= 2.14) | libc6-udeb, python3:any
Recommends: viewer:i386
Suggests: viewer-doc <!nodoc>
Description: shows pictures
Description-md5: aa

Package: libpicture1
Source: pictures
Depends: libc6 [amd64]
Description: pictures in a library

Package: libpicture-old1
Depends: libx11-6
Description: Pictures, in a LIBRARY!

Package: alone
Description: asks for nothing

Package: silent
Depends: libc6
"""
TRANSLATION = """\
Package: viewer
Description-md5: aa
Description-en: shows pictures
 One after the  other.
 .
 Also in colour: red.

Package: libpicture1
Description-md5: other
Description-en: of another version
"""


@pytest.fixture
def indices(tmp_path: Path) -> Path:
    folder = tmp_path / "indices"
    folder.mkdir()
    (folder / "Packages").write_text(PACKAGES)
    (folder / "Translation-en.gz").write_bytes(gzip.compress(TRANSLATION.encode()))
    return folder


def many(packages: int, of_a_source: int) -> str:
    """An index of packages that depend on one of seven; the texts are those of their numbers."""
    return "".join(
        f"Package: p{i:03}\nSource: s{i // of_a_source:03}\nDepends: lib{i % 7}\nDescription: number {i}\n\n" for i in range(packages)
    )


def test_descriptions_and_what_they_ask_for(indices: Path) -> None:
    texts, titles, licence, release = debian_texts(indices)
    viewer, library = texts["shows pictures one after the other also in colour red"], texts["pictures in a library"]
    assert (viewer.uid, viewer.title, viewer.group) == ("viewer", "shows pictures", "pictures")
    assert viewer.text == "One after the other. Also in colour: red."
    assert viewer.labels == {"dpkg", "libpicture1", "libc6", "libc6-udeb", "python3", "viewer-doc"}  # never the package itself
    # Two packages that say the same are one text, under the name of the first; nobody's other version describes it.
    assert (library.uid, library.text, library.labels) == ("libpicture1", "", {"libc6", "libx11-6"})
    assert len(texts) == 2  # without a relation or a description there is nothing to learn
    assert titles == {label: label for label in viewer.labels | library.labels}
    assert b"licence" in licence
    assert release == "other indices than Debian 12.15's"


@given(
    st.lists(st.tuples(st.from_regex("[a-z0-9][a-z0-9+.-]{1,8}", fullmatch=True), st.sampled_from(["", " (>= 1:2~)", ":any", " [amd64]"])))
)
def test_names_of_a_relation(wanted: list[tuple[str, str]]) -> None:
    joined = "".join(f"{name}{more}{' | ' if i % 3 else ', '}" for i, (name, more) in enumerate(wanted))
    assert list(_names(joined)) == [name for name, _ in wanted]


def test_a_source_package_stays_on_one_side(indices: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (indices / "Packages").write_text(many(200, 4))
    assert cli.main(["datasets", "build", "debian", "--out", str(tmp_path / "out"), "--source", str(indices)]) == 0
    assert "180 texts to train on, 20 to test, 7 labels, from other indices than Debian 12.15's" in capsys.readouterr().out
    sides: dict[str, set[str]] = {}
    for side in ("trn", "tst"):
        with gzip.open(tmp_path / f"out/{side}.json.gz", "rt") as file:
            for row in map(json.loads, file):
                number = int(row["uid"][1:])
                sides.setdefault(f"s{number // 4:03}", set()).add(side)
                assert (row["title"], row["content"], row["target_ind"]) == (f"number {number}", "", [number % 7])
    assert len(sides) == 50
    assert all(len(side) == 1 for side in sides.values())
    assert sum("tst" in side for side in sides.values()) == 5
    # A source package too large for the test split is passed over.
    (indices / "Packages").write_text(many(200, 40) + many(3, 1).replace("p00", "q00").replace("s00", "t00").replace("number", "letter"))
    assert build_dataset("debian", tmp_path / "large", indices)["test_texts"] == 3


@pytest.fixture
def mirror(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Path]]:
    """A mirror on this machine's loopback, and its folder."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder = tmp_path / "mirror"
    for name, text in (("Packages", PACKAGES), ("Translation-en", TRANSLATION)):
        (folder / PATHS[name]).parent.mkdir(parents=True, exist_ok=True)
        (folder / PATHS[name]).write_bytes(lzma.compress(text.encode()))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/", folder
        server.shutdown()
        thread.join()


def test_a_mirror(mirror: tuple[str, Path], indices: Path) -> None:
    address, folder = mirror
    assert debian_texts(address) == debian_texts(indices)
    whole = (folder / PATHS["Packages"]).read_bytes()
    (folder / PATHS["Packages"]).write_bytes(whole[:-40])
    with pytest.raises(DataError, match=r"Packages.xz: Compressed data ended.*; try again, or pass --source"):
        debian_texts(address)
    (folder / PATHS["Packages"]).unlink()
    with pytest.raises(DataError, match=r"Packages.xz: File not found; try again"):
        debian_texts(address)


def test_sources_that_cannot_be_used(
    indices: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    out = tmp_path / "out"
    words = ["datasets", "build", "debian", "--out", str(out), "--source"]
    for broken, says in (
        ("Depends: libc6\n\nPackage: a\n", "Packages:2: a paragraph without Package"),
        ("<html>\n", "Packages:1: not a line of a Debian package index"),
        (" and so on\nPackage: a\n", "Packages:1: not a line"),
        ("", "no package with a description and a relation"),
    ):
        (indices / "Packages").write_text(broken)
        assert cli.main([*words, str(indices)]) == 2
        said = capsys.readouterr().err
        assert says in said
        assert said.count("\n") == 1
    (indices / "Packages").unlink()
    assert cli.main([*words, str(indices)]) == 2
    assert f"{indices}: no Packages, Packages.gz or Packages.xz here" in capsys.readouterr().err
    (indices / "Packages.xz").write_bytes(b"not packed")
    assert cli.main([*words, str(indices)]) == 2
    assert "Packages.xz: Input format not supported by decoder; try again" in capsys.readouterr().err
    assert cli.main([*words, "http://127.0.0.1:9/debian"]) == 2
    assert "Connection refused; try again, or pass --source" in capsys.readouterr().err
    assert not out.exists()
