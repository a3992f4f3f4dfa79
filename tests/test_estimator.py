"""The estimator: its documented example trains for real; scikit-learn takes it for one of its own; mistakes are one line."""

import doctest
from pathlib import Path

import pytest

from haste_dist.errors import ConfigError, DataError
from haste_dist.runlog import read_events
from haste_launch import estimator
from haste_launch.estimator import HasteClassifier


@pytest.mark.slow
def test_the_documented_example_trains(ray_session: None) -> None:
    tests = doctest.DocTestFinder().find(HasteClassifier, globs=vars(estimator))
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS, verbose=False)  # else pytest -v speaks to it too
    said: list[str] = []
    for test in tests:
        runner.run(test, out=said.append, clear_globs=False)
    assert "".join(said) == ""
    assert runner.tries > 5
    folder = next(t for t in tests if t.examples).globs["model"].folder_
    assert (folder / "run" / "checkpoints" / "best.json").is_file()


@pytest.mark.slow
def test_a_few_texts_of_which_none_is_held_out_train(ray_session: None, tmp_path: Path) -> None:
    """A tenth of three is none, so that the three choose the best checkpoint."""
    texts, labels = ["a cat sleeps", "the dog barks", "rain falls"], [["cat"], ["dog"], ["weather"]]
    settings = ["encoder.layers=1", "encoder.lr=1e-3", "output.lr=0.5", "train.batch_size=16", "train.patience=0"]
    model: HasteClassifier[str] = HasteClassifier(epochs=20, settings=settings, folder=str(tmp_path))
    assert model.fit(texts, labels).predict(texts, k=1) == labels
    assert [event["rows"] for event in read_events(tmp_path / "run") if event["event"] == "eval"][-1] == 3


def test_scikit_learn_takes_it_for_its_own() -> None:
    base = pytest.importorskip("sklearn.base", reason="scikit-learn is not installed")
    model = HasteClassifier(epochs=3, settings=("output.fan_in=8",), seed=7)
    again = base.clone(model)
    assert again is not model
    assert again.get_params() == model.get_params()
    assert again.set_params(epochs=4).epochs == 4


def test_mistakes_are_told_before_anything_starts(tmp_path: Path) -> None:
    model: HasteClassifier[str] = HasteClassifier(folder=str(tmp_path))
    with pytest.raises(ConfigError, match="call fit first"):
        model.predict(["a"])
    with pytest.raises(ConfigError, match="no parameter 'epoch'; it has encoder, epochs"):
        model.set_params(epoch=1)
    with pytest.raises(DataError, match="2 texts, but labels of 1"):
        model.fit(["a", "b"], [["x"]])
    with pytest.raises(DataError, match="put the one label into a list"):
        model.fit(["a", "b"], ["xy", "z"])
    with pytest.raises(DataError, match="nothing to learn"):
        model.fit(["a", "b"], [[], []])
    assert list(tmp_path.iterdir()) == []
