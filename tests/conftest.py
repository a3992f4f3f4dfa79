"""Settings of every test: few threads, no network, no clock in property tests."""

import gc
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before torch, Triton and Ray load. Ranks and workers inherit them.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # one process less, as on a cluster that a command starts

if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run in Triton's interpreter where there is no GPU

import pytest
from hypothesis import settings

# A busy machine is no failure, so there is no deadline. In CI the examples are the same each time: a red run can be repeated.
settings.register_profile("haste", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("haste")

# Files that take longest: they come first, so that at the end no process is left with one of them while the others have nothing to do.
# Those that wait for Ray stand beside those that only calculate.
LONGEST = (
    "launch", "triton_topk", "jobs", "training", "hosts", "averaging", "serve",
    "repository", "prepare", "study", "campaign", "object_store", "estimator", "scale",
    "predict_folder", "triton_steps", "label_embeddings", "benchmarks", "ray_reader", "doctor",
)  # fmt: skip

gc.disable()  # while test files import torch and the like, whose objects stay


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {f"test_{name}": i for i, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))  # stable: files stay whole, and otherwise in their order


def pytest_collection_finish() -> None:
    gc.freeze()  # nor are those looked through again
    gc.enable()
    if (interpreter := sys.modules.get("triton.runtime.interpreter")) is not None:
        patch_once(interpreter)


def patch_once(interpreter: Any) -> None:
    """Triton's interpreter puts its functions in the place of the language's for each kernel, and again, one by one, for each call of a
    function inside it, which takes a third of its time. Inside a kernel that is left out where they are in place."""
    patch_lang, tl = interpreter._patch_lang, interpreter.tl

    def patch(function: Any) -> Any:
        used = [lang for lang in (tl, tl.core) if any(value is lang for value in function.__globals__.values())]
        if used and not any(tl.core.is_builtin(lang.load) for lang in used):
            return interpreter._LangPatchScope()
        return patch_lang(function)

    interpreter._patch_lang = patch


@pytest.fixture(scope="session")
def warm_python(short_folder: Path) -> Iterator[str]:
    """A program like ``python`` that has imported already what ranks need (warm.py). Python itself on a GPU, which no fork can use."""
    if os.path.exists("/dev/nvidiactl"):
        yield sys.executable
        return
    import warm
    from tiny import fork_context

    address = short_folder / "warm"
    ours, theirs = fork_context().Pipe()
    server = fork_context().Process(target=warm.serve, args=(str(address), theirs))
    server.start()
    theirs.close()
    assert ours.recv() == "ready"
    yield str(warm.write_program(short_folder, address))
    ours.close()
    server.join()


@pytest.fixture(scope="module")
def ray_session(warm_python: str) -> Iterator[None]:
    """A Ray of two CPUs on this machine, shared by the tests of a file that need one. Its workers are warm."""
    import ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", warm_python)
        ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=2**27, _node_ip_address="127.0.0.1", **quiet)
    yield
    ray.shutdown()


@pytest.fixture(autouse=True)
def nothing_left_on() -> Iterator[None]:
    """What a test switches on for the whole process would change those after it."""
    before = switched_on()
    yield
    assert switched_on() == before, "this test leaves it as it is now"


def switched_on() -> dict[str, bool]:
    """Process-wide switches, of the libraries that are loaded."""
    ray, torch = sys.modules.get("ray"), sys.modules.get("torch")
    return {
        "ray": ray is not None and ray.is_initialized(),
        "deterministic": torch is not None and torch.are_deterministic_algorithms_enabled(),
    }


@pytest.fixture(scope="session")
def short_folder() -> Iterator[Path]:
    """A folder for Ray's sockets, whose paths may have 107 characters."""
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="h", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture
def short(short_folder: Path) -> Path:
    """As ``short_folder``, of one test alone."""
    return Path(tempfile.mkdtemp(dir=short_folder))
