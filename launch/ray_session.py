"""A Ray cluster for one command: the one that the user named, or one on this machine that ends with the command.

Starting Ray is mostly waiting for its processes: what this process has to import anyway is imported in that time.
"""

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

from haste_dist.config import Config
from haste_dist.errors import ConfigError
from haste_dist.imports import import_ahead

OBJECT_STORE_BYTES = 2**30  # of a cluster of our own; blocks in flight are a few MiB each


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
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    threading.Thread(target=import_ahead, args=(meanwhile,), name="imports").start()
    if address:
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ConfigError(f"launch.address: no Ray cluster at '{address}' ({str(error).splitlines()[0]})") from None
    else:
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # nobody drains the nodes of such a cluster
        # With RAY_AUTH_MODE unset Ray turns token authentication on for a new cluster.
        ray.init(
            address="local",
            num_cpus=config.data.workers or len(os.sched_getaffinity(0)),
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            _node_ip_address="127.0.0.1",
            **quiet,
        )
    try:
        yield
    finally:
        ray.shutdown()
