"""Every line is in exactly one block, wherever reads, blocks and files end; repeated uids are found whatever the order of shards."""

import gzip
import hashlib
import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from haste_dist import blocks
from haste_dist.blocks import LineReader, Part, Truncated, make_parts, read_blocks, read_lines, split_lines
from haste_dist.duplicates import UidLedger
from haste_dist.errors import DataError
from haste_dist.shards import uid_hashes
from haste_dist.storage import Location

LINES = st.lists(st.binary(max_size=12).map(lambda line: line.replace(b"\n", b"x").replace(b"\r", b"y")), max_size=40)


def place(folder: Path, name: str, data: bytes) -> Location:
    packed = {".gz": gzip.compress, ".zst": lambda raw: pa.compress(raw, "zstd", asbytes=True)}.get(Path(name).suffix, bytes)
    (folder / name).write_bytes(packed(data))
    return Location(str(folder / name))


@settings(max_examples=150)
@given(LINES, st.booleans(), st.integers(1, 9), st.integers(1, 60), st.integers(1, 70), st.sampled_from(["a", "a.gz", "a.zst"]))
def test_every_line_is_in_one_block(
    tmp_path_factory: pytest.TempPathFactory, lines: list[bytes], ended: bool, rows: int, size: int, read: int, name: str
) -> None:
    data = b"\n".join(lines) + (b"\n" if ended and lines else b"")
    expected = data.split(b"\n")[: None if data and not data.endswith(b"\n") else -1]
    if expected and expected[0].startswith(b"\xef\xbb\xbf"):
        expected[0] = expected[0][3:]
    folder = tmp_path_factory.mktemp("lines")
    file = place(folder, name, data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "READ_BYTES", read)
        patch.setattr(blocks, "BLOCK_BYTES", size)
        found = list(read_blocks(Part("train", "jsonl", (file,)), rows))
        assert [line for _, line in read_lines(file)] == expected
    assert [line for block in found for line in split_lines(block.data[0], block.first_line)] == expected
    assert [block.number for block in found] == list(range(len(found)))
    ends = list(itertools.accumulate(block.data[0].count(b"\n") for block in found))
    assert [block.first_row for block in found] == [0, *ends[:-1]] if found else ends == []
    assert all(block.data[0].count(b"\n") <= rows for block in found)


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.binary(max_size=9), st.binary(max_size=30)), max_size=25),
    st.integers(1, 9),
    st.integers(1, 40),
    st.integers(0, 30),
)
def test_texts_stay_beside_their_labels(
    tmp_path_factory: pytest.TempPathFactory, pairs: list[tuple[bytes, bytes]], rows: int, size: int, limit: int
) -> None:
    pairs = [(a.replace(b"\n", b"x"), b.replace(b"\n", b"x")) for a, b in pairs]
    folder = tmp_path_factory.mktemp("pairs")
    files = [place(folder, f"{i}.gz", b"".join(pair[i] + b"\n" for pair in pairs)) for i in (0, 1)]
    (part,) = make_parts("train", "text", files, rows, limit)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "READ_BYTES", 16)
        patch.setattr(blocks, "BLOCK_BYTES", size)
        found = list(read_blocks(part, rows))
    read = [pair for block in found for pair in zip(*(split_lines(data, 2) for data in block.data), strict=True)]
    assert read == [tuple(side.rstrip(b"\r") for side in pair) for pair in pairs[: limit or None]]


def test_a_file_that_breaks_off_gives_what_was_whole(tmp_path: Path) -> None:
    lines = [b"%d" % i + b"x" * (i % 90) for i in range(9000)]
    for name in ("a.gz", "a.zst"):
        file = place(tmp_path, name, b"\n".join(lines))
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-9])
        whole: list[bytes] = []
        read = (whole.extend(split_lines(block.data[0], 2)) for block in read_blocks(Part("train", "jsonl", (file,)), 100))
        with pytest.raises(Truncated) as error:
            list(read)
        assert whole == lines[: len(whole)]
        assert error.value.args[0] == len(whole) > 1000


def test_a_line_without_end_is_refused_before_it_fills_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "LINE_BYTES", 2**17)
    file = place(tmp_path, "a.gz", b"short\n" + b"x" * 2**22)
    reader = LineReader(file)
    with pytest.raises(DataError, match=r"a.gz:2: a line of more than 0 MiB; texts are expected one a line"):
        reader.take(2)


@given(st.lists(st.lists(st.integers(0, 60), max_size=15), max_size=10), st.randoms())
def test_the_ledger_equals_a_set(tmp_path_factory: pytest.TempPathFactory, shards: list[list[int]], random) -> None:
    seen, expected = set(), {}
    for number, uids in enumerate(shards):
        rows = []
        for row, uid in enumerate(uids):
            if uid in seen:
                rows.append(row)
            seen.add(uid)
        if rows:
            expected[number] = rows
    order = list(enumerate(shards))
    random.shuffle(order)
    folder = tmp_path_factory.mktemp("ledger") / "files"
    with UidLedger(folder) as ledger:
        for number, uids in order:
            ledger.add(number, uid_hashes([str(uid) for uid in uids]))
        found = ledger.repeated()
    assert {number: rows.tolist() for number, rows in found.items()} == expected
    assert not folder.exists()


def test_hashes_are_of_the_text_alone() -> None:
    assert uid_hashes(["a", "b"]) == b"".join(hashlib.blake2b(uid, digest_size=16).digest() for uid in (b"a", b"b"))
    assert np.frombuffer(uid_hashes(["a", "a"]), "V16")[0] == np.frombuffer(uid_hashes(["a"]), "V16")[0]
