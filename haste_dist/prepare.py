"""`haste prepare`: raw texts and labels in, a prepared folder out (shards, label texts, manifest, label order).

What is written is a pure function of the source and the settings, not of the number of workers. A rerun with the same ones keeps the
shards that are finished; with others it starts anew. The manifest goes first when something changes and comes last when all is there.
Rows keep their order: training draws an order of its own from its seed, so shuffled shards would serve nothing.
"""

import hashlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from haste_dist import augmentation, tables
from haste_dist.blocks import make_parts
from haste_dist.config import Config
from haste_dist.duplicates import UidLedger
from haste_dist.errors import ConfigError, DataError
from haste_dist.held_out import dev_split
from haste_dist.manifest import (
    LABEL_TEXTS,
    MANIFEST,
    SCHEMA_VERSION,
    Manifest,
    Shard,
    TokenizerRecord,
    file_sha256,
    read_manifest,
    write_manifest,
)
from haste_dist.mirror import ORDER_FILES, TABLES, copy_folder, fetch, publish
from haste_dist.pipeline import Plan, run
from haste_dist.rows import Problem
from haste_dist.sealed import CHECKSUMS, seal_data
from haste_dist.shards import is_intact, page_name, read_page, read_shard, shard_sums, write_shard
from haste_dist.sources import SPLITS, Source, count_labels, detect_format, find_source
from haste_dist.storage import Location, whole_address
from haste_dist.tokens import tokenizer_rules

OURS = re.compile(r"\d{5,}(-[0-9a-f]{8})?\.(arrow|json)|\..*\.part")  # names that prepare gives to files of a split
REPORT_SECONDS = 5.0  # between progress lines where there is no terminal


def prepare(config: Config, order: Callable[[Config, Path, Manifest], None] | None = None) -> Manifest:
    """Makes the prepared folder, or brings it up to date, and prints a summary. Ray must be running. ``order`` writes its label order.

    Raises ConfigError or DataError, in one line, for settings or input that cannot be used, and where the disk is full.
    """
    from haste_dist.encoder import load_tokenizer, model_config, tokenizer_fingerprint  # torch and transformers: seconds to import

    data = config.data
    _check_settings(config)
    if order is None:  # a caller's own may embed by an encoder that has been trained
        _check_embedding(config)
    source = find_source(data)
    folder = whole_address(data.prepared)
    work = copy_folder(folder)
    tokenizer = load_tokenizer(config.encoder)
    side = str(tokenizer.truncation_side)
    record = TokenizerRecord(
        name=config.encoder.tokenizer or config.encoder.name,
        fingerprint=tokenizer_fingerprint(tokenizer),
        pad_id=int(tokenizer.pad_token_id),
        vocab_size=len(tokenizer),
    )
    model_config(config.encoder, record.vocab_size, record.pad_id, data.max_length)  # what cannot be trained on is told before the work
    origin = {"format": source.format, "files": [_describe(file) for file in source.files()]}
    settings = [SCHEMA_VERSION, origin, record.fingerprint, side, data.max_length, data.rows_per_shard, data.limit]
    fingerprint = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    started, written, stop = time.perf_counter(), 0, data.on_error == "stop"
    if (folder / MANIFEST).is_file():
        _update(folder, work)
    rules = tokenizer_rules(tokenizer.backend_tokenizer, data.max_length, side)
    manifest = _complete(folder, work, fingerprint, stop)
    if manifest is None:
        suffix = _suffix(folder, work, fingerprint)
        _clear(folder, work, ())
        labels = count_labels(source, stop)
        parts = []
        for split, files in source.splits.items():
            found = make_parts(split, source.format, files, data.rows_per_shard, data.limit if split == "train" else 0)
            if not found:
                raise DataError(f"{files[0]}: no texts; put the {split} texts there")
            parts += found
        plan = Plan(tuple(parts), folder, labels, data.rows_per_shard, fingerprint, suffix)
        manifest = Manifest(origin, 0, data.max_length, record, {}, fingerprint=fingerprint)
        in_splits, written = _convert(plan, rules, data.workers, stop, work)
        _check_splits(source, plan, in_splits, manifest)
        _finish(source, plan, in_splits, stop, data.limit, work, manifest)
    written += _label_texts(config, folder, work, manifest, rules)
    _remove_leftovers(folder, manifest)
    _print_summary(manifest, folder, written, time.perf_counter() - started)
    _update(folder, work)
    (order or _order_labels)(config, work, manifest)
    seal_data(work)
    publish(work, folder, (*ORDER_FILES, CHECKSUMS))
    return manifest


