"""Settings of every test: few threads, no network, no clock in property tests."""

import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Before torch, Triton and Ray load. Ranks and workers inherit them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run in Triton's interpreter where there is no GPU

import pytest
from hypothesis import settings

# A busy machine is no failure, so there is no deadline. In CI the examples are the same each time: a red run can be repeated.
settings.register_profile("haste", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("haste")


@pytest.fixture(scope="session")
def ray_session():
    """A Ray of two CPUs on this machine, shared by the tests that need one and stopped at the end."""
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def short_folder() -> Iterator[Path]:
    """A folder for Ray's sockets, whose paths may have 107 characters."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="h", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture
def short(short_folder: Path) -> Path:
    """As ``short_folder``, of one test alone."""
    return Path(tempfile.mkdtemp(dir=short_folder))
