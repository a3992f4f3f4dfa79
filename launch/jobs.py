"""Jobs of a Ray cluster, through its dashboard: connecting, naming, listing, stopping.

``haste submit`` calls the N-th job of a run RUN-N; the other commands take either name, RUN for its newest job. A token comes from
RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or Ray's own file, headers for a proxy from RAY_JOB_HEADERS, as Ray's own commands have them.
"""

import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haste_dist.errors import ConfigError, HasteError

if TYPE_CHECKING:
    from ray.dashboard.modules.job.pydantic_models import JobDetails
    from ray.job_submission import JobSubmissionClient

ADDRESS = "http://127.0.0.1:8265"  # Ray's default
RUN, FOLDER = "haste_run", "haste_folder"  # metadata of our jobs
POLL_SECONDS = 0.5
TABLE_WIDTH = 200  # where the output is no terminal


def address_of(word: str) -> str:
    """The dashboard's address: ``word``, or the environment's, or this machine's; http:// where it names no scheme."""
    address = word or os.environ.get("RAY_API_SERVER_ADDRESS", "")
    if not address and os.environ.get("RAY_ADDRESS", "").startswith(("http://", "https://")):
        address = os.environ["RAY_ADDRESS"]  # otherwise the address of the cluster's control plane, not of its dashboard
    address = (address or ADDRESS).rstrip("/")
    scheme, mark, _ = address.partition("://")
    if mark and scheme not in {"http", "https"}:
        raise ConfigError(f"--address {address}: a dashboard's address reads http://HOST:8265 or https://HOST")
    return address if mark else f"http://{address}"


@contextlib.contextmanager
def jobs_of(address: str = "", ca: str = "") -> Iterator["JobSubmissionClient"]:
    """A client of the cluster whose dashboard is at ``address``. ``ca``: a file or folder of certificates to trust (https).

    Raises HasteError, here and from what is done with the client: no cluster, no or a wrong token, an unknown certificate or job.
    """
    address = address_of(address)
    if ca and not Path(ca).exists():
        raise ConfigError(f"--ca {ca}: no such file or folder of certificates")
    if not os.environ.get("RAY_AUTH_MODE") and _has_token():
        os.environ["RAY_AUTH_MODE"] = "token"  # read when ray is imported
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # Ray lets the environment win over arguments
    try:
        import aiohttp
        import requests
    except ImportError:
        raise HasteError("jobs need Ray's dashboard packages: pip install 'haste-dist[jobs]'") from None
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray").setLevel(logging.ERROR)
    for part in ("sdk", "dashboard_sdk"):  # these set levels of their own
        logging.getLogger(f"ray.dashboard.modules.{'job.' if part == 'sdk' else ''}{part}").setLevel(logging.ERROR)
    try:
        yield JobSubmissionClient(address, headers=_headers(), verify=ca or True)
    except AuthenticationError as error:
        raise HasteError(_token_line(address, str(error))) from None
    except (requests.exceptions.RequestException, aiohttp.ClientError, ConnectionError, TimeoutError) as error:
        raise HasteError(_connection_line(address, error)) from None
    except RuntimeError as error:
        if "status code" not in str(error):
            raise
        raise HasteError(f"{address}: {_reason(error)}") from None


def find_job(client: "JobSubmissionClient", name: str) -> "JobDetails":
    """The job NAME, or the newest of run NAME. Raises HasteError."""
    found = [job for job in our_jobs(client) if name in (job.submission_id, (job.metadata or {}).get(RUN))]
    if not found:
        raise HasteError(f"no job or run '{name}' on this cluster; haste jobs lists them")
    return found[-1]


def our_jobs(client: "JobSubmissionClient") -> list["JobDetails"]:
    """Submitted jobs, oldest first; scripts that only joined the cluster are none."""
    return sorted((job for job in client.list_jobs() if job.submission_id), key=lambda job: job.start_time or 0)


def list_jobs(address: str, ca: str) -> int:
    """Prints a table of the cluster's jobs, newest first."""
    from rich.console import Console
    from rich.table import Table

    with jobs_of(address, ca) as client:
        jobs = our_jobs(client)
    table = Table(box=None, pad_edge=False)
    for column in ("job", "status", "started", "took", "run folder"):
        table.add_column(column, no_wrap=True, overflow="ignore")
    for job in reversed(jobs):
        took = ((job.end_time or time.time() * 1000) - (job.start_time or 0)) / 1000
        started = time.strftime("%Y-%m-%d %H:%M", time.localtime((job.start_time or 0) / 1000))
        table.add_row(str(job.submission_id), _status(job), started, _duration(took), (job.metadata or {}).get(FOLDER, "-"))
    if jobs:
        Console(width=None if sys.stdout.isatty() else TABLE_WIDTH, highlight=False, markup=False).print(table)
    else:
        print("no jobs yet; haste submit starts one")
    return 0


def stop_job(name: str, address: str, ca: str) -> int:
    """Asks a job to stop, waits until it has saved and ended; returns 0."""
    with jobs_of(address, ca) as client:
        job = find_job(client, name)
        if job.status.is_terminal():
            raise HasteError(f"job {job.submission_id} is over: {_status(job)}")
        print(f"job {job.submission_id}: {_status(stop_and_wait(client, str(job.submission_id)))}")
    return 0


def stop_and_wait(client: "JobSubmissionClient", job_id: str) -> "JobDetails":
    """Stops a job and waits until it has ended: training saves first."""
    client.stop_job(job_id)
    while not (job := client.get_job_info(job_id)).status.is_terminal():
        time.sleep(POLL_SECONDS)
    return job


def _status(job: "JobDetails") -> str:
    code = getattr(job, "driver_exit_code", None)
    return job.status.value.lower() + (f" ({code})" if code else "")


def _duration(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


def _has_token() -> bool:
    """Whether there is a token where Ray looks for one."""
    return (
        any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")) or Path("~/.ray/auth_token").expanduser().exists()
    )


def _headers() -> dict[str, Any]:
    word = os.environ.get("RAY_JOB_HEADERS", "")
    try:
        headers = json.loads(word) if word else {}
    except ValueError:
        headers = None
    if not isinstance(headers, dict) or not all(isinstance(value, str) for value in headers.values()):
        raise ConfigError('RAY_JOB_HEADERS: headers read {"Name": "value"}, as JSON')
    return headers


def _token_line(address: str, said: str) -> str:
    if said.startswith("Authentication failed"):
        return f"{address} refuses this token; set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH, to the cluster's own"
    return f"{address} asks for a token; set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH, to the cluster's own"


def _connection_line(address: str, error: BaseException) -> str:
    from requests.exceptions import HTTPError, SSLError

    cause = error if isinstance(error, SSLError) else error.__context__
    if isinstance(cause, SSLError) and "CERTIFICATE_VERIFY_FAILED" in str(cause):
        return f"{address}: its certificate is not trusted; name the file of its authority by --ca FILE"
    if isinstance(cause, SSLError):
        return f"{address} does not speak TLS; try http:// instead"
    if isinstance(error, HTTPError):
        return f"{address}: {_reason(error)}"
    return f"no Ray dashboard answers at {address}; is the cluster up, and --address (or RAY_API_SERVER_ADDRESS) its dashboard's?"


def _reason(error: BaseException) -> str:
    return str(error).splitlines()[0][:300].rstrip(".")
