"""A prepared folder in an object store, and this machine's copy of it. Training maps shards into memory, so it reads the copy."""

import fcntl
import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from haste_dist.augmentation import TWINS
from haste_dist.errors import ConfigError, DataError
from haste_dist.manifest import LABEL_TEXTS, MANIFEST, Shard, read_manifest, replacing
from haste_dist.sealed import CHECKSUMS
from haste_dist.storage import Location, whole_address
from haste_dist.tables import QUARANTINE

ORDER_FILES = ("labels.arrow", "groups.json", "cohesion.arrow", "label_vectors.npy", "label_basis.safetensors")  # what the label order is
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


def fetch(place: Location, copy: Path) -> None:
    """Downloads what the copy lacks, the manifest last."""
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
    small = [LABEL_TEXTS, QUARANTINE, TWINS, *ORDER_FILES, CHECKSUMS, *(f"filter_{split}.arrow" for split in manifest.filters)]
    with ThreadPoolExecutor(TRANSFERS) as pool:
        list(pool.map(lambda name: _download(place, copy, name), (name for name in small if (place / name).is_file())))
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
