"""A job's log as it grows, a bar on a terminal, and what Ctrl-C means; the job's exit status at the end."""

import asyncio
import contextlib
import re
import signal
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from haste_dist.errors import HasteError, Interrupted
from haste_launch.jobs import find_job, jobs_of, stop_and_wait

if TYPE_CHECKING:
    from ray.dashboard.modules.job.pydantic_models import JobDetails
    from ray.job_submission import JobSubmissionClient

STEP = re.compile(r"step ([\d,]+) of ([\d,]+)")  # as haste_launch.progress says it
AGAIN_SECONDS = 1.0  # before a broken stream is opened again
LOST_SECONDS = 60.0  # for which a dashboard may be away
FAILED = 1  # a job that never had an exit status


def show_logs(name: str, keep_on: bool, on_interrupt: str, address: str, ca: str) -> int:
    """Prints the log of a job so far; with ``keep_on`` follows it to its end and returns its exit status."""
    with jobs_of(address, ca) as client:
        job_id = str(find_job(client, name).submission_id)
        if keep_on:
            return follow(client, job_id, on_interrupt)
        print(client.get_job_logs(job_id), end="")
    return 0


def follow(client: "JobSubmissionClient", job_id: str, on_interrupt: str) -> int:
    """Shows the log until the job ends; returns its exit status, or raises Interrupted.

    ``on_interrupt``: what Ctrl-C does with the job: stop, leave, or ask (leave where there is nobody to ask).
    """
    stream = Stream(client, job_id)
    while True:
        try:
            with stream.interrupts():
                job = stream.run()
            break
        except KeyboardInterrupt:
            what = ask(job_id) if on_interrupt == "ask" else on_interrupt
            if what == "watch":
                continue
            if what == "leave":
                raise Interrupted(f"job {job_id} goes on; haste logs {job_id} --follow shows it, haste stop {job_id} ends it") from None
            print(f"job {job_id} is told to save and stop", file=sys.stderr, flush=True)
            stop_and_wait(client, job_id)
            raise Interrupted(f"job {job_id} is stopped; the same haste submit goes on from where it saved") from None
    return exit_status(job)


def exit_status(job: "JobDetails") -> int:
    """Of a job that is over. Raises Interrupted if it was stopped, HasteError if it did not get as far as its command."""
    status = job.status.value
    code = job.driver_exit_code
    if status == "STOPPED":
        raise Interrupted(f"job {job.submission_id} was stopped; the same haste submit goes on from where it saved")
    if status == "FAILED" and not code:
        said = " ".join((job.message or "no reason given").split())
        raise HasteError(f"job {job.submission_id} failed before its command ended: {said[:600]}")
    if code:
        print(f"haste: job {job.submission_id} failed with exit status {code}, for the reason above", file=sys.stderr, flush=True)
    return code if code is not None and code >= 0 else FAILED if code else 0


def ask(job_id: str) -> str:
    """What to do with the job after Ctrl-C: stop, leave or watch."""
    if not sys.stdin.isatty():
        return "leave"
    try:
        answer = input(f"\njob {job_id}: [s]top it, [l]eave it running, or watch on (Enter)? ").strip().lower()
    except (EOFError, KeyboardInterrupt):
        return "leave"
    return "stop" if answer.startswith("s") else "leave" if answer.startswith("l") else "watch"


class Stream:
    """The log of one job on stdout, never twice, across broken connections; on a terminal a bar below it."""

    def __init__(self, client: "JobSubmissionClient", job_id: str):
        self._client, self._job_id = client, job_id
        self._shown = 0  # characters
        self._rest = ""  # of a line that is not whole yet
        self._task: asyncio.Task | None = None  # that reads the log
        self._reading = self._interrupted = False

    @contextlib.contextmanager
    def interrupts(self) -> Iterator[None]:
        """Meanwhile the first Ctrl-C ends the reading of the log in order, then ``run`` raises KeyboardInterrupt; others do at once.

        asyncio's own handler would do the same, but forgets it where the connection ends with an error in place of the cancellation.
        """

        def handle(_number: int, _frame: object) -> None:
            if self._interrupted or not self._reading:
                raise KeyboardInterrupt
            self._interrupted = True
            if self._task is not None:
                self._task.get_loop().call_soon_threadsafe(self._task.cancel)

        self._interrupted = False
        before = signal.signal(signal.SIGINT, handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def run(self) -> "JobDetails":
        """Streams until the job is over. Raises KeyboardInterrupt, and HasteError or requests' errors if the cluster stays away."""
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        terminal = sys.stdout.isatty()
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._console = Console(soft_wrap=True, highlight=False, markup=False)
        with Progress(*columns, console=self._console, disable=not terminal, transient=True) as bars:
            self._bars, self._bar = bars, bars.add_task(self._job_id, total=None)
            answered = time.monotonic()
            while True:
                try:
                    self._read()
                    job = self._client.get_job_info(self._job_id)
                    answered = time.monotonic()
                    if job.status.is_terminal():
                        self._say(self._rest)
                        return job
                except Exception as error:
                    if not _broken(error) or time.monotonic() - answered > LOST_SECONDS:
                        raise
                time.sleep(AGAIN_SECONDS)

    def _read(self) -> None:
        """One connection, to its end. Raises KeyboardInterrupt if that was asked for meanwhile, however it ended."""
        self._reading = True
        try:
            asyncio.run(self._tail())
        except BaseException:
            if not self._interrupted:
                raise
        finally:
            self._reading, self._task = False, None
        if self._interrupted:
            raise KeyboardInterrupt

    async def _tail(self) -> None:
        """What the log has beyond what was shown; each connection sends it from its start."""
        self._task = asyncio.current_task()
        if self._interrupted:
            return
        seen = 0
        async for text in self._client.tail_job_logs(self._job_id):
            new = text[max(0, self._shown - seen) :]
            seen += len(text)
            self._shown = max(seen, self._shown)
            *lines, self._rest = (self._rest + new).split("\n")
            for line in lines:
                self._say(line)

    def _say(self, line: str) -> None:
        if not line or "job_manager.py" in line or line.startswith("Running entrypoint for job "):
            return  # Ray's own
        if found := STEP.search(line):
            done, total = (int(word.replace(",", "")) for word in found.groups())
            self._bars.update(self._bar, completed=done, total=total)
        self._console.print(line)


def _broken(error: Exception) -> bool:
    """Whether a connection broke, which may pass, rather than a token or a job that is wrong."""
    import aiohttp
    import requests

    if isinstance(error, aiohttp.WSServerHandshakeError):
        return error.status >= 500
    broken = (aiohttp.ClientError, requests.exceptions.ConnectionError, ConnectionError, TimeoutError)
    return isinstance(error, broken) or (isinstance(error, RuntimeError) and "WebSocket" in str(error))
