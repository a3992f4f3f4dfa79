"""Files and folders on this machine or in an object store, under one name.

``Location("data/wordnet")`` is a path, ``Location("s3://bucket/wordnet")`` an object store's address. pyarrow's filesystems read and write
S3, Google Cloud Storage, Azure and HDFS; any other scheme goes to fsspec, if its package is installed. Credentials, region and
endpoint come from the environment, as the stores' own tools take them (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL, ...).
"""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from pyarrow import fs

from haste_dist.errors import DataError
from haste_dist.manifest import first_line, replacing

PIECE = 2**26  # bytes copied at once
PACKED = {".gz": "gzip", ".zst": "zstd"}
"""What a file name's end says about how its bytes are packed."""


@dataclass(frozen=True, order=True)
class Location:
    """The address of a file or folder. Methods that touch it raise DataError with that address."""

    address: str

    def __str__(self) -> str:
        return self.address

    def __truediv__(self, name: str) -> "Location":
        return Location(f"{self.address.rstrip('/')}/{name}")

    @property
    def name(self) -> str:
        return self.address.rstrip("/").rpartition("/")[2]

    @property
    def suffix(self) -> str:
        return os.path.splitext(self.name)[1]

    @property
    def is_local(self) -> bool:
        return "://" not in self.address

    @property
    def local(self) -> Path:
        """The path of a local place."""
        assert self.is_local, self.address
        return Path(self.address)

    @property
    def parent(self) -> "Location":
        return Location(self.address.rstrip("/").rpartition("/")[0])

    def size(self) -> int | None:
        """Bytes of the file, or None where there is no file."""
        info = self._info()
        return info.size if info.is_file else None

    def is_file(self) -> bool:
        return bool(self._info().is_file)

    def is_dir(self) -> bool:
        return self._info().type == fs.FileType.Directory

    def changed(self) -> int:
        """When the file was last written, in ns since 1970."""
        return self._info().mtime_ns or 0

    def files(self) -> list["Location"]:
        """The files right under this folder, by name; none where there is no such folder."""
        with self._errors("listed"):
            found = self._filesystem().get_file_info(fs.FileSelector(self._path(), allow_not_found=True))
        return sorted(self / info.base_name for info in found if info.is_file)

    def folders(self) -> list[str]:
        """Names of the folders right under this one."""
        with self._errors("listed"):
            found = self._filesystem().get_file_info(fs.FileSelector(self._path(), allow_not_found=True))
        return sorted(info.base_name for info in found if info.type == fs.FileType.Directory)

    def open(self) -> pa.NativeFile:
        """The file's bytes as they lie there, with seeking."""
        with self._errors("read"):
            return pa.memory_map(self.address) if self.is_local else self._filesystem().open_input_file(self._path())

    def open_unpacked(self) -> pa.NativeFile:
        """The file's bytes as a stream, unpacked if its name ends in .gz or .zst."""
        with self._errors("read"):
            file = pa.OSFile(self.address) if self.is_local else self._filesystem().open_input_file(self._path())
            return pa.CompressedInputStream(file, PACKED[self.suffix]) if self.suffix in PACKED else file

    def read(self) -> bytes:
        with self._errors("read"), self._filesystem().open_input_file(self._path()) as file:
            return file.read()

    def write(self, data: bytes | pa.Buffer) -> None:
        """Puts a whole file there in one step: readers see the old one or the new one."""
        if self.is_local:
            with replacing(self.local) as file:
                file.write(data)  # type: ignore[arg-type]
            return
        with self._errors("written"), self._filesystem().open_output_stream(self._path()) as out:
            out.write(data)

    def upload(self, path: Path) -> None:
        """Copies a local file there, in pieces. Where that fails, part of it may be there."""
        if self.is_local:
            self.local.parent.mkdir(parents=True, exist_ok=True)
        with self._errors("written"), path.open("rb") as file, self._filesystem().open_output_stream(self._path()) as out:
            while piece := file.read(PIECE):
                out.write(piece)

    def download(self, path: Path) -> None:
        """Copies the file to a local path, in pieces; nothing half-copied takes its place."""
        with replacing(path) as out:
            for piece in self._pieces():
                out.write(piece)

    def delete_folder(self) -> None:
        """Removes a folder and all in it."""
        with self._errors("removed"):
            self._filesystem().delete_dir(self._path())

    def delete(self) -> None:
        """Removes the file, if it is there."""
        with self._errors("removed"):
            if self._info().is_file:
                self._filesystem().delete_file(self._path())

    def _pieces(self) -> Iterator[bytes]:
        with self._errors("read"), self._filesystem().open_input_stream(self._path()) as file:
            while piece := file.read(PIECE):
                yield piece

    def _info(self) -> fs.FileInfo:
        with self._errors("read"):
            return self._filesystem().get_file_info(self._path())

    def _filesystem(self) -> fs.FileSystem:
        scheme, _, rest = self.address.rpartition("://")
        return _filesystem(scheme, rest.partition("/")[0] if scheme else "")

    def _path(self) -> str:
        return os.path.abspath(self.address) if self.is_local else self.address.partition("://")[2].rstrip("/")

    @contextmanager
    def _errors(self, done: str) -> Iterator[None]:
        try:
            yield
        except (OSError, pa.ArrowException) as error:
            reason = getattr(error, "strerror", None) or first_line(error)
            raise DataError(f"{self.address}: cannot be {done} ({reason}); check the address and the rights to it") from None


def whole_address(address: str) -> Location:
    """An address as it reads from any folder: local paths become absolute."""
    return Location(address if "://" in address else os.path.abspath(address))


@functools.lru_cache(maxsize=32)
def _filesystem(scheme: str, bucket: str) -> fs.FileSystem:
    if not scheme:
        return fs.LocalFileSystem()
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    if scheme == "s3" and endpoint:  # from_uri would ask Amazon for the bucket's region
        return fs.S3FileSystem(endpoint_override=endpoint, region=os.environ.get("AWS_REGION") or "us-east-1")
    try:
        return fs.FileSystem.from_uri(f"{scheme}://{bucket}")[0]
    except pa.ArrowInvalid:
        pass
    try:
        import fsspec

        return fs.PyFileSystem(fs.FSSpecHandler(fsspec.filesystem(scheme)))
    except (ImportError, ValueError) as error:
        raise DataError(f"{scheme}://: no filesystem for this scheme ({first_line(error)}); install the fsspec package for it") from None
