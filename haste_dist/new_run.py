"""A run folder that no training wrote: what ``haste labels add`` and ``haste average`` make of other runs."""

import dataclasses
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from haste_dist import checkpoint
from haste_dist.checkpoint import PAGE, RunState
from haste_dist.config import ENCODER_FOLDER, Config, save_config
from haste_dist.errors import CheckpointError, ConfigError
from haste_dist.label_groups import copy_order
from haste_dist.manifest import atomic_file
from haste_dist.sealed import seal
from haste_dist.tensor_file import FileRecord
from haste_dist.verify import seal_run

Files = dict[str, FileRecord]


def check_free(folder: str | Path) -> None:
    """Raises ConfigError where there is a run already."""
    found = checkpoint.newest(Path(folder) / checkpoint.CHECKPOINTS)
    if found is not None:
        raise ConfigError(f"{folder}: holds a run already ({found.name}); choose another folder")


@contextmanager
def new_run(config: Config, source: Path, order: Path, fingerprint: str, step: int) -> Iterator[tuple[Path, Files]]:
    """Yields the checkpoint folder of ``step`` and what is to be filled with the records of its files; then the run is made whole.

    It lies in ``run.folder``, with the encoder's files of the run ``source`` and the label order of ``order``, whose ``fingerprint`` this
    is. What a killed attempt left is cleared away; one that fails leaves nothing. Raises CheckpointError where nothing can be written.
    """
    target, files = Path(config.run.folder), Files()
    folder = target / checkpoint.CHECKPOINTS / checkpoint.folder_name(step)
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        yield folder, files
        save_config(config, target / "config.yaml")
        shutil.copytree(source / ENCODER_FOLDER, target / ENCODER_FOLDER, dirs_exist_ok=True)
        copy_order(order, target)
        seal_run(target)
        state = RunState(step=step, best_step=step)  # so that the checkpoint stays until an evaluation picks a better one
        page = {"schema_version": checkpoint.SCHEMA_VERSION, "label_order": fingerprint, "state": dataclasses.asdict(state)}
        records = {name: dataclasses.asdict(record) for name, record in sorted(files.items())}
        with atomic_file(folder / PAGE) as out:  # last: with it the checkpoint is complete
            out.write(seal({**page, "files": records}))
        for pointer in ("last", "best"):
            checkpoint.point(target / checkpoint.CHECKPOINTS, pointer, step)
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        for empty in (folder.parent, target):
            with suppress(OSError):
                empty.rmdir()
        if not isinstance(error, OSError):
            raise
        raise CheckpointError(f"{folder}: cannot be written ({error.strerror or error}); check run.folder and its disk") from None
