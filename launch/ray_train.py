"""Starts the ranks with Ray Train, watches their metrics, and passes Ctrl-C on as a wish to stop.

The ranks run ``haste_dist.train`` or ``haste_dist.scoring`` and know nothing of Ray. The driver and the ranks share the run
folder: ranks write metrics there, the driver a file that asks them to stop.
"""

import contextlib
import dataclasses
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haste_dist.config import Config, check
from haste_dist.errors import ConfigError, Interrupted
from haste_dist.manifest import read_manifest, writable_folder
from haste_dist.mirror import local_copy
from haste_dist.sharding import label_parts
from haste_dist.storage import whole_address
from haste_launch.attempts import until_done, user_error
from haste_launch.progress import Progress
from haste_launch.ray_session import ray_session

if TYPE_CHECKING:
    from haste_dist.model import Prepared
    from haste_dist.world import World

STOP_FILE = ".stop"
RAY_FOLDER, RAY_MARKER = ".ray", ".validate_storage_marker"  # what Ray Train leaves in the run folder
POLL_SECONDS = 0.25
ECHO_SECONDS = 1.0  # a signal may come twice at once: to the process, and to its group


def train(config: Config) -> int:
    """Trains on all ranks; returns the exit status. Raises Interrupted after a stop by Ctrl-C, and HasteError."""
    config = absolute_paths(config)
    _check_folder(config)
    with ray_session(config, _import_for_train):
        from haste_dist.preflight import check_run, restore

        restore(config)
        prepared = check_run(config)
        check_memory(config, prepared)
        asked_by = run_ranks(config, "train", {})
    if asked_by == signal.SIGINT:
        raise Interrupted(f"training stopped, everything is saved in {config.run.folder}; the same command goes on from there")
    return 0


def _import_for_train() -> None:
    import pandas  # noqa: F401  # Ray Train's

    import haste_dist.train  # noqa: F401


def _check_folder(config: Config) -> None:
    """What can be told at once, without torch or Ray: that there is no prepared folder. Raises HasteError."""
    if not config.data.prepared or whole_address(config.data.prepared).is_local:
        read_manifest(local_copy(config.data.prepared))


def check_memory(config: Config, prepared: "Prepared") -> None:
    """Refuses ranks that ``launch.label_parallel`` does not divide, and a run that would fill its GPUs, where this machine has such GPUs to
    ask. Raises ConfigError."""
    import ray
    import torch

    from haste_dist.fits import check_fits, facts_of

    ranks, on_gpu = count_ranks(config, ray.cluster_resources())
    label_parts(config.launch.label_parallel, ranks)
    if config.launch.check_memory and on_gpu and torch.cuda.is_available():
        gib = torch.cuda.get_device_properties(0).total_memory / 2**30
        check_fits(config, facts_of(prepared.manifest, ranks, "cuda"), gib, torch.cuda.get_device_name(0))


def evaluate(config: Config, checkpoint: str, predictions: str | None = None) -> int:
    """Scores a checkpoint on all ranks, which write evaluate-<split>.json; returns the exit status.

    ``predictions``: a Parquet file to write with the ranked labels of every text; then one rank does it all.
    """
    config = absolute_paths(config)
    if predictions is not None:
        config = dataclasses.replace(config, launch=dataclasses.replace(config.launch, ranks=1))
        predictions = os.path.abspath(predictions)
    result = f"evaluate-{config.evaluate.split}.json"
    writable_folder(Path(config.run.folder), f"{result} is written there: check its permissions or evaluate a copy")
    with ray_session(config):
        asked_by = run_ranks(config, "evaluate", {"checkpoint": checkpoint, "predictions": predictions})
    if asked_by == signal.SIGINT:
        raise Interrupted("evaluation stopped")
    return 0


