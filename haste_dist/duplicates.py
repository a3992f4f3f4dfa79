"""Repeated uids of a split, found in little memory however long it is: hashes go to files by some of their bits, each is sorted alone."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

import numpy as np

from haste_dist.manifest import PREPARED, cannot_write

FILES = 64
ENTRY = np.dtype([("high", "<u8"), ("low", "<u8"), ("shard", "<u4"), ("row", "<u4")])


class UidLedger:
    """Takes the uids' hashes of shard after shard, in any order; tells which rows repeat a row before them. A context manager."""

    def __init__(self, folder: Path):
        """``folder`` is made, and removed at the end."""
        self._folder = folder
        shutil.rmtree(folder, ignore_errors=True)
        with self._errors():
            folder.mkdir(parents=True)
            self._files = [(folder / f"{i:02d}").open("wb") for i in range(FILES)]

    def add(self, shard: int, hashes: bytes) -> None:
        """``hashes``: 16 bytes a row of the shard."""
        pairs = np.frombuffer(hashes, np.dtype("<u8")).reshape(-1, 2)
        entries = np.empty(len(pairs), ENTRY)
        entries["high"], entries["low"], entries["shard"], entries["row"] = pairs[:, 0], pairs[:, 1], shard, np.arange(len(pairs))
        file = pairs[:, 0] % FILES
        order = np.argsort(file, kind="stable")
        with self._errors():
            for i, part in enumerate(np.split(entries[order], np.searchsorted(file[order], np.arange(1, FILES)))):
                self._files[i].write(part.tobytes())

    def repeated(self) -> dict[int, np.ndarray]:
        """Rows, ascending, by shard: those whose uid stands in an earlier shard, or earlier in the same one."""
        found = []
        for file in self._files:
            with self._errors():
                file.flush()
            entries = np.frombuffer(Path(file.name).read_bytes(), ENTRY)
            order = np.lexsort((entries["row"], entries["shard"], entries["low"], entries["high"]))
            entries = entries[order]
            same = (entries["high"][1:] == entries["high"][:-1]) & (entries["low"][1:] == entries["low"][:-1])
            found.append(entries[1:][same])
        repeated = np.sort(np.concatenate(found), order=("shard", "row"))
        if not len(repeated):
            return {}
        shards, first = np.unique(repeated["shard"], return_index=True)
        return {int(s): rows["row"].astype(np.int64) for s, rows in zip(shards, np.split(repeated, first[1:]), strict=True)}

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise cannot_write(self._folder, error, PREPARED) from None

    def __enter__(self) -> "UidLedger":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for file in self._files:
            with suppress(OSError):  # a full disk has been told already
                file.close()
        shutil.rmtree(self._folder, ignore_errors=True)