def _check_settings(config: Config) -> None:
    data = config.data
    dev_split(config)  # what the label order would refuse, before anything is written
    if not data.prepared:
        raise ConfigError("data.prepared is empty; set it to the folder that the prepared data shall go to")
    if detect_format(whole_address(data.prepared)):  # its labels.arrow, for one, would be replaced
        raise ConfigError(f"data.prepared={data.prepared} holds raw texts; choose another folder for the prepared data")
    if data.rows_per_shard * data.max_length >= 2**31:
        raise ConfigError(f"data.rows_per_shard={data.rows_per_shard}: times data.max_length it must stay below 2^31 tokens; lower it")


def _check_embedding(config: Config) -> None:
    """The encoder must be one that can compare labels where the label order will ask that of it."""
    asked = config.groups.method == "semantic" or config.output.start == "centroids" or config.output.basis == "labels"
    if asked and config.groups.features == "encoder":
        from haste_dist.text_embedders import encoder_source  # transformers: slow to import

        encoder_source(config)


def _describe(file: Location) -> dict[str, Any]:
    """What tells one version of a source file from another; the checksum where that is no download."""
    about = {"name": file.name, "bytes": file.size()}
    return about | ({"sha256": file_sha256(file.local)} if file.is_local else {"changed": file.changed()})


def _complete(folder: Location, work: Path, fingerprint: str, stop: bool) -> Manifest | None:
    """The manifest of a folder that is whole and made from the same source with the same settings, else None."""
    try:
        manifest = read_manifest(work)
    except DataError:
        return None
    if manifest.fingerprint != fingerprint or (stop and manifest.quarantined):
        return None
    others = [LABEL_TEXTS, *(tables.filter_file(split) for split in manifest.filters)]
    shards = [shard for split in manifest.splits.values() for shard in split.shards]
    return manifest if all((work / name).is_file() for name in others) and all(is_intact(folder, shard) for shard in shards) else None


def _update(folder: Location, work: Path) -> None:
    """Brings this machine's copy up to date. Where the store has no order, one that a killed run has made here stays."""
    if not folder.is_local:
        fetch(folder, work, keep=() if (folder / ORDER_FILES[-1]).is_file() else ORDER_FILES)


def _suffix(folder: Location, work: Path, fingerprint: str) -> str:
    """Of the names of shards: none, unless the folder holds shards of other files or settings, which stay until these are whole."""
    mine = f"-{fingerprint[:8]}"
    try:
        other = read_manifest(work).fingerprint != fingerprint
    except DataError:
        other = (folder / page_name("train", 0, mine)).is_file()
    return mine if other else ""


def _clear(folder: Location, work: Path, names: tuple[str, ...]) -> None:
    """Makes the folder and removes what an earlier run left beside its shards, which are told from stale ones by their pages."""
    try:
        work.mkdir(parents=True, exist_ok=True)
        for name in names:
            (work / name).unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"{error.filename or work}: cannot be made or replaced ({error.strerror}); check data.prepared") from None
    publish(work, folder, names)


def _remove_leftovers(folder: Location, manifest: Manifest) -> None:
    """Removes pages, which have done their duty, and the shards of earlier settings."""
    keep = {folder / shard.file for split in manifest.splits.values() for shard in split.shards}
    for file in (file for split in (*SPLITS, augmentation.SPLIT) for file in (folder / split).files()):
        if OURS.fullmatch(file.name) and file not in keep:
            file.delete()


@dataclass
class Found:
    """What the pipeline told of a split."""

    tally: tables.Tally
    parts: dict[int, int] = field(default_factory=dict)  # blocks of each part that was read to its end
    arrived: set[int] = field(default_factory=set)  # numbers of the blocks
    first_problem: dict[int, Problem] = field(default_factory=dict)  # of each block that had one
    broken: list[Problem] = field(default_factory=list)  # files that break off


