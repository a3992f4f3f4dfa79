"""How many bytes of tensors live while operations run, counted as they run: on a CPU, or on the meta device, where nothing is computed.

An allocator's own answer is only to be had on a GPU. What an operation takes and frees inside is not seen.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """The most bytes of distinct storages alive after any operation: of those given, made or read while it is entered."""

    def __init__(self, held: Iterable[Tensor] = ()):
        super().__init__()
        self.peak = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}
        self._count(held)

    @property
    def now(self) -> int:
        """Bytes alive at this moment."""
        self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
        return sum(size for _, size in self._live.values())

    def restart(self) -> None:
        """Forgets the peak so far."""
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self._count(args)
        self._count(result if isinstance(result, list | tuple) else [result])
        return result

    def _count(self, values: Iterable[Any]) -> None:
        for value in values:
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
            elif isinstance(value, list | tuple):
                self._count(value)
        self.peak = max(self.peak, self.now)
