"""Every kernel of the steps, top-k and layers compiles for an H100, on a machine without one, in every type that weights are stored in."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parent / "compile_kernels.py"


@pytest.mark.slow
def test_kernels_compile_for_an_h100(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    words = [sys.executable, str(SCRIPT), "90", "bfloat16", "float8"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr
    made = [line.split() for line in done.stdout.splitlines()]
    for weight in ("bfloat16", "float8"):
        names = {name for name, kind, *_ in made if kind == weight}
        assert {"_tail_step", "_collect", "_gradient", "_correct", "_update", "_tail_maxima", "_head_maxima", "_choose"} <= names
    encoder = {f"_{name}_{way}" for name in ("attention", "embed", "norm", "gelu") for way in ("forward", "backward")}
    assert {name for name, kind, *_ in made if kind == "encoder"} == encoder | {"_sum_rows", "_sum_ids", "_join_edges"}
    assert all(int(shared) <= 227 << 10 for *_, shared in made)
    assert "_grad_x" in {name for name, *_ in made}
    reading = {"_tail_step", "_update", "_tail_maxima", "_head_maxima"}  # float8 weights by the chip's own conversions
    assert all(int(converts) > 0 for name, kind, converts, _ in made if name in reading and kind == "float8")
    assert all(int(converts) == 0 for name, kind, converts, _ in made if kind == "bfloat16" or name == "_gradient")  # given them converted