def _convert(plan: Plan, rules: str, workers: int, stop: bool, work: Path) -> tuple[dict[str, Found], int]:
    """Runs the pipeline until every block is a shard; returns what is in each split, and the number of rows tokenised."""
    found = {part.split: Found(tables.Tally(plan.labels)) for part in plan.parts}
    written = rows = 0
    with _progress() as report, ExitStack() as stack, closing(run(plan, rules, workers)) as records:
        ledgers = {split: stack.enter_context(UidLedger(work / f".{split}.uids")) for split in found}
        for record in records:
            if record["error"]:
                raise DataError(record["error"])
            part, number = plan.parts[record["part"]], record["number"]
            split = found[part.split]
            if number < 0:
                split.parts[record["part"]] = record["end"]
                if record["problem"]:
                    split.broken.append(Problem(*json.loads(record["problem"])))
            elif number not in split.arrived:  # Ray may run a task again
                split.arrived.add(number)
                shard = Shard(**json.loads(record["page"]))
                split.tally.add(number, shard, json.loads(record["sums"]), np.frombuffer(record["labels"], np.int32))
                ledgers[part.split].add(number, record["uids"])
                written += shard.rows if record["fresh"] else 0
                rows += shard.rows
                if record["problem"]:
                    split.first_problem[number] = Problem(*json.loads(record["problem"]))
                report(rows)
            if stop:
                _stop_at_the_first(split)
        for name, split in found.items():
            _check_all_arrived(plan, name, split)
            _drop_repeated(plan, name, split, ledgers[name].repeated(), stop)
    return found, written


def _stop_at_the_first(split: Found) -> None:
    """Raises the first problem of a split once no block before it is missing."""
    if split.first_problem:
        first = min(split.first_problem)
        if all(number in split.arrived for number in range(first)):
            raise split.first_problem[first].error()
    elif split.broken and split.arrived.issuperset(range(sum(split.parts.values()))):
        raise split.broken[0].error()


def _check_all_arrived(plan: Plan, name: str, split: Found) -> None:
    """Holds what arrived against what the readers sent: a lost block would be rows lost in silence."""
    numbers: set[int] = set()
    for at, part in enumerate(plan.parts):
        if part.split == name:
            numbers |= set(range(part.first_block, part.first_block + split.parts.get(at, 0)))
    told = all(at in split.parts for at, part in enumerate(plan.parts) if part.split == name)
    if not told or numbers != split.arrived:
        raise DataError(f"{name}: of {len(numbers)} blocks of rows {len(numbers - split.arrived)} never came; run haste prepare again")


def _drop_repeated(plan: Plan, name: str, split: Found, repeated: dict[int, np.ndarray], stop: bool) -> None:
    """Writes shards again without the rows whose uid stands in an earlier shard."""
    for number, rows in repeated.items():
        page = read_page(plan.folder, name, number, plan.fingerprint, plan.suffix)
        if page is None:
            raise DataError(f"{plan.folder / split.tally.shards[number].file}: changed while prepare ran; run haste prepare again")
        batch = read_shard(plan.folder, page.shard)
        kept, problems = page.without(batch, rows)
        if stop:
            raise next(problem for problem in problems if problem not in page.problems).error()
        labels = batch["labels"].take(rows).flatten().to_numpy()
        page.problems = problems
        page = write_shard(plan.folder, page, kept)
        split.tally.replace(number, page.shard, shard_sums(kept), labels)
        split.first_problem[number] = problems[0]


def _problems(plan: Plan, found: dict[str, Found]) -> Iterator[Problem]:
    """Every bad row, in order, from the pages beside the shards."""
    for name, split in found.items():
        for number in sorted(split.first_problem):
            page = read_page(plan.folder, name, number, plan.fingerprint, plan.suffix)
            if page is None:
                raise DataError(f"{plan.folder / split.tally.shards[number].file}: changed while prepare ran; run haste prepare again")
            yield from page.problems
        yield from split.broken


def _check_splits(source: Source, plan: Plan, found: dict[str, Found], manifest: Manifest) -> None:
    """Writes the splits' sums into ``manifest``. Raises DataError where a split has no texts, or no labels."""
    for name, split in found.items():
        manifest.splits[name] = split.tally.split()
        if not (rows := manifest.splits[name].rows):
            count = sum(1 for _ in _problems(plan, {name: split}))
            bad = f" that can be used ({count} bad ones)" if count else ""
            raise DataError(f"{source.splits[name][0]}: no texts{bad}; put the {name} texts there")
        if not manifest.splits[name].positives:
            other = "" if name == "train" else ", or take the file away and set data.dev_fraction to evaluate on held-out training texts"
            raise DataError(f"{source.splits[name][-1]}: all {rows} texts have no label; add labels{other}")


