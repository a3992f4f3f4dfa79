"""Imports of large libraries, cheaper: Python's cyclic garbage collector rests meanwhile.

torch, transformers and DeepSpeed make millions of objects that stay. The collector walks through them again and again, for a tenth to a
quarter of the time that the imports of a rank take.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Switches the collector off for a while. What no cycle holds is freed as ever. Threads may overlap: in the end it is on again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def import_ahead(load: Callable[[], None]) -> None:
    """Runs ``load``, which imports what something will need. An error is left to whoever imports the module next.

    In a thread beside another that imports Ray it may import nothing with Ray: two threads in its circular imports can see halves of them.
    """
    with no_collection(), contextlib.suppress(Exception):
        load()
