"""What is checked, and fetched, before the ranks of a run start: a mistake costs one line and no time on a GPU."""

from pathlib import Path

from haste_dist import checkpoint
from haste_dist.augmentation import check_label_texts
from haste_dist.basis import check_basis_features
from haste_dist.centroids import check_centroids
from haste_dist.checkpoint import CHECKPOINTS
from haste_dist.checkpoint_store import CheckpointStore
from haste_dist.classifier import check_basis, feature_slice
from haste_dist.config import Config
from haste_dist.embedder import check_embedder
from haste_dist.errors import CheckpointError
from haste_dist.held_out import check_held_out, check_split, trained_split
from haste_dist.label_groups import GROUPS_FILE
from haste_dist.model import Prepared, check_features, open_prepared
from haste_dist.trackers import check_trackers


def check_run(config: Config) -> Prepared:
    """All that can be checked before ranks start. Raises HasteError."""
    check_trackers(config)
    prepared = open_prepared(config)
    width = check_features(config, prepared.manifest)
    if config.output.basis == "labels":
        check_basis(prepared.order.basis, feature_slice(config.output.tail_features, width).width)
        check_basis_features(config, prepared.folder / GROUPS_FILE)
    check_held_out(config, prepared.folder / GROUPS_FILE)
    check_split(config, prepared.folder, prepared.manifest, trained_split(config))
    if config.data.label_texts:
        check_label_texts(prepared.folder, prepared.manifest)
    folder = Path(config.run.folder) / CHECKPOINTS
    found = checkpoint.newest(folder)
    if found is None:  # what goes on has started already, by new labels' neighbours too
        check_embedder(config, prepared.folder / GROUPS_FILE)
        if config.output.start == "centroids":
            check_centroids(prepared, width)
    if config.run.resume == "must" and found is None:
        raise CheckpointError(f"{folder}: no checkpoint to resume from (run.resume=must)")
    if config.run.resume == "never" and found is not None:
        raise CheckpointError(f"{folder}: holds a run already ({found.name}); choose another run.folder or run.resume=auto")
    if found is not None:
        checkpoint.page_of(found, prepared.order.fingerprint)
    return prepared


def restore(config: Config) -> None:
    """Fetches what ``checkpoint.store`` has that is newer than the run folder's checkpoints. Raises HasteError."""
    if not config.checkpoint.store:
        return
    store = CheckpointStore(config.checkpoint.store)
    store.check()
    if config.run.resume != "never":
        store.restore(Path(config.run.folder) / CHECKPOINTS)
    elif store.steps():
        raise CheckpointError(f"{store.place}: holds a run already; choose another checkpoint.store or run.resume=auto")
