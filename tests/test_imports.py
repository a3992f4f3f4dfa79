"""What is loaded when: a process pays for the libraries that it uses, and the collector comes back."""

import gc
import subprocess
import sys

from haste_dist.imports import import_ahead, no_collection

LIGHT = ("haste_dist.pipeline", "haste_dist.prepare", "haste_launch.ray_session", "haste_launch.ray_train")
HEAVY = {"torch", "transformers", "deepspeed", "ray", "pandas", "scipy"}
BESIDE_RAY = ("haste_dist.encoder", "haste_dist.train", "pandas")  # what is imported while Ray starts


def test_workers_of_prepare_load_no_torch_and_what_is_imported_while_ray_starts_loads_no_ray() -> None:
    """And what a driver imports before Ray starts is light, or nothing would be left to import meanwhile."""
    program = f"""
import importlib, sys
for name in {LIGHT}:
    importlib.import_module(name)
    assert not {HEAVY} & set(sys.modules), (name, {HEAVY} & set(sys.modules))
from haste_launch import commands, ray_train
for load in (commands._import_for_prepare, ray_train._import_for_train):
    load()
assert set({BESIDE_RAY}) <= set(sys.modules) and "ray" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_the_collector_is_on_again_however_the_rests_overlap() -> None:
    first, second = no_collection(), no_collection()
    with no_collection():
        assert not gc.isenabled()
    assert gc.isenabled()
    with first:
        second.__enter__()
    second.__exit__(None, None, None)
    assert gc.isenabled()


def test_an_import_that_fails_ahead_is_told_by_the_next() -> None:
    def load() -> None:
        import haste_dist.no_such_module  # type: ignore[import-not-found]  # noqa: F401

    import_ahead(load)
    assert gc.isenabled()
