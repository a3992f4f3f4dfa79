"""Who owns what: pure arithmetic on ranks, label rows and batch rows. No tensors, no processes."""

from dataclasses import dataclass

import numpy as np

from haste_dist.errors import ConfigError

GOLDEN = (5**0.5 - 1) / 2


def span(count: int, parts: int, part: int) -> tuple[int, int]:
    """The ``part``-th of ``parts`` contiguous, near-equal ranges of ``range(count)``, as (start, stop)."""
    return count * part // parts, count * (part + 1) // parts


@dataclass(frozen=True)
class LabelShard:
    """The label rows of one rank: a range of the dense head and a range of the tail's groups.

    Rows 0..head_rows-1 are the head; group g holds rows head_rows + g * group_size and on. Rows from ``labels`` on (at most
    the end of the last group) are padding: they belong to no label.
    """

    head_start: int
    head_stop: int
    group_start: int
    group_stop: int
    head_rows: int
    group_size: int
    labels: int

    @property
    def groups(self) -> int:
        return self.group_stop - self.group_start

    @property
    def all_groups(self) -> int:
        """Groups of all ranks together."""
        return -(-(self.labels - self.head_rows) // self.group_size)

    @property
    def tail_start(self) -> int:
        """Global row of the first tail row here."""
        return self.head_rows + self.group_start * self.group_size

    @property
    def tail_rows(self) -> int:
        """Real (not padded) tail rows here."""
        stop = self.head_rows + self.group_stop * self.group_size
        return max(0, min(stop, self.labels) - self.tail_start)


def label_shard(head_rows: int, groups: int, group_size: int, labels: int, ranks: int, rank: int) -> LabelShard:
    """The shard of ``rank``: head rows and groups are each cut into contiguous, near-equal ranges."""
    return LabelShard(*span(head_rows, ranks, rank), *span(groups, ranks, rank), head_rows, group_size, labels)


def label_parts(label_parallel: int, ranks: int) -> int:
    """P: into how many shards the labels are cut, for ``launch.label_parallel`` (0: one a rank). Raises ConfigError unless P divides W."""
    if not label_parallel:
        return ranks
    if ranks % label_parallel:
        fitting = ", ".join(str(parts) for parts in range(1, ranks + 1) if ranks % parts == 0)
        raise ConfigError(
            f"launch.label_parallel={label_parallel} does not divide the {ranks} rank{'s' if ranks > 1 else ''} of this run; "
            f"set it to one of {fitting} (or 0), or start a multiple of {label_parallel} ranks"
        )
    return label_parallel


def spread(count: int) -> np.ndarray:
    """(count,) int64: an order of ``range(count)`` in which every range of places holds its share of small and of large numbers.

    Multiples of the golden ratio modulo 1 lie evenly, however many there are; sorted by them, the most frequent labels fall on any
    number of ranks alike.
    """
    return np.argsort(np.arange(count) * GOLDEN % 1, kind="stable")


def batch_share(rows: int, ranks: int, rank: int) -> tuple[int, int, int]:
    """How ``rows`` batch rows fall on ranks: (start, stop, padded) of this rank.

    Every rank computes ``padded`` = ceil(rows / ranks) rows, so that collectives have one shape; rows start..stop-1 are
    its real ones, and the padding of the last ranks stands behind all real rows once gathered.
    """
    padded = -(-rows // ranks)
    return min(rows, rank * padded), min(rows, (rank + 1) * padded), padded


@dataclass(frozen=True)
class Rows:
    """The rows start..stop-1 of a global batch of ``total`` rows."""

    start: int
    stop: int
    total: int

    def __len__(self) -> int:
        return self.stop - self.start


def all_rows(rows: int) -> Rows:
    return Rows(0, rows, rows)


def replica_rows(rows: int, padded: int, ranks: int, replica: int) -> Rows:
    """What the ``ranks`` ranks of a replica have together of ``rows`` batch rows, by ``batch_share``; the last replicas may have none."""
    each = ranks * padded
    return Rows(min(rows, replica * each), min(rows, (replica + 1) * each), rows)
