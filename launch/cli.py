"""The ``haste`` command: words in, one function of ``haste_launch.commands`` out, and one place that reports errors.

Exit status: 0 done; 2 an error that the user can mend, told in one line; 130 stopped by the user; 141 the reader of the
output went away. Anything else is a bug and keeps its traceback. Only argparse is imported here, so ``haste --help``
answers at once; what a command needs is imported when it runs.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from haste_dist import __version__
from haste_dist.errors import HasteError, Interrupted
from haste_launch.job_words import add_job_commands
from haste_launch.signals import heed_sigterm
from haste_launch.sweep_space import add_sweep_command

USAGE_ERROR, INTERRUPTED, BROKEN_PIPE = 2, 130, 141
OVERRIDES = "settings that replace the file's, such as train.epochs=3 (haste config lists all)"
CONFIG = "a YAML file, or the name of a shipped one (demo, wordnet, ...)"
RUN = "the run folder that haste train wrote"
CHECKPOINT = "best (default), last, or a name such as step-00001200"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status. ``argv`` defaults to the words on the command line."""
    before = heed_sigterm(signal.default_int_handler)  # as Ctrl-C, from the first import on
    try:
        status = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()  # a reader that has left is noticed here, not at interpreter exit
        return status
    except Interrupted as error:
        return _fail(f"haste: interrupted: {error}", INTERRUPTED)
    except KeyboardInterrupt:
        return _fail("haste: interrupted", INTERRUPTED)
    except HasteError as error:
        return _fail(f"haste: error: {error}", USAGE_ERROR)
    except BrokenPipeError:
        # Python flushes stdout once more when it exits; give it somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    finally:
        heed_sigterm(before)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; each command's namespace carries the name of its function in ``commands``."""
    parser = argparse.ArgumentParser(prog="haste", description="Extreme multi-label text classification, distributed.")
    parser.add_argument("--version", action="version", version=f"haste {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    for name, summary in (
        ("prepare", "read texts and labels, tokenise them, group the labels, write Arrow shards"),
        ("train", "train on the prepared data; a run that was stopped goes on where it was"),
        ("config", "print every setting with its value, meaning and range"),
    ):
        command = commands.add_parser(name, help=summary, description=_sentence(summary))
        command.add_argument("config", metavar="CONFIG", help=CONFIG)
        command.add_argument("overrides", metavar="a.b=c", nargs="*", help=OVERRIDES)
        if name == "prepare":
            command.add_argument("--on-error", choices=("stop", "quarantine"), help="short for data.on_error=...")
        if name == "train":
            command.add_argument("--profile", action="store_true", help="trace a few steps and say where they went (train.profile=8)")

    evaluate = commands.add_parser("evaluate", help="score a trained run", description="Score a trained run and print its metrics.")
    _add_run(evaluate)
    evaluate.add_argument("--predictions", metavar="FILE", help="also write ranked and true labels of every text as .parquet")
    evaluate.add_argument("--calibrate", action="store_true", help="also fit how scores become probabilities, for all later predictions")

    predict = commands.add_parser("predict", help="rank labels for new texts", description="Rank labels for new texts with a trained run.")
    _add_run(predict)
    texts = predict.add_mutually_exclusive_group(required=True)
    texts.add_argument("--text", action="append", metavar="TEXT", help="a text; may be given more than once")
    texts.add_argument(
        "--input", metavar="FILE", help="texts to read: .txt (one a line), .jsonl, .parquet or .arrow; or a folder of such files"
    )
    predict.add_argument(
        "--output", metavar="FILE", help="write .jsonl or .parquet instead of printing; or a folder, in parts, on all GPUs"
    )
    predict.add_argument("-k", type=_positive, default=5, metavar="K", help="labels a text (default 5)")

    serve = commands.add_parser(
        "serve",
        help="answer over HTTP",
        description="Answer POST /predict with a trained run, and offer a page to try it, until Ctrl-C. Settings: serve.port=8000 ...",
    )
    _add_run(serve)

    export = commands.add_parser(
        "export",
        help="a run as one portable folder",
        description="Write a trained run as one folder that needs neither the run nor its data.",
    )
    export.add_argument("run", metavar="RUN", help=RUN)
    export.add_argument("out", metavar="OUT", help="folder to write; must not exist yet")
    export.add_argument("--checkpoint", default="best", metavar="NAME", help=CHECKPOINT)
    export.add_argument(
        "--format",
        default="sparse",
        choices=("sparse", "dense", "onnx"),
        help="also the output layer as a dense matrix, or the whole model as ONNX, for few labels (default sparse: neither)",
    )

    verify = commands.add_parser(
        "verify",
        help="check a folder's files",
        description="Check every checksum, shape and range of a run, of prepared data or a checkpoint.",
    )
    verify.add_argument("folder", metavar="RUN|DATA", help="a run folder, a prepared folder, or one checkpoint")

    plot = commands.add_parser("plot", help="draw a run's curves", description="Draw loss, metrics, churn and step time as a PNG.")
    plot.add_argument("run", metavar="RUN", help=RUN)

    inspect = commands.add_parser(
        "inspect", help="a page about texts, labels or groups", description="Write a page about texts, labels or groups, with a plot."
    )
    inspect.add_argument("kind", metavar="WHAT", choices=("data", "labels", "groups"), help="data, labels or groups")
    inspect.add_argument("folder", metavar="FOLDER", help="the folder that haste prepare wrote (for groups, a run folder will do)")

    labels = commands.add_parser("labels", help="add labels to a trained run", description="Change the labels of a trained run.")
    actions = labels.add_subparsers(dest="action", metavar="ACTION", required=True)
    add = actions.add_parser(
        "add",
        help="a new run that knows new labels too",
        description="Prepare grown data (data.source, data.prepared), whose label file begins with the labels of RUN, and write NEW: the "
        "run with the new labels behind the old, each the mean of its nearest ones. haste train goes on from there. RUN stays as it is.",
    )
    add.add_argument("run", metavar="RUN", help=RUN)
    add.add_argument("new", metavar="NEW", help="run folder to write")
    add.add_argument("overrides", metavar="a.b=c", nargs="*", help=OVERRIDES)
    add.add_argument("--checkpoint", default="best", metavar="NAME", help=CHECKPOINT)
    add.add_argument("--neighbours", type=_positive, default=4, metavar="K", help="labels whose mean a new one starts from (default 4)")

    average = commands.add_parser(
        "average",
        help="one model from several runs",
        description="Write NEW, a run whose weights are the mean of those of runs that differ in their seed: as large as one, and "
        "mostly better. The runs stay as they are.",
    )
    average.add_argument("new", metavar="NEW", help="run folder to write")
    average.add_argument("runs", metavar="RUN", nargs="+", help="two run folders or more that haste train wrote, or checkpoints in them")
    average.add_argument("--checkpoint", default="best", metavar="NAME", help=CHECKPOINT)
    average.add_argument(
        "--dtype",
        default="",
        choices=("float32", "bfloat16", "float8"),
        help="what weights of labels are kept in (default: as in the first run)",
    )

    datasets = commands.add_parser("datasets", help="build a public data set", description="Build a public data set from a package.")
    actions = datasets.add_subparsers(dest="action", metavar="ACTION", required=True)
    build = actions.add_parser("build", help="write a data set in the XMC layout", description="Write a data set in the XMC layout.")
    build.add_argument("name", metavar="NAME", help="icd10, wordnet or debian")
    build.add_argument("--out", required=True, metavar="DIR", help="folder to write")
    build.add_argument(
        "--source", metavar="PATH", help="where the raw material lies, if it is not found by itself (debian: or a mirror's address)"
    )

    plan = commands.add_parser(
        "plan",
        help="what each GPU will hold, and how long a step and an epoch will take",
        description="What each GPU will hold, and how long a step and an epoch will take, before anything starts. Refuses a run that does "
        "not fit, with the nearest settings that do.",
    )
    plan.add_argument("config", metavar="CONFIG", help=CONFIG)
    plan.add_argument("overrides", metavar="a.b=c", nargs="*", help=OVERRIDES)
    plan.add_argument("--gpus", type=_positive, default=0, metavar="W", help="how many (default launch.ranks, else those of this machine)")
    plan.add_argument("--gpu", default="", metavar="NAME", help="h100, h200, a100, a100-40 or as torch names it (default this machine's)")
    plan.add_argument("--memory", type=float, default=0.0, metavar="GIB", help="of a GPU, where its name does not tell")
    plan.add_argument("--labels", default="", metavar="L", help="instead of the prepared data's")
    plan.add_argument("--texts", default="", metavar="T", help="to train on, for the time of an epoch; instead of the prepared data's")
    plan.add_argument("--most-labels", type=_positive, default=20, metavar="M", help="of one text, without prepared data (default 20)")
    plan.add_argument("--model", default="", metavar="FILE", help="a cost model (default: the one that haste scale kept for the device)")

    add_job_commands(commands, CONFIG, OVERRIDES)
    add_sweep_command(commands, CONFIG, OVERRIDES)

    scale = commands.add_parser(
        "scale",
        help="measure the training step on more and more ranks and labels",
        description="A scaling study on made-up texts: the real training step at every point, a row each in OUT/study.parquet, a plot, and "
        "a cost model that predicts other sizes. Finished points are kept; the same command goes on. Numbers may be lists and read 10k, "
        "2.5M or 1B: --ranks 1,2,4 --labels 1M,1B.",
    )
    scale.add_argument("config", metavar="CONFIG", help=CONFIG)
    scale.add_argument("overrides", metavar="a.b=c", nargs="*", help=OVERRIDES)
    _add_scale(scale)

    study = commands.add_parser(
        "study",
        help="train named cases of settings from several seeds and compare them",
        description="Train the cases of a study page from several seeds, side by side, and compare them: OUT/report.md with intervals, "
        "plots, OUT/results.parquet. Finished runs are kept; the same command goes on.",
    )
    study.add_argument("page", metavar="STUDY.yaml", help="config, settings, seeds, split and cases (haste_dist/trials.py says how)")
    study.add_argument("overrides", metavar="a.b=c", nargs="*", help="settings of every case, over those of the page")
    study.add_argument("--out", default="runs/study", metavar="DIR", help="folder of the study (default runs/study)")
    study.add_argument("--side-by-side", type=_positive, default=1, metavar="COUNT", help="runs at once on each GPU (default 1)")
    study.add_argument("--report", action="store_true", help="write the report of the runs that are finished, and run nothing")
    study.add_argument("--records", default="", metavar="DIR", help="folder that a line a finished run is appended to (default none)")
    study.add_argument("--no-plot", action="store_true", help="draw nothing")

    bench = commands.add_parser("bench", help="measure the kernels", description="Measure this project beside its baselines and the floor.")
    actions = bench.add_subparsers(dest="action", metavar="WHAT", required=True)
    kernels = actions.add_parser(
        "kernels",
        help="the output layer's operations",
        description="Check each operation against its definition, then time it. Numbers may be lists: --group 16,32,64. "
        "Without words: the README's shapes on a GPU, a small shape on a CPU.",
    )
    _add_bench(kernels)
    saving = actions.add_parser(
        "checkpoint",
        help="saving and loading many labels",
        description="Measure how long a checkpoint stops the steps, its writing, its loading and its bytes.",
    )
    saving.add_argument("--labels", type=_positive, default=1_000_000, metavar="L", help="labels (default 1000000)")
    saving.add_argument("--fan-in", type=_positive, default=64, metavar="F", help="features that a group of labels reads (default 64)")
    saving.add_argument("--group", type=_positive, default=32, metavar="G", help="labels that read the same features (default 32)")
    saving.add_argument(
        "--out", default=".", metavar="DIR", help="folder on the disk to measure (default here); what is written is removed"
    )
    saving.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="where the labels are (default auto)")
    saving.add_argument("--records", metavar="DIR", default="none", help="folder that the figures are appended to (default none)")
    grouping = actions.add_parser(
        "grouping",
        help="labels into groups",
        description="Time and memory of putting labels into groups, and how close the groups are, on vectors that are made up or given.",
    )
    grouping.add_argument("--labels", type=_positive, metavar="L", default=100_000, help="labels (default 100000)")
    grouping.add_argument("--width", type=_positive, metavar="D", default=768, help="features of a label's vector (default 768)")
    grouping.add_argument("--group", type=_positive, metavar="G", default=32, help="labels of a group (default 32)")
    grouping.add_argument("--search", type=_positive, metavar="N", default=2**20, help="as the setting groups.search (default 2^20)")
    grouping.add_argument("--vectors", metavar="FILE", default="", help="real vectors: .npy, a row of length 1 a label")
    grouping.add_argument("--records", metavar="DIR", default="", help="as in haste bench kernels")
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Reads the words, letting settings stand before, between and after options. Exits with status 2 on bad usage."""
    parser = build_parser()
    # argparse gives all of a.b=c to the first place it fits, so those behind an option come back as unknown.
    args, rest = parser.parse_known_args(argv)
    settings = [word for word in rest if "=" in word and not word.startswith("-")]
    if len(settings) != len(rest) or (rest and not hasattr(args, "overrides")):
        unknown = [word for word in rest if word not in settings] or rest
        parser.error(f"unknown argument: {' '.join(unknown)} (haste {args.command} --help lists what there is)")
    if rest:
        args.overrides = [*args.overrides, *settings]
    return args


def _run(argv: list[str]) -> int:
    args = parse(argv)
    from haste_launch import commands

    return getattr(commands, args.command)(args)


def _add_run(command: argparse.ArgumentParser) -> None:
    command.add_argument("run", metavar="RUN", help=RUN)
    command.add_argument("overrides", metavar="a.b=c", nargs="*", help=OVERRIDES)
    command.add_argument("--checkpoint", default="best", metavar="NAME", help=CHECKPOINT)


def _add_bench(command: argparse.ArgumentParser) -> None:
    """Words stay words here: haste_launch.bench_settings reads and checks them."""
    for flag, metavar, summary in (
        ("--what", "NAMES", "of tail, head, topk, layer, linear (default all)"),
        ("--labels", "L", "labels; the head alone has a tenth of them"),
        ("--batch", "N", "texts a step"),
        ("--width", "D", "features of the embedding"),
        ("--fan-in", "F", "features that a group of labels reads"),
        ("--group", "G", "labels that read the same features: 16, 32, 64 or 128"),
        ("-k", "K", "labels that top-k returns"),
        ("--providers", "NAMES", "of haste_dist, haste_authors, per_label_ffi, dense, dense_width_f, floor (default all)"),
        ("--plot", "FILE", "draw time and memory against L, N, F and G as .png; sweeps these if no sweep or list is given"),
        ("--records", "DIR", "folder that figures are appended to, or none (default benchmarks/records on a GPU, none on a CPU)"),
        ("--dtype", "TYPE", "of weights and embedding: bfloat16 (default on a GPU), float32, or float8 (of the weights alone)"),
        ("--momentum", "TYPE", "bfloat16, float32, float8 or none (default as --dtype; bfloat16 beside float8)"),
        ("--seconds", "S", "each measurement takes (default 0.5 on a GPU, 0.1 on a CPU)"),
    ):
        names = ["-k", "--k"] if flag == "-k" else [flag]
        command.add_argument(*names, metavar=metavar, default="", help=summary)
    command.add_argument("--sweep", action="append", default=[], metavar="NAME=V,V", help="vary one number alone; may be given again")
    command.add_argument("--no-bias", action="store_true", help="labels without biases")
    command.add_argument("--quick", action="store_true", help="one small shape, short measurements")
    command.add_argument("--tune", action="store_true", help="first measure every tile of this project's kernels here and keep the fastest")


def _add_scale(command: argparse.ArgumentParser) -> None:
    """Words stay words here: haste_launch.scale_settings reads and checks them."""
    for flag, metavar, default, summary in (
        ("--labels", "L", "", "labels, the same at every number of ranks: strong scaling (default 1M,10M,40M; 20k,80k on a CPU)"),
        ("--labels-a-rank", "L", "", "labels that grow with the ranks: weak scaling (default 10M; 40k on a CPU)"),
        ("--ranks", "W", "", "ranks (default powers of two up to all GPUs, or 4 cores)"),
        ("--batch", "N", "", "texts a step over all ranks (default train.batch_size; on a CPU 4 at most)"),
        ("--fan-in", "F", "", "default output.fan_in"),
        ("--group", "G", "", "default output.group_size"),
        ("--exponent", "E", "1.0", "of Zipf-Mandelbrot's law, by which labels are drawn (default 1.0)"),
        ("--shift", "Q", "10", "of that law (default 10)"),
        ("--positives", "P", "5", "labels a text, on average (default 5)"),
        ("--out", "DIR", "runs/scale", "folder of the study (default runs/scale)"),
        (
            "--records",
            "DIR",
            "",
            "folder that figures are appended to, or none (default benchmarks/records on a GPU, none on a CPU)",
        ),
        ("--between-hosts", "GB/S", "50", "bandwidth of a GPU's network card, for predictions (default 50)"),
    ):
        command.add_argument(flag, metavar=metavar, default=default, help=summary)
    command.add_argument("--gpus-a-host", type=_positive, default=8, metavar="COUNT", help="for predictions (default 8)")
    command.add_argument("--sweep", action="append", default=[], metavar="NAME=V,V", help="vary one number alone; may be given again")
    command.add_argument("--warmup", type=_positive, metavar="STEPS", help="steps that are not timed (default 5; 1 on a CPU)")
    command.add_argument("--steps", type=_positive, metavar="STEPS", help="steps that are timed (default 20; 3 on a CPU)")
    command.add_argument("--no-plot", action="store_true", help="draw nothing")


def _positive(word: str) -> int:
    number = int(word)  # argparse turns a ValueError into its usage message
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def _sentence(summary: str) -> str:
    return f"{summary[0].upper()}{summary[1:]}."


def _fail(line: str, status: int) -> int:
    print(" ".join(line.split()), file=sys.stderr, flush=True)  # one line, whatever a message held
    return status


if __name__ == "__main__":
    sys.exit(main())
