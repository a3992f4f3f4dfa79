"""The words of haste doctor, submit, jobs, logs and stop."""

import argparse

ON_INTERRUPT = ("ask", "stop", "leave")
TASKS = ("train", "prepare", "doctor")


def add_job_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]", config: str, overrides: str) -> None:
    """``config`` and ``overrides`` are the help of the words that other commands take as well."""
    submit = commands.add_parser(
        "submit",
        help="train as a job of a Ray cluster",
        description="Send this code and one config to a Ray cluster, follow the log, and exit as the job does. A second submit of a run "
        "goes on from its newest checkpoint.",
    )
    submit.add_argument("config", metavar="CONFIG", help=config)
    submit.add_argument("overrides", metavar="a.b=c", nargs="*", help=overrides)
    submit.add_argument("--name", default="", metavar="RUN", help="of the run, and of its folder beside the config's run.folder")
    submit.add_argument("--task", choices=TASKS, default="train", help="what the job does (default train)")
    submit.add_argument("--folder", default="", metavar="DIR", help="where relative paths start on the cluster (default: this folder)")
    submit.add_argument("--env", action="append", default=[], metavar="NAME[=VALUE]", help="variable for the job; may be given again")
    submit.add_argument("--python", default="python", metavar="PATH", help="the cluster's interpreter (default python)")
    ends = submit.add_mutually_exclusive_group()
    ends.add_argument(
        "--follow", dest="detach", action="store_false", default=False, help="show the log and wait for the end (the default)"
    )
    ends.add_argument("--detach", dest="detach", action="store_true", help="return at once")
    _add_interrupt(submit)
    _add_cluster(submit)

    doctor = commands.add_parser(
        "doctor",
        help="look for what would stop a run",
        description="Look at every machine of the cluster: versions, GPUs, links, shared folders, disk, clock, ports, token, stale locks, "
        "and the rate of an all-reduce. Exit status 1 when a run would fail.",
    )
    doctor.add_argument("config", metavar="CONFIG", nargs="?", help=f"{config}; default: no run in particular")
    doctor.add_argument("overrides", metavar="a.b=c", nargs="*", help=overrides)

    jobs = commands.add_parser("jobs", help="list a cluster's jobs", description="List the jobs of a Ray cluster, newest first.")
    _add_cluster(jobs)

    logs = commands.add_parser("logs", help="a job's log", description="Print the log of a job, or of a run's newest job.")
    logs.add_argument("job", metavar="JOB", help="a job, or a run: then its newest job")
    logs.add_argument("--follow", action="store_true", help="to the job's end, and exit as it does")
    _add_interrupt(logs)
    _add_cluster(logs)

    stop = commands.add_parser("stop", help="stop a job", description="Ask a job to save and stop, and wait until it has.")
    stop.add_argument("job", metavar="JOB", help="a job, or a run: then its newest job")
    _add_cluster(stop)


def _add_interrupt(command: argparse.ArgumentParser) -> None:
    command.add_argument("--on-interrupt", choices=ON_INTERRUPT, default="ask", help="what Ctrl-C does with the job (default ask)")


def _add_cluster(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--address", default="", metavar="URL", help="of the dashboard (default RAY_API_SERVER_ADDRESS, else http://127.0.0.1:8265)"
    )
    command.add_argument("--ca", default="", metavar="FILE", help="certificates to trust, for https")
