"""`haste prepare`: raw texts and labels in, a prepared folder out (shards, label texts, manifest, label order).

What is written is a pure function of the source and the settings, not of the number of workers. A rerun with the same ones keeps the
shards that are finished; with others it starts anew. The manifest goes first when something changes and comes last when all is there.
"""

import hashlib
import json
import re
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from haste_dist import tables
from haste_dist.config import Config
from haste_dist.errors import ConfigError, DataError
from haste_dist.manifest import (
    LABEL_TEXTS,
    MANIFEST,
    SCHEMA_VERSION,
    Manifest,
    Shard,
    Split,
    TokenizerRecord,
    file_sha256,
    read_manifest,
    write_manifest,
)
from haste_dist.pipeline import Plan, run
from haste_dist.shards import finished_shards, is_intact, record_path, shard_name, tokenizer_rules
from haste_dist.sources import SPLITS, Problem, count_labels, detect_format, find_source

OURS = re.compile(r"\d{5,}\.(arrow|json)|\..*\.part")  # names that prepare gives to files of a split
REPORT_SECONDS = 5.0  # between progress lines where there is no terminal


def prepare(config: Config) -> Manifest:
    """Makes the prepared folder, or brings it up to date, and prints a summary. Ray must be running.

    Raises ConfigError or DataError, in one line, for settings or input that cannot be used, and where the disk is full.
    """
    from haste_dist.encoder import load_tokenizer, tokenizer_fingerprint  # torch and transformers: seconds to import

    data = config.data
    _check_settings(config)
    source = find_source(data)
    folder = Path(data.prepared).absolute()
    tokenizer = load_tokenizer(config.encoder)
    side = str(tokenizer.truncation_side)
    record = TokenizerRecord(
        name=config.encoder.tokenizer or config.encoder.name,
        fingerprint=tokenizer_fingerprint(tokenizer),
        pad_id=int(tokenizer.pad_token_id),
        vocab_size=len(tokenizer),
    )
    origin = {
        "format": source.format,
        "files": [{"name": file.name, "bytes": file.stat().st_size, "sha256": file_sha256(file)} for file in source.files()],
    }
    settings = [SCHEMA_VERSION, origin, record.fingerprint, side, data.max_length, data.rows_per_shard, data.limit, data.on_error]
    fingerprint = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    started, written = time.perf_counter(), 0
    manifest = _complete(folder, fingerprint)
    if manifest is None:
        finished = _clear(folder, finished_shards(folder, SPLITS, fingerprint))
        stop = data.on_error == "stop"
        labels = count_labels(source, stop)
        plan = Plan(source, folder, labels, data.rows_per_shard, data.limit, stop, fingerprint, frozenset(finished))
        manifest = Manifest(origin, 0, data.max_length, record, {}, fingerprint=fingerprint)
        written = _convert(plan, tokenizer_rules(tokenizer.backend_tokenizer, data.max_length, side), data.workers, finished, manifest)
    for split in SPLITS:  # records of single shards have done their duty
        for path in (folder / split).glob("*.json"):
            path.unlink()
    _print_summary(manifest, folder, written, time.perf_counter() - started)
    _order_labels(config, folder, manifest)
    return manifest


def _check_settings(config: Config) -> None:
    data = config.data
    if not data.prepared:
        raise ConfigError("data.prepared is empty; set it to the folder that the prepared data shall go to")
    if detect_format(Path(data.prepared)):  # its labels.arrow, for one, would be replaced
        raise ConfigError(f"data.prepared={data.prepared} holds raw texts; choose another folder for the prepared data")
    if data.rows_per_shard * data.max_length >= 2**31:
        raise ConfigError(f"data.rows_per_shard={data.rows_per_shard}: times data.max_length it must stay below 2^31 tokens; lower it")


def _complete(folder: Path, fingerprint: str) -> Manifest | None:
    """The manifest of a folder that is whole and made from the same source with the same settings, else None."""
    try:
        manifest = read_manifest(folder)
    except DataError:
        return None
    others = [LABEL_TEXTS, *(tables.filter_file(split) for split in manifest.filters)]
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    whole = manifest.fingerprint == fingerprint and all((folder / name).is_file() for name in others)
    return manifest if whole and all(is_intact(folder, shard) for shard in shards) else None


def _clear(folder: Path, finished: dict[str, Shard]) -> dict[str, Shard]:
    """Removes what an earlier run left, the manifest first, except ``finished`` shards and their records."""
    keep = {folder / file for file in finished} | {record_path(folder, file) for file in finished}
    names = [MANIFEST, "groups.json", "labels.arrow", LABEL_TEXTS, tables.QUARANTINE, *(tables.filter_file(split) for split in SPLITS)]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            (folder / name).unlink(missing_ok=True)
        for path in (path for split in SPLITS for path in (folder / split).glob("*")):
            if OURS.fullmatch(path.name) and path not in keep:
                path.unlink()
    except OSError as error:
        raise DataError(f"{error.filename or folder}: cannot be made or replaced ({error.strerror}); check data.prepared") from None
    return finished


