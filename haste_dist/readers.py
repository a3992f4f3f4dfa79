"""Which reader a run's batches come from: shards mapped into each rank's memory, or streamed through Ray Data (``data.reader``)."""

from pathlib import Path
from typing import TYPE_CHECKING

from haste_dist.config import Config
from haste_dist.loader import BatchMaker, TrainingBatches

if TYPE_CHECKING:
    from haste_dist.ray_reader import RayBatches


def training_batches(config: Config, maker: BatchMaker, batch_size: int, prepared: Path) -> "TrainingBatches | RayBatches":
    """The training batches, of ``batch_size`` texts over all ranks."""
    wanted = (maker, batch_size, config.data.length_buckets, config.run.seed)
    if config.data.reader == "mmap":
        return TrainingBatches(*wanted)
    from haste_dist.ray_reader import RayBatches  # Ray Data takes a second to import

    return RayBatches(*wanted, prepared, config.data)
