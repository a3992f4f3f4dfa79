"""``haste submit``: this code and one config as a job of a Ray cluster.

The cluster brings the environment (torch, DeepSpeed, Ray of the same version); the job brings the four packages as they are here, as
``py_modules``, so that nobody installs anything on the nodes. They go as folders: a wheel would be installed there by ``pip --target``,
which takes no installed package for granted and so fetches torch anew on every node.
"""

import os
import re
import shlex
import shutil
import tempfile
import time
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haste_dist.config import Config, load_config, save_config
from haste_dist.errors import ConfigError, HasteError
from haste_launch.follow import follow
from haste_launch.jobs import FOLDER, RUN, jobs_of, our_jobs

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

PACKAGES = ("haste_conf", "haste_dist", "haste_kernels", "haste_launch")
CONFIG_FILE = "config.yaml"
SAVE_SECONDS = 600  # a stopped job has this long to save before Ray kills it
SETUP_SECONDS = 600
AGENT_SECONDS = 60.0  # a cluster that has just started is waited for
AGAIN_SECONDS = 2.0


def submit(args: Namespace) -> int:
    """Starts the job, and follows it unless ``--detach``; returns the job's exit status then. Raises HasteError."""
    config = job_config(load_config(args.config, args.overrides), args)
    folder = args.folder or os.getcwd()
    environment = read_environment(args.env)
    with jobs_of(args.address, args.ca) as client, tempfile.TemporaryDirectory(prefix="haste-") as scratch:
        run_folder = os.path.normpath(os.path.join(folder, config.run.folder))
        name = Path(run_folder).name
        check_name(name)
        job_id = next_id(client, name, run_folder)
        hand_over(
            client,
            entrypoint=entrypoint(args.task, args.python, folder),
            submission_id=job_id,
            metadata={RUN: name, FOLDER: run_folder},
            runtime_env={
                "working_dir": str(write_config(config, Path(scratch))),
                "py_modules": copy_packages(Path(scratch)),
                "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(SAVE_SECONDS), **environment},
                "config": {"setup_timeout_seconds": SETUP_SECONDS},
            },
        )
        print(f"job {job_id}: {args.task} in {run_folder}", flush=True)
        if args.detach:
            print(f"haste logs {job_id} --follow shows how it goes on")
            return 0
        return follow(client, job_id, args.on_interrupt)


def hand_over(client: "JobSubmissionClient", **job: Any) -> None:
    """Gives the cluster the job, with patience: what takes jobs there may start later than what answers. Raises HasteError."""
    end = time.monotonic() + AGENT_SECONDS
    while True:
        try:
            client.submit_job(**job)
            return
        except RuntimeError as error:
            if "No available agent" not in str(error):
                raise
            if time.monotonic() > end:
                raise HasteError(
                    "no node of this cluster takes jobs: the dashboard agent of its head does not run; where several Rays share a machine, "
                    "ray start --dashboard-agent-listen-port=PORT keeps them apart"
                ) from None
        time.sleep(AGAIN_SECONDS)


def job_config(config: Config, args: Namespace) -> Config:
    """The config as the job has it: ``--name`` names the run folder, and the cluster is the one that the job is on."""
    if args.name:
        check_name(args.name)
        if any(word.startswith("run.folder=") for word in args.overrides):
            raise ConfigError("--name and run.folder=: both name the run; leave one out")
        config.run.folder = str(Path(config.run.folder).parent / args.name)
    config.launch.address = ""
    return config


def check_name(name: str) -> None:
    """A run's name becomes a job's. Raises ConfigError."""
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,99}", name):
        raise ConfigError(f"'{name}' names no run: letters, digits, '.', '_' and '-' do (--name, or run.folder=)")


def next_id(client: "JobSubmissionClient", name: str, run_folder: str) -> str:
    """NAME-N for the run's next job. Raises HasteError while another job is at work in its folder."""
    number = 0
    for job in our_jobs(client):
        mine = job.metadata or {}
        if mine.get(FOLDER) == run_folder and not job.status.is_terminal():
            raise HasteError(
                f"job {job.submission_id} is at work in {run_folder}; haste logs {job.submission_id} --follow shows it, "
                "haste stop ends it, --name starts another run"
            )
        found = re.fullmatch(rf"{re.escape(name)}-(\d+)", str(job.submission_id))
        number = max(number, int(found[1]) if found else 0)
    return f"{name}-{number + 1}"


def entrypoint(task: str, python: str, folder: str) -> str:
    """The job's shell line: relative paths in the config start from ``folder``, on the cluster."""
    missing = shlex.quote(f"haste: error: the cluster has no folder {folder}, where relative paths start; name one by --folder")
    return (
        f'config="$PWD/{CONFIG_FILE}"; cd {shlex.quote(folder)} 2>/dev/null || {{ echo {missing}; exit 2; }}; '
        f'exec {shlex.quote(python)} -m haste_launch.cli {task} "$config"'
    )


def read_environment(words: list[str]) -> dict[str, str]:
    """NAME=VALUE, or NAME with this process's value. Raises ConfigError."""
    found = {}
    for word in words:
        name, mark, value = word.partition("=")
        if not mark and name not in os.environ:
            raise ConfigError(f"--env {name}: not set here; say --env {name}=VALUE")
        found[name] = value if mark else os.environ[name]
    return found


def write_config(config: Config, scratch: Path) -> Path:
    folder = scratch / "config"
    folder.mkdir()
    save_config(config, folder / CONFIG_FILE)
    return folder


def copy_packages(scratch: Path) -> list[Any]:
    """The packages as folders of their own names (in a checkout three of them lie under other names)."""
    import importlib.util

    copies = []
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.submodule_search_locations
        copies.append(str(scratch / name))
        shutil.copytree(spec.submodule_search_locations[0], copies[-1], ignore=shutil.ignore_patterns("__pycache__"))
    return copies
