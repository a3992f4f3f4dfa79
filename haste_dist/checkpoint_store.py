"""Checkpoints in an object store, or in another folder, besides those of the run folder.

A store has no rename. What publishes a checkpoint there is its state.json: it is written last and removed first, and without it nothing of
the folder counts. Each rank uploads the files that it wrote, behind the steps, and the first one publishes. A run folder whose own
checkpoints are older, such as an empty one on another machine, gets the newest one from there, and the best.
"""

import os
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from haste_dist.checkpoint import PAGE, STEP_NAME, folder_name, newest, point, read_page, step_of, verify_files
from haste_dist.errors import CheckpointError, DataError
from haste_dist.sealed import inside
from haste_dist.storage import whole_address

TRANSFERS = 8  # at once
PROBE = "writable"


class CheckpointStore:
    """Where checkpoints are copied to. Methods raise DataError where the store cannot be read or written."""

    def __init__(self, address: str):
        self.place = whole_address(address)

    def check(self) -> None:
        """Whether it can be written, before a run relies on it."""
        (self.place / PROBE).write(b"haste\n")
        (self.place / PROBE).delete()

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints there, fewest first."""
        return sorted(step for step, complete in self._folders().items() if complete)

    def upload(self, checkpoint: Path, names: Iterable[str]) -> None:
        """Copies files of a complete checkpoint, while nothing vouches for them there."""
        there = self.place / checkpoint.name
        (there / PAGE).delete()  # of an earlier save of this step
        with ThreadPoolExecutor(TRANSFERS) as pool:
            list(pool.map(lambda name: (there / name).upload(checkpoint / name), names))

    def publish(self, checkpoint: Path, kept: set[int]) -> None:
        """Makes an uploaded checkpoint count, and removes those whose step is not in ``kept``, and what interrupted saves left."""
        (self.place / checkpoint.name / PAGE).upload(checkpoint / PAGE)
        for step in self._folders():
            if step not in kept and step != step_of(checkpoint):
                with suppress(DataError):  # the next save tries again
                    (self.place / folder_name(step) / PAGE).delete()
                    (self.place / folder_name(step)).delete_folder()

    def restore(self, folder: Path) -> Path | None:
        """Fetches the newest checkpoint into ``folder``, and the best, if ``folder`` has none as new. The newest if fetched, else None.

        Nothing takes its name there before its checksums are right. Raises CheckpointError naming a damaged file of the store.
        """
        steps, have = self.steps(), newest(folder)
        if not steps or (have is not None and step_of(have) >= steps[-1]):
            return None
        found = self._fetch(steps[-1], folder)
        best = read_page(found)["state"]["best_step"]
        if best in steps and not (folder / folder_name(best)).is_dir():
            self._fetch(best, folder)
        point(folder, "last", steps[-1])
        if (folder / folder_name(best)).is_dir():
            point(folder, "best", best)
        return found

    def _folders(self) -> dict[int, bool]:
        """Steps of all checkpoints there, complete or not."""
        names = [name for name in self.place.folders() if STEP_NAME.fullmatch(name)]
        return {step_of(Path(name)): (self.place / name / PAGE).is_file() for name in names}

    def _fetch(self, step: int, folder: Path) -> Path:
        there, final = self.place / folder_name(step), folder / folder_name(step)
        partial = folder / f".partial-{step:08d}"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            (there / PAGE).download(partial / PAGE)
            page = read_page(partial)
            paths = {name: inside(partial, name) for name in page["files"]}
            with ThreadPoolExecutor(TRANSFERS) as pool:
                list(pool.map(lambda name: (there / name).download(paths[name]), paths))
            verify_files(partial, page)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(partial, final)
        except (CheckpointError, ValueError) as error:
            raise CheckpointError(f"{there}: {str(error).replace(f'{partial}/', '')}") from None
        except OSError as error:
            raise CheckpointError(f"{partial}: cannot be written ({error.strerror or error})") from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return final
