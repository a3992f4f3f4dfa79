"""haste_dist: extreme multi-label classification with a dense head and a group-shared sparse tail (arXiv 2606.01117)."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from haste_dist.predictor import Predictor

__version__ = "0.1.0"


def load(path: "str | Path", checkpoint: str = "best", device: str = "auto") -> "Predictor":
    """The model of a run folder that ``haste train`` wrote, or of a folder that ``haste export`` wrote.

    ``checkpoint``: best, last, or a name such as step-00001200. ``device``: auto (a GPU where there is one), cpu or cuda. Raises
    HasteError, in one line, where the folder is none of them, or damaged.

    >>> import haste_dist
    >>> model = haste_dist.load(run, device="cpu")
    >>> [ranked] = model.predict(["w0 w1 w14"], k=3)
    >>> ranked[0].label, ranked[0].text, ranked[0].score > ranked[1].score > ranked[2].score
    (0, 'w0', True)
    >>> model.predict([])
    []
    """
    from haste_dist.predictor import Predictor  # torch and transformers: seconds to import

    return Predictor(path, checkpoint, device)