def run_ranks(config: Config, task: str, arguments: dict[str, Any]) -> int:
    """Runs ``task`` on every rank of the connected cluster, and returns the signal that asked it to stop (0: none).

    Training starts again after a failure (see attempts.py). Raises the HasteError of a rank, or Ray's error with the rank's
    traceback where it is no user's mistake.
    """
    import ray

    ranks, on_gpu = count_ranks(config, ray.cluster_resources())
    run = Path(config.run.folder)
    writable_folder(run, "choose another run.folder")
    stop = run / STOP_FILE
    stop.unlink(missing_ok=True)
    with stop_signals(stop) as asked, Progress(run, task) as progress:

        def start(count: int) -> BaseException | None:
            return fit(config, count, on_gpu, {"task": task, **arguments}, progress.update)

        def pause(seconds: float) -> bool:
            progress.update()
            time.sleep(seconds)
            return bool(asked)

        def available() -> int:
            return room_for(config, ranks, on_gpu, ray.cluster_resources())

        try:
            if task == "train":
                until_done(config, ranks, start, available, pause)
            elif (error := start(ranks)) is not None:
                raise user_error(error) or error
        finally:
            stop.unlink(missing_ok=True)
            (run / RAY_FOLDER / RAY_MARKER).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # not there, or not empty
                (run / RAY_FOLDER).rmdir()
    return asked[0] if asked else 0


