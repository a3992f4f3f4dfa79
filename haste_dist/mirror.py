"""A prepared folder in an object store, and this machine's copy of it. Training maps shards into memory, so it reads the copy."""

import fcntl
import hashlib
import os
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from haste_dist.augmentation import TWINS
from haste_dist.errors import ConfigError, DataError
from haste_dist.manifest import LABEL_TEXTS, MANIFEST, Shard, read_manifest, replacing
from haste_dist.sealed import CHECKSUMS
from haste_dist.sources import SPLITS
from haste_dist.storage import Location, whole_address
from haste_dist.tables import QUARANTINE, filter_file

TABLES = (LABEL_TEXTS, QUARANTINE, TWINS, *(filter_file(split) for split in SPLITS))  # those of them that a data set has
ORDER_FILES = ("labels.arrow", "cohesion.arrow", "label_vectors.npy", "label_basis.safetensors", "groups.json")
"""What the label order is; groups.json tells that it is whole, so it comes last."""
TRANSFERS = 8  # at once


def local_copy(address: str | Path) -> Path:
    """The folder itself, or where it lies in a store, a copy in ~/.cache/haste_dist (or HASTE_CACHE), brought up to date.

    Raises ConfigError for no address, DataError where something is missing, or is not what the manifest says.
    """
    if not address:
        raise ConfigError("data.prepared is empty: name the folder that haste prepare wrote")
    place = whole_address(str(address))
    if place.is_local:
        return Path(address)
    copy = copy_folder(place)
    with _locked(copy):  # ranks of one machine share it
        fetch(place, copy)
    return copy


def copy_folder(place: Location) -> Path:
    """Where this machine keeps what it has of a remote folder; ``place`` itself if it is local."""
    if place.is_local:
        return place.local
    root = Path(os.environ.get("HASTE_CACHE") or Path.home() / ".cache/haste_dist")
    return root / "prepared" / f"{place.name}-{hashlib.sha256(place.address.encode()).hexdigest()[:12]}"


def fetch(place: Location, copy: Path, keep: Collection[str] = ()) -> None:
    """Downloads what the copy lacks, the manifest last, and removes the small files that the store has not, but for ``keep``.

    What a data set has is told by which files exist. So the manifest of other data goes first: nobody reads a part of each.
    """
    manifest_file = place / MANIFEST
    if not manifest_file.is_file():
        raise DataError(f"{manifest_file}: no such file; run haste prepare (data.prepared={place})")
    data = manifest_file.read()
    same = (copy / MANIFEST).is_file() and (copy / MANIFEST).read_bytes() == data
    new = copy / f".{MANIFEST}"
    with replacing(new) as file:
        file.write(data)
    manifest = read_manifest(copy, new.name)
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    small = (*TABLES, *ORDER_FILES, CHECKSUMS)
    with ThreadPoolExecutor(TRANSFERS) as pool:
        there = [name for name, found in zip(small, pool.map(lambda name: (place / name).is_file(), small), strict=True) if found]
        if not same:
            (copy / MANIFEST).unlink(missing_ok=True)
        for name in {*small} - {*there, *keep}:
            (copy / name).unlink(missing_ok=True)
        list(pool.map(lambda name: _download(place, copy, name), there))
        list(pool.map(lambda shard: _download_shard(place, copy, shard, same), shards))
    new.replace(copy / MANIFEST)


def publish(copy: Path, place: Location, names: Iterable[str]) -> None:
    """Uploads files of the copy, in this order; those that it lacks are removed there. Nothing to do for a local folder."""
    if place.is_local:
        return
    for name in names:
        if (copy / name).is_file():
            (place / name).write((copy / name).read_bytes())
        else:
            (place / name).delete()


def _download(place: Location, copy: Path, name: str) -> bytes:
    data = (place / name).read()
    with replacing(copy / name) as file:
        file.write(data)
    return data


def _download_shard(place: Location, copy: Path, shard: Shard, same: bool) -> None:
    path = copy / shard.file
    if same and path.is_file() and path.stat().st_size == shard.bytes:
        return
    if hashlib.sha256(_download(place, copy, shard.file)).hexdigest() != shard.sha256:
        path.unlink()
        raise DataError(f"{place / shard.file}: its checksum is not the manifest's; run haste prepare again")


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
