"""What is loaded when: a process pays for the libraries that it uses, and the collector comes back."""

import gc
import subprocess
import sys

from haste_dist.imports import import_ahead, no_collection

LIGHT = ("haste_dist.pipeline", "haste_dist.prepare", "haste_launch.ray_session", "haste_launch.ray_train")
HEAVY = {"torch", "transformers", "deepspeed", "ray", "pandas", "scipy"}
BESIDE_RAY = ("haste_dist.encoder", "haste_dist.train", "pandas")  # that ray_session is asked to import while Ray starts


def test_workers_of_prepare_load_no_torch_and_what_is_imported_while_ray_starts_loads_no_ray() -> None:
    """And what a driver imports before Ray starts is light, or nothing would be left to import meanwhile."""
    program = f"""
import importlib, sys
from haste_dist.imports import import_ahead
for name in {LIGHT}:
    importlib.import_module(name)
    assert not {HEAVY} & set(sys.modules), (name, {HEAVY} & set(sys.modules))
import_ahead(*{BESIDE_RAY})
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
    import_ahead("haste_dist.no_such_module")
    assert gc.isenabled()
