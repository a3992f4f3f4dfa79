"""A Ray cluster for one command: the one that the user named, or one on this machine that ends with the command.

Starting Ray is mostly waiting for its processes: what this process has to import anyway is imported in that time.

Whoever ends a command may send SIGTERM to all of its process group (`timeout`, Slurm, systemd), which would end Ray's servers and with
them the ranks before they have saved. So Ray's processes are started with SIGTERM blocked, as Ray itself starts them with SIGINT blocked.
In this process Ray would answer SIGTERM with a trace of its own; here it interrupts as Ctrl-C does.
"""

import contextlib
import logging
import os
import select
import signal
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from haste_dist.config import Config
from haste_dist.errors import ConfigError
from haste_dist.imports import import_ahead
from haste_launch.signals import heed_sigterm

OBJECT_STORE_BYTES = 2**30  # of a cluster of our own; blocks in flight are a few MiB each
SHUTDOWN_SECONDS = 30.0
CONNECT_SECONDS = 10.0


@contextlib.contextmanager
def ray_session(config: Config, meanwhile: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Joins ``launch.address`` or RAY_ADDRESS, or starts Ray on this machine, bound to 127.0.0.1, with token authentication;
    where this process is connected already, that is used. ``meanwhile`` imports what is needed after, but no Ray, in a thread.

    Raises ConfigError where a named cluster does not answer.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # keep CUDA_VISIBLE_DEVICES in tasks without GPUs
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # ranks see the relative paths that the user typed
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    import ray

    if ray.is_initialized():  # by the caller, who also ends it
        yield
        return
    address = config.launch.address or os.environ.get("RAY_ADDRESS", "")
    servers: list[int] = []
    before = signal.getsignal(signal.SIGTERM)
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    threading.Thread(target=import_ahead, args=(meanwhile,), name="imports").start()
    try:
        if address:
            try:
                _check_that_something_listens(address)
                ray.init(address=address, **quiet)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise ConfigError(
                    f"launch.address: no Ray cluster at '{address}' ({str(error).splitlines()[0]}); "
                    "name another, or none to start Ray on this machine (launch.address= without RAY_ADDRESS)"
                ) from None
        else:
            os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # nobody drains the nodes of such a cluster
            servers = _start_twice(config, quiet)
        try:
            heed_sigterm(signal.default_int_handler)
            yield
        finally:
            if servers:  # not where a cluster was joined: it goes on
                _end_with_raylet(servers)
            ray.shutdown()
    finally:
        heed_sigterm(before)


def _check_that_something_listens(address: str) -> None:
    """Raises ConnectionError where nothing does: Ray itself tries for minutes, and speaks of its parts meanwhile."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit() and "/" not in host:  # else "auto", or ray://, whose client says it in seconds
        try:
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise ConnectionError(str(error)) from None


def _start_twice(config: Config, quiet: dict[str, Any]) -> list[int]:
    """Starts Ray on this machine, a second time if need be: on starved cores its raylet gives up on its agent after some 20 s.
    Returns the ids of its servers."""
    import ray

    servers: list[int] = []
    for last in (False, True):
        try:
            # With RAY_AUTH_MODE unset Ray turns token authentication on for a new cluster.
            with _sheltered_children() as servers:
                ray.init(
                    address="local",
                    num_cpus=config.data.workers or len(os.sched_getaffinity(0)),
                    include_dashboard=False,
                    object_store_memory=OBJECT_STORE_BYTES,
                    _node_ip_address="127.0.0.1",
                    **quiet,
                )
                heed_sigterm(signal.default_int_handler)  # before one that came meanwhile is let in
            break
        except BaseException as error:
            _end_at_once(servers)  # a raylet that is not up yet ends nothing itself
            ray.shutdown()
            if isinstance(error, SystemExit):  # Ray's answer to a SIGTERM that came before it was up
                raise KeyboardInterrupt from None
            if last or not isinstance(error, Exception):
                raise
    return servers


@contextlib.contextmanager
def _sheltered_children() -> Iterator[list[int]]:
    """Processes that this thread starts meanwhile are born with SIGTERM blocked. Yields what becomes the list of their ids."""
    started: list[int] = []
    if not hasattr(os, "pidfd_open"):  # not Linux
        yield started
        return
    before = _children("self")
    masked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield started
    finally:
        started.extend(_children("self") - before)
        signal.pthread_sigmask(signal.SIG_SETMASK, masked)  # a signal that came meanwhile is heeded here


def _children(process: int | str) -> set[int]:
    """The ids of a process's children."""
    found: set[int] = set()
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{process}/task"):
            with contextlib.suppress(OSError), open(f"/proc/{process}/task/{task}/children") as children:
                found |= {int(child) for child in children.read().split()}
    return found


def _end_with_raylet(servers: list[int]) -> None:
    """In a thread: ends ``servers`` and their children as soon as the raylet, which ``ray.shutdown`` ends first, is gone.

    Left alone Ray would give each a second to heed a SIGTERM that it does not hear, and the raylet's children would look for it.
    """
    handles = _handles(servers)
    raylets = [handle for handle, name in handles.items() if name == "raylet"]

    def end() -> None:
        select.select(raylets, [], [], SHUTDOWN_SECONDS)
        _kill(handles)

    threading.Thread(target=end, name="end of Ray").start()


def _end_at_once(servers: list[int]) -> None:
    """Ends ``servers`` and their children, of which none can be started meanwhile."""
    parents = _handles(servers, children=False)
    for handle in parents:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(handle, signal.SIGSTOP)
    _kill([*_handles(servers), *parents])


def _handles(servers: list[int], children: bool = True) -> dict[int, str]:
    """Of ``servers`` and their children, each a process and not an id that another one may get; and their names."""
    handles: dict[int, str] = {}
    for pid in [*servers, *(child for server in servers if children for child in _children(server))]:
        with contextlib.suppress(OSError), open(f"/proc/{pid}/comm") as name:
            handles[os.pidfd_open(pid)] = name.read().strip()
    return handles


def _kill(handles: Iterable[int]) -> None:
    for handle in handles:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(handle, signal.SIGKILL)
        os.close(handle)
