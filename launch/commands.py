"""One function a ``haste`` command: reads the config, calls the library, prints what a person wants to know.

Each takes the parsed words and returns the exit status. Imports stand inside the functions: torch, Ray and transformers
take seconds, and ``haste config`` needs none of them.
"""

import json
from argparse import Namespace
from itertools import chain
from pathlib import Path

from haste_dist.config import Config, load_config
from haste_dist.errors import ConfigError, Interrupted
from haste_dist.page import describe

NO_CLUSTER = "launch.address="  # later words name one


def config(args: Namespace) -> int:
    print(describe(load_config(args.config, args.overrides)), end="")
    return 0


def prepare(args: Namespace) -> int:
    settings = load_config(args.config, [*args.overrides, *([f"data.on_error={args.on_error}"] if args.on_error else [])])
    from haste_dist.sources import find_source

    find_source(settings.data)  # a wrong folder fails here, before Ray starts
    from haste_dist.prepare import prepare as prepare_data
    from haste_launch.ray_session import ray_session

    try:
        with ray_session(settings, _import_for_prepare):
            prepare_data(settings)
    except KeyboardInterrupt:
        raise Interrupted(f"finished shards are kept in {settings.data.prepared}; the same command goes on from there") from None
    return 0


def _import_for_prepare() -> None:
    import pandas  # noqa: F401  # Ray Data's

    import haste_dist.encoder  # noqa: F401


def train(args: Namespace) -> int:
    settings = load_config(args.config, [*(["train.profile=8"] if args.profile else []), *args.overrides])
    from haste_launch.ray_train import train as train_ranks

    status = train_ranks(settings)
    if settings.train.profile:
        from haste_dist.profiling import FOLDER

        print(f"{Path(settings.run.folder) / FOLDER / 'summary.txt'}: where the steps went")
    return status


def evaluate(args: Namespace) -> int:
    settings = run_config(args.run, args.overrides)
    from haste_dist.evaluate import print_metrics
    from haste_dist.predict import check_output
    from haste_launch.ray_train import evaluate as evaluate_ranks

    if args.predictions:
        if not args.predictions.endswith(".parquet"):
            raise ConfigError(f"{args.predictions}: an evaluation's predictions are written as .parquet")
        check_output(args.predictions)
    scored: str = args.predictions or str(Path(args.run) / ".scored.parquet")
    status = evaluate_ranks(settings, args.checkpoint, scored if args.predictions or args.calibrate else None)
    file = Path(args.run) / f"evaluate-{settings.evaluate.split}.json"
    page = json.loads(file.read_text(encoding="utf-8"))
    print_metrics(page["metrics"], page["most_frequent_labels"])
    print(file)
    if args.calibrate:
        from haste_dist.calibration import FILE, calibrate

        fitted = calibrate(args.run, page["checkpoint"], settings.evaluate.split, scored)
        if not args.predictions:
            Path(scored).unlink()
        print(f"{Path(args.run) / FILE}: scores are sigmoid({fitted['scale']:.3f} logit {fitted['offset']:+.3f})")
        before, after = (100 * fitted[f"ece_{name}"] for name in ("before", "after"))
        print(f"calibration error on texts not fitted: {before:.2f}% before, {after:.2f}% after")
    return status


def predict(args: Namespace) -> int:
    settings = run_config(args.run, args.overrides)
    if args.input and args.output and (Path(args.input).is_dir() or Path(args.output).suffix not in (".jsonl", ".parquet")):
        from haste_launch.predict import predict_into

        return predict_into(settings, args.checkpoint, args.input, args.output, args.k)
    _refuse_folder_words(args.overrides)
    from haste_dist.predict import Input, check_output, predict_all, print_predictions, read_inputs, write_predictions

    if args.output:
        check_output(args.output, args.input)
    if args.text and not all(text.strip() for text in args.text):
        raise ConfigError("--text: a text is empty; give it some words")
    batches = read_inputs(args.input) if args.input else iter([[Input(text) for text in args.text]])
    first = next(batches)  # a bad file fails before the model loads
    from haste_dist.predictor import Predictor

    predictor = Predictor(args.run, args.checkpoint, settings.launch.device)
    files = predictor.files
    calibration = files.calibration if settings.predict.calibrated else None
    predictions = predict_all(predictor.topk, chain([first], batches), files.names, args.k, calibration)
    if args.output:
        print(f"{args.output}: {write_predictions(predictions, args.output):,} texts")
    else:
        print_predictions(predictions)
    return 0


def _refuse_folder_words(words: list[str]) -> None:
    """Raises ConfigError for a word that the screen and a file would pass over: of these settings they know predict.calibrated alone."""
    for word in words:
        if word.startswith("predict.") and not word.startswith("predict.calibrated="):
            raise ConfigError(f"{word}: is for output into a folder; leave it out, or give --input and --output FOLDER/")


def serve(args: Namespace) -> int:
    settings = run_config(args.run, args.overrides)
    from haste_launch.serve import serve_run

    return serve_run(settings, args.checkpoint)


