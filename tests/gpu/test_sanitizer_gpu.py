"""NVIDIA's compute-sanitizer over every kernel: memory out of bounds or misaligned, races in shared memory, wrong barriers."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)
if shutil.which("compute-sanitizer") is None:
    pytest.skip("compute-sanitizer, a part of the CUDA toolkit, is not on the PATH", allow_module_level=True)

pytestmark = pytest.mark.gpu
TOOLS = ("memcheck", "racecheck", "synccheck")
# More than the tool finds by itself: barriers of shared memory are set up in a loop. Those that it does not follow it takes for none.
OPTIONS = ("--error-exitcode", "9", "--print-limit", "5", "--num-cuda-barriers", "64")
SCRIPT = Path(__file__).with_name("every_kernel.py")
KERNELS = Path(__file__).parents[2] / "kernels"
JIT = re.compile(r"^@(?:triton\.)?jit.*\ndef (\w+)\(\n    \w+,  # ", re.MULTILINE)  # a kernel's first argument is described beside it
CUDA = re.compile(r"^__global__ .* (\w+)\($", re.MULTILINE)


def start(*before: str) -> subprocess.Popen[str]:
    """The script, with every tensor an allocation of its own, so that its bounds are known."""
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [*before, sys.executable, str(SCRIPT)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def test_every_kernel_is_clean() -> None:
    plain = start()  # this compiles them, into Triton's cache
    told = plain.communicate(timeout=300)[0]
    assert plain.returncode == 0, told[-3000:]
    known = {f"{file.stem}.{name}" for file in KERNELS.glob("*.py") for name in JIT.findall(file.read_text())}
    if torch.cuda.get_device_capability() >= (9, 0):
        known |= {f"{file.stem}.{name}" for file in KERNELS.glob("*.cu") for name in CUDA.findall(file.read_text())}
    assert known
    assert known <= set(told.split()), f"never launched: {known - set(told.split())}"
    runs = {tool: start("compute-sanitizer", "--tool", tool, *OPTIONS) for tool in TOOLS}
    said = {tool: run.communicate(timeout=500)[0] for tool, run in runs.items()}
    wrong = [f"{tool}: {said[tool][-3000:]}" for tool, run in runs.items() if run.returncode != 0]
    assert not wrong, "\n\n".join(wrong)