def _finish(source: Source, plan: Plan, found: dict[str, Found], stop: bool, limit: int, work: Path, manifest: Manifest) -> None:
    """Label texts, filters, quarantine; then the manifest, last."""
    highest = max(split.tally.highest() for split in found.values())
    manifest.labels = highest + 1 if plan.labels is None else plan.labels
    frequency = found["train"].tally.counts(manifest.labels)
    in_test = found["test"].tally.counts(manifest.labels) if "test" in found else np.zeros_like(frequency)
    manifest.unseen_test_labels = int(np.count_nonzero((in_test > 0) & (frequency == 0)))
    manifest.unseen_test_positives = int(in_test[frequency == 0].sum())
    with tables.aside(work) as fresh:
        manifest.labels_without_text, problems = tables.write_label_texts(fresh, source, frequency)
        for name in source.filters:
            dropped = np.array(sorted(p.number for p in _problems(plan, {name: found[name]}) if p.number >= 0), np.int64)
            problems += tables.write_filter(fresh, source, name, manifest, dropped, limited=name == "train" and limit > 0)
            manifest.filters.append(name)
        if stop and problems:
            raise problems[0].error()
        manifest.quarantined = tables.write_quarantine(fresh, (p for some in (sorted(problems), _problems(plan, found)) for p in some))
        _clear(plan.folder, work, (MANIFEST, *TABLES, *ORDER_FILES, CHECKSUMS))  # not before: what the folder held stays good until then
        for file in fresh.iterdir():
            file.replace(work / file.name)
    write_manifest(work, manifest)
    publish(work, plan.folder, (*TABLES, MANIFEST))


def _label_texts(config: Config, folder: Location, work: Path, manifest: Manifest, rules: str) -> int:
    """Makes the split of label texts where it is asked for and not there, or takes it away; returns the number of rows written."""
    name, data = augmentation.SPLIT, config.data
    if not data.label_texts:
        if manifest.splits.pop(name, None):
            write_manifest(work, manifest)
            (work / augmentation.TWINS).unlink(missing_ok=True)
            publish(work, folder, (MANIFEST, augmentation.TWINS))
        return 0
    if name in manifest.splits and (work / augmentation.TWINS).is_file():
        return 0
    texts = augmentation.write_source(work)
    publish(work, folder, (augmentation.SOURCE,))
    parts = make_parts(name, "arrow", [folder / augmentation.SOURCE], data.rows_per_shard, 0)
    plan = Plan(tuple(parts), folder, manifest.labels, data.rows_per_shard, manifest.fingerprint)
    found, written = _convert(plan, rules, data.workers, False, work)
    manifest.splits[name] = found[name].tally.split()
    write_manifest(work, manifest)
    (work / augmentation.SOURCE).unlink()
    publish(work, folder, (MANIFEST, augmentation.SOURCE))
    _update(folder, work)
    twins = augmentation.write_twins(work, manifest)
    publish(work, folder, (augmentation.TWINS,))
    told = f"label texts: {texts - manifest.splits[name].rows:,} without a token; {twins:,} equal a test text and are never trained on"
    Console().print(told, highlight=False, soft_wrap=True)
    return written


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


def _print_summary(manifest: Manifest, folder: Location, written: int, seconds: float) -> None:
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
    if manifest.unseen_test_labels:
        seen = f"{manifest.unseen_test_labels:,} test labels ({manifest.unseen_test_positives:,} positives) never seen in training, kept"
        console.print(seen, highlight=False, soft_wrap=True)
    if manifest.quarantined:
        console.print(f"bad lines, left out and listed in {folder / tables.QUARANTINE}:", highlight=False, soft_wrap=True)
        table = Table()
        table.add_column("reason")
        table.add_column("lines", justify="right")
        for reason, count in manifest.quarantined.items():
            table.add_row(reason, f"{count:,}")
        console.print(table)


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