def export(args: Namespace) -> int:
    run_config(args.run, [])
    from haste_dist.export import export as export_run

    print(export_run(args.run, args.out, args.checkpoint, args.format))
    return 0


def verify(args: Namespace) -> int:
    from haste_dist.verify import verify as verify_folder

    print(f"{args.folder}: {len(verify_folder(args.folder)):,} files and folders looked at, all as they were written")
    return 0


def plot(args: Namespace) -> int:
    run_config(args.run, [])  # a wrong folder fails here, before matplotlib loads
    from haste_dist.plot import plot_run

    print(plot_run(args.run))
    return 0


def inspect(args: Namespace) -> int:
    from haste_dist.inspection import inspect as write_page

    text, *files = write_page(args.kind, args.folder)
    print(text)
    print(*files, sep="\n")
    return 0


def labels(args: Namespace) -> int:
    run = Path(args.run)
    run_config(args.run, [])
    settings = load_config(run / "config.yaml", [NO_CLUSTER, *args.overrides, f"run.folder={args.new}"])
    from haste_dist.extension import add_labels, check_words
    from haste_dist.sources import find_source
    from haste_launch.ray_session import ray_session

    check_words(settings, run)
    find_source(settings.data)
    with ray_session(settings):
        added = add_labels(settings, run, args.checkpoint, args.neighbours)
    print(f"{args.new}: {added:,} labels added; haste train goes on: haste train {Path(args.new) / 'config.yaml'}")
    return 0


def average(args: Namespace) -> int:
    from haste_dist.averaging import average_runs

    average_runs(args.new, args.runs, args.checkpoint, args.dtype)
    print(f"{args.new}: the mean of {len(args.runs)} checkpoints; haste evaluate {args.new} scores it")
    return 0


def datasets(args: Namespace) -> int:
    from haste_dist.datasets import build_dataset

    stats = build_dataset(args.name, args.out, args.source)
    source = f", from {stats['source']}" if "source" in stats else ""
    print(f"{args.out}: {stats['train_texts']:,} texts to train on, {stats['test_texts']:,} to test, {stats['labels']:,} labels{source}")
    return 0


def plan(args: Namespace) -> int:
    settings = load_config(args.config, args.overrides)
    from haste_launch.plan import Words
    from haste_launch.plan import plan as print_plan

    names = ("gpus", "gpu", "memory", "labels", "texts", "most_labels", "model")
    return print_plan(settings, Words(**{name: getattr(args, name) for name in names}))


def scale(args: Namespace) -> int:
    from haste_launch.scale_settings import read_words

    words = read_words(args)  # wrong words fail here, before torch loads
    settings = load_config(args.config, args.overrides)
    from haste_launch.scale import scale as scale_ranks

    return scale_ranks(settings, words)


def study(args: Namespace) -> int:
    from haste_launch import study as studies

    if args.report:
        return studies.report(args.page, Path(args.out), args.overrides, not args.no_plot, args.records)
    return studies.study(args.page, Path(args.out), args.overrides, args.side_by_side, not args.no_plot, args.records)


def doctor(args: Namespace) -> int:
    named = args.config is not None and "=" not in args.config  # haste doctor launch.address=...
    words = args.overrides if named or args.config is None else [args.config, *args.overrides]
    settings = load_config(args.config if named else None, words)
    from haste_launch.doctor import doctor as look

    return look(settings)


def submit(args: Namespace) -> int:
    from haste_launch.submit import submit as submit_job

    return submit_job(args)


def jobs(args: Namespace) -> int:
    from haste_launch.jobs import list_jobs

    return list_jobs(args.address, args.ca)


def logs(args: Namespace) -> int:
    from haste_launch.follow import show_logs

    return show_logs(args.job, args.follow, args.on_interrupt, args.address, args.ca)


def sweep(args: Namespace) -> int:
    from haste_launch.sweep import sweep as run_trials

    return run_trials(args)


def stop(args: Namespace) -> int:
    from haste_launch.jobs import stop_job

    return stop_job(args.job, args.address, args.ca)


def bench(args: Namespace) -> int:
    if args.action == "checkpoint":
        from haste_launch.checkpoint_bench import bench_checkpoint

        return bench_checkpoint(args)
    if args.action == "grouping":
        from haste_launch.bench_grouping import bench_grouping

        return bench_grouping(args)
    from haste_launch.bench_settings import read_words

    words = read_words(args)  # wrong words fail here, before torch loads
    from haste_launch.bench import bench_kernels

    return bench_kernels(words)


def run_config(run: str, overrides: list[str]) -> Config:
    """The config that a run was trained with, ``overrides`` on top. ``run.folder`` is where the run lies now, and the cluster that it was
    trained on, which may have ended with its job, is none to join unless ``overrides`` name it.

    Raises ConfigError if ``run`` is no run folder.
    """
    file = Path(run) / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"{run}: no run folder (it has no config.yaml); haste train makes one")
    settings = load_config(file, [NO_CLUSTER, *overrides])
    settings.run.folder = str(run)
    return settings