def fit(config: Config, ranks: int, on_gpu: bool, payload: dict[str, Any], tick: Callable[[], None]) -> BaseException | None:
    """Runs ``rank_main`` on ``ranks`` ranks, calls ``tick`` while they run, and returns the error that ended them, if one did."""
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    cpus, nodes = ray.cluster_resources().get("CPU", 1), max(1, sum(node["Alive"] for node in ray.nodes()))
    threads = config.launch.threads or max(1, int(cpus / nodes) // max(1, ranks // nodes))
    logging.getLogger("ray.train").setLevel(logging.ERROR)
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(config.launch.timeout)  # a hung rank answers Ray no more than its peers
    os.environ.setdefault("TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S", "10")  # nor when it is asked to leave its groups, before it is killed
    trainer = TorchTrainer(
        rank_main,
        train_loop_config={"config": dataclasses.asdict(config), "threads": threads, "on_gpu": on_gpu, **payload},
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo", timeout_s=config.launch.timeout),
        scaling_config=ScalingConfig(
            num_workers=ranks, use_gpu=on_gpu, resources_per_worker={"GPU": 1} if on_gpu else {"CPU": min(1.0, cpus / ranks)}
        ),
        run_config=RunConfig(
            name=RAY_FOLDER,
            storage_path=config.run.folder,
            failure_config=FailureConfig(max_failures=0, controller_failure_limit=0, max_preemption_failures=0),  # type: ignore[call-arg]
        ),
    )
    outcome: list[BaseException] = []

    def run() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # handed to the main thread
            outcome.append(error)

    # In a thread of its own Ray leaves the signals of the main thread to us.
    thread = threading.Thread(target=run, name="ranks", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(POLL_SECONDS)
        tick()
    return outcome[0] if outcome else None


def rank_main(payload: dict[str, Any]) -> None:
    """What each rank runs; Ray has set up the process group."""
    import ray.train.torch
    import torch

    from haste_dist.imports import no_collection
    from haste_dist.world import join_world

    torch.set_num_threads(payload["threads"])
    config = config_from_dict(payload["config"])
    world = join_world(ray.train.torch.get_device() if payload["on_gpu"] else torch.device("cpu"), config.launch.timeout)
    if payload["task"] == "scale":
        measure_rank(config, world, payload, stop_reader(Path(config.run.folder) / STOP_FILE))
    elif payload["task"] == "train":
        with no_collection():
            from haste_dist.train import train as train_rank

        train_rank(config, world, stop_reader(Path(config.run.folder) / STOP_FILE))
    else:
        from haste_dist.predict import scored_file
        from haste_dist.scoring import evaluate_run

        with scored_file(payload["predictions"]) if payload["predictions"] else contextlib.nullcontext() as keep:
            evaluate_run(config, world, payload["checkpoint"], keep)


def measure_rank(config: Config, world: "World", task: dict[str, Any], wants_stop: Callable[[], bool]) -> None:
    """A rank of ``haste scale``; ``task`` holds what ``haste_launch.scale.task_arguments`` made."""
    from haste_dist.measure import Effort, measure_points
    from haste_dist.study import Point
    from haste_dist.synthetic import LabelLaw

    points = [Point(**point) for point in task["points"]]
    records = Path(task["records"]) if task["records"] else None
    measure_points(config, world, points, LabelLaw(**task["law"]), Path(config.run.folder), Effort(**task["effort"]), records, wants_stop)


def count_ranks(config: Config, resources: dict[str, float]) -> tuple[int, bool]:
    """(ranks, whether each has a GPU) for a cluster with ``resources``. Raises ConfigError if it cannot hold them."""
    gpus = int(resources.get("GPU", 0))
    on_gpu = config.launch.device == "cuda" or (config.launch.device == "auto" and gpus > 0)
    if on_gpu and not gpus:
        raise ConfigError("launch.device=cuda: the Ray cluster has no GPU; set launch.device=cpu or join another cluster")
    ranks = config.launch.ranks or (gpus if on_gpu else 1)
    if on_gpu and ranks > gpus:
        raise ConfigError(f"launch.ranks={ranks}: the Ray cluster has {gpus} GPUs, one is needed a rank")
    return ranks, on_gpu


def room_for(config: Config, wanted: int, on_gpu: bool, resources: dict[str, float]) -> int:
    """How many ranks a cluster with ``resources`` can hold now. Ranks may share a CPU, unless fewer of them are allowed."""
    if on_gpu:
        return int(resources.get("GPU", 0))
    return int(resources.get("CPU", 0)) if config.launch.elastic else wanted


def stop_reader(path: Path) -> Callable[[], bool]:
    """A cheap question for every step: has somebody asked to stop? Looks at the file at most every quarter of a second."""
    seen, looked = False, 0.0

    def wants_stop() -> bool:
        nonlocal seen, looked
        if not seen and time.monotonic() - looked > POLL_SECONDS:
            looked = time.monotonic()
            seen = path.exists()
        return seen

    return wants_stop


@contextlib.contextmanager
def stop_signals(stop: Path) -> Iterator[list[int]]:
    """While it lasts, the first SIGINT or SIGTERM makes the file ``stop``, a later one interrupts. Yields those received."""
    received: list[int] = []
    first = 0.0

    def handle(number: int, _frame: object) -> None:
        nonlocal first
        if not received:
            first = time.monotonic()
            received.append(number)
            stop.touch()
            print("haste: stopping as soon as all is saved; once more stops at once", file=sys.stderr, flush=True)
        elif time.monotonic() - first > ECHO_SECONDS:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def config_from_dict(page: dict[str, Any]) -> Config:
    """The inverse of ``dataclasses.asdict`` on a Config."""
    parts = {f.name: f.type(**page[f.name]) for f in dataclasses.fields(Config)}  # type: ignore[operator]
    config = Config(**parts)
    check(config)
    return config


def absolute_paths(config: Config) -> Config:
    """Folders and local model paths as absolute ones, since ranks may start elsewhere."""
    config = dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, folder=os.path.abspath(config.run.folder)),
        data=dataclasses.replace(config.data, prepared=str(whole_address(config.data.prepared)) if config.data.prepared else ""),
        checkpoint=dataclasses.replace(
            config.checkpoint, store=str(whole_address(config.checkpoint.store)) if config.checkpoint.store else ""
        ),
    )
    encoder = {
        name: os.path.abspath(getattr(config.encoder, name))
        for name in ("name", "tokenizer")
        if os.path.isdir(getattr(config.encoder, name))
    }
    return dataclasses.replace(config, encoder=dataclasses.replace(config.encoder, **encoder))