def _convert(plan: Plan, rules: str, workers: int, finished: dict[str, Shard], manifest: Manifest) -> int:
    """Runs the pipeline, writes all tables and the manifest, which it completes; returns the number of rows tokenised."""
    shards: dict[str, dict[int, Shard]] = {split: {} for split in plan.source.splits}
    problems: dict[str, list[Problem]] = {split: [] for split in plan.source.splits}
    written = 0
    with _progress() as report, closing(run(plan, rules, workers)) as records:
        for record in records:
            if record["error"]:
                raise DataError(record["error"])
            split, number = record["split"], record["shard"]
            problems[split] += [Problem(*json.loads(problem)) for problem in record["problems"]]
            file = shard_name(split, number)
            if number < 0:
                continue
            if file in plan.finished:
                shards[split][number] = finished[file]
            else:
                shards[split][number] = Shard(file, record["rows"], record["bytes"], record["sha256"])
                written += record["rows"]
            report(sum(shard.rows for found in shards.values() for shard in found.values()))
    _finish(plan, {split: [found[number] for number in range(len(found))] for split, found in shards.items()}, problems, manifest)
    return written


def _finish(plan: Plan, shards: dict[str, list[Shard]], problems: dict[str, list[Problem]], manifest: Manifest) -> None:
    """Sums, label texts, filters, quarantine; then the manifest, last."""
    folder, source = plan.folder, plan.source
    highest = -1
    for split, found in shards.items():
        manifest.splits[split] = Split(rows=sum(shard.rows for shard in found), shards=found)
        if not found:
            bad = f" that can be used ({len(problems[split])} bad ones)" if problems[split] else ""
            raise DataError(f"{source.splits[split][0]}: no texts{bad}; put the {split} texts there")
        highest = max(highest, tables.fill_sums(folder, manifest, split))
    if manifest.splits["train"].positives == 0:
        raise DataError(f"{source.splits['train'][-1]}: no training labels: all {manifest.splits['train'].rows} texts have none; add them")
    manifest.labels = highest + 1 if plan.labels is None else plan.labels

    frequency, in_test = (tables.label_frequency(folder, manifest, split) for split in SPLITS)
    manifest.unseen_test_labels = int(np.count_nonzero((in_test > 0) & (frequency == 0)))
    manifest.unseen_test_positives = int(in_test[frequency == 0].sum())
    manifest.labels_without_text, found_problems = tables.write_label_texts(folder, source, frequency)
    for split in source.filters:
        dropped = np.array(sorted(problem.number for problem in problems[split] if problem.number >= 0), np.int64)
        limited = split == "train" and plan.limit > 0
        found_problems += tables.write_filter(folder, source, split, manifest, dropped, limited)
        manifest.filters.append(split)
    if plan.stop and found_problems:
        raise found_problems[0].error()
    manifest.quarantined = tables.write_quarantine(folder, [*found_problems, *(p for found in problems.values() for p in found)])
    write_manifest(folder, manifest)


def _order_labels(config: Config, folder: Path, manifest: Manifest) -> None:
    from haste_dist.label_groups import label_order_is_current, make_label_order

    console = Console()
    if label_order_is_current(config, folder, manifest):
        console.print("label order: up to date")
        return
    page = make_label_order(config, folder, manifest)
    cohesion = page.get("cohesion")
    close = "" if cohesion is None else f", cohesion {cohesion:.3f} (random groups {page['cohesion_random']:.3f})"
    console.print(
        f"label order: {page['head_rows']:,} head rows, {page['groups']:,} groups of {page['group_size']}{close}",
        highlight=False,
        soft_wrap=True,
    )


def _print_summary(manifest: Manifest, folder: Path, written: int, seconds: float) -> None:
    console = Console()
    table = Table(title=f"{folder}: {manifest.labels:,} labels", title_justify="left")
    for name in ("split", "rows", "labels/text", "tokens/text", "without labels", "shards"):
        table.add_column(name, justify="left" if name == "split" else "right")
    for name, split in manifest.splits.items():
        means = (f"{split.positives / split.rows:.2f}", f"{split.tokens / split.rows:.1f}")
        table.add_row(name, f"{split.rows:,}", *means, f"{split.unlabelled:,}", f"{len(split.shards):,}")
    console.print(table)
    rate = f"{written:,} rows written in {seconds:.1f} s ({written / seconds:,.0f} rows/s)" if written else "up to date, nothing written"
    console.print(rate, highlight=False, soft_wrap=True)
    notes = [(manifest.unseen_test_labels, f"test labels ({manifest.unseen_test_positives:,} positives) never seen in training, kept")]
    notes += [(count, f"bad lines left out: {reason} (see {tables.QUARANTINE})") for reason, count in manifest.quarantined.items()]
    for count, note in notes:
        if count:
            console.print(f"{count:,} {note}", highlight=False, soft_wrap=True)


@contextmanager
def _progress() -> Iterator[Any]:
    """A function that takes the rows done so far: a live line on a terminal, else a line on stderr every few seconds."""
    console, started = Console(stderr=True), time.perf_counter()
    if console.is_terminal:
        with Progress(SpinnerColumn(), TextColumn("prepare: {task.description}"), TimeElapsedColumn(), console=console) as bar:
            task = bar.add_task("starting", total=None)
            yield lambda rows: bar.update(task, description=f"{rows:,} rows, {rows / (time.perf_counter() - started):,.0f} rows/s")
        return
    last = [started]

    def line(rows: int) -> None:
        now = time.perf_counter()
        if now - last[0] >= REPORT_SECONDS:
            last[0] = now
            print(f"prepare: {rows:,} rows, {rows / (now - started):,.0f} rows/s", file=sys.stderr, flush=True)

    yield line
