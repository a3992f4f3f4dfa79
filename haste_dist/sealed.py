"""JSON pages that carry their own checksum, and folders whose files are listed in such a page with theirs.

A sealed page is written in one fixed form and read back only if writing it again gives the same bytes, so that any changed byte is
noticed, blanks included. checksums.json seals the files of a run or prepared folder that nothing else vouches for.
"""

import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from haste_dist.errors import HasteError
from haste_dist.manifest import atomic_file, file_sha256

CHECKSUMS = "checksums.json"
SCHEMA_VERSION = 1


def seal(page: dict[str, Any]) -> bytes:
    """The page as bytes, with the sha256 of all else under ``checksum``. No number in it may be NaN or infinite."""
    return _form({**page, "checksum": hashlib.sha256(_form(page)).hexdigest()})


def unseal(data: bytes) -> dict[str, Any]:
    """What was sealed, without the checksum. Raises ValueError if a byte is not as it was."""
    page = json.loads(data)
    if not isinstance(page, dict) or "checksum" not in page:
        raise ValueError("not a page with a checksum")
    del page["checksum"]
    if seal(page) != data:
        raise ValueError("its checksum differs")
    return page


def inside(folder: Path, name: str) -> Path:
    """``folder``/``name``, for a name that a file gave. Raises ValueError where it would lead out of the folder."""
    if not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", name, re.ASCII):
        raise ValueError(f"{name[:80]!r} is no plain file name")
    return folder / name


def check_file(folder: Path, name: str, record: dict[str, Any], what_to_do: str) -> None:
    """Holds a file against its ``bytes`` and ``sha256``. Raises HasteError naming it, with ``what_to_do``."""
    try:
        path = inside(folder, name)
        if not path.is_file():
            raise HasteError(f"{path}: missing; {what_to_do}")
        size = path.stat().st_size
        if size != record["bytes"]:
            raise HasteError(f"{path}: damaged (it has {size} bytes instead of {record['bytes']}); {what_to_do}")
        if file_sha256(path) != record["sha256"]:
            raise HasteError(f"{path}: damaged (its checksum differs); {what_to_do}")
    except (OSError, ValueError) as error:
        raise HasteError(f"{folder}: {error}; {what_to_do}") from None


def seal_folder(folder: Path, names: Iterable[str]) -> None:
    """Writes checksums.json over the files ``names``, relative to ``folder``; replaces an older one in one step. Raises HasteError."""
    records = {}
    try:
        for name in sorted(names):
            path = inside(folder, name)
            records[name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        with atomic_file(folder / CHECKSUMS) as file:
            file.write(seal({"schema_version": SCHEMA_VERSION, "files": records}))
    except OSError as error:
        raise HasteError(f"{folder / CHECKSUMS}: cannot be written ({error}); check the folder's permissions and its disk") from None


def seal_data(folder: Path) -> None:
    """Writes the checksums of a prepared folder: of all but the shards, which the manifest vouches for. Raises HasteError."""
    seal_folder(folder, (path.name for path in folder.iterdir() if path.is_file() and path.name != CHECKSUMS and path.name[0] != "."))


def read_checksums(folder: Path, what_to_do: str) -> dict[str, dict[str, Any]]:
    """The records of checksums.json by file name. Raises HasteError where it is missing, damaged or of another version."""
    path = folder / CHECKSUMS
    try:
        page = unseal(path.read_bytes())
        if page["schema_version"] != SCHEMA_VERSION:
            raise HasteError(f"{path}: schema version {page['schema_version']}, this program reads {SCHEMA_VERSION}; {what_to_do}")
        return page["files"]
    except FileNotFoundError:
        raise HasteError(f"{path}: missing (an older version wrote this folder); {what_to_do}") from None
    except (OSError, ValueError, KeyError) as error:
        raise HasteError(f"{path}: damaged ({error}); {what_to_do}") from None


def check_folder(folder: Path, what_to_do: str) -> None:
    """Holds every file of checksums.json against it. A folder without one, by an older version, passes: ``haste verify`` tells.

    Raises HasteError naming the first file that differs.
    """
    if (folder / CHECKSUMS).exists():
        for name, record in read_checksums(folder, what_to_do).items():
            check_file(folder, name, record, what_to_do)


def _form(page: dict[str, Any]) -> bytes:
    return (json.dumps(page, indent=1, allow_nan=False) + "\n").encode()
