"""The same bits twice: what ``run.deterministic`` switches on, at the price of speed."""

import dataclasses
import os

import torch

from haste_dist.config import Config


def make_deterministic(config: Config) -> Config:
    """Sets this process up, before its first product on a GPU, and returns the config with the kernels' fixed order of sums.

    An operation of torch that has no fixed order then raises; what a run repeats are its bits on the same number of ranks and the same GPU.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS may split a sum otherwise each time
    os.environ.setdefault("NCCL_ALGO", "Ring")  # one order of sums for all sizes
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # all memory is written before it is read
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.enable_mem_efficient_sdp(False)  # its backward adds in any order
    return dataclasses.replace(config, output=dataclasses.replace(config.output, deterministic=True))
