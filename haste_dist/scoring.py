"""Scoring a checkpoint of a trained run, as each rank runs it."""

from pathlib import Path

from haste_dist import checkpoint
from haste_dist.agreement import patiently, same_error
from haste_dist.config import Config
from haste_dist.evaluate import Keep, evaluate_baseline, evaluate_texts, write_evaluation
from haste_dist.held_out import check_split
from haste_dist.model import frozen_engine, make_classifier, make_encoder, open_prepared
from haste_dist.verify import check_data, check_run_files
from haste_dist.world import World


def evaluate_run(config: Config, world: World, name: str = "best", keep: Keep | None = None) -> dict[str, float]:
    """Metrics of checkpoint ``name`` on ``evaluate.split``, as fractions; the first rank writes evaluate-<split>.json.

    Every rank calls it. ``keep`` sees the predictions of its own rank's texts. Raises HasteError.
    """
    prepared = patiently(lambda: open_prepared(config), world)
    split = config.evaluate.split
    check_split(config, prepared.folder, prepared.manifest, split)
    patiently(lambda: _check(Path(config.run.folder), prepared.folder) if world.is_first else None, world)
    encoder = make_encoder(config, prepared.manifest, pretrained=False)
    classifier = make_classifier(config, prepared.order, encoder.width, world, drawn=False)
    engine = frozen_engine(config, encoder, world)
    folder = checkpoint.resolve(Path(config.run.folder) / checkpoint.CHECKPOINTS, name)
    with same_error(world):
        state = checkpoint.load(folder, engine, classifier, prepared.order.fingerprint)
    result = evaluate_texts(config, prepared, engine, classifier, world, split, keep=keep)
    if world.is_first:
        baseline = evaluate_baseline(config, prepared, split)
        write_evaluation(config.run.folder, split, result, baseline, step=state.step, checkpoint=folder.name)
    return result


def _check(run: Path, prepared: Path) -> None:
    check_run_files(run)
    check_data(prepared)
