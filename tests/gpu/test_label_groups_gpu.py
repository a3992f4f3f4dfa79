"""Grouping on GPUs, one or all, where vectors are stored in float16, gives the order that the CPU gives."""

import pytest
import torch

from haste_dist.bisection import BLOCK_BYTES, cohesion
from haste_dist.packing import pack
from haste_dist.world import all_devices

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.mark.parametrize(
    ("n", "width", "group_size", "search"), [(20_000, 384, 32, 2**20), (50_001, 768, 16, 20_000), (1003, 100, 64, 500)]
)
def test_gpu_order_is_the_cpu_order(n: int, width: int, group_size: int, search: int) -> None:
    generator = torch.Generator().manual_seed(n)
    centre = torch.randn(n // 20, width, generator=generator)
    x = torch.nn.functional.normalize(
        centre[torch.randint(n // 20, (n,), generator=generator)] + torch.randn(n, width, generator=generator)
    )
    x[n // 2 : n // 2 + 100] = x[0]  # equal vectors: ties fall the same way
    expected = pack(x, torch.arange(n), group_size, iterations=3, search=search)
    order = pack(x.half().cuda(), torch.arange(n), group_size, iterations=3, search=search)
    from_host = pack(x.half(), torch.arange(n), group_size, iterations=3, search=search, devices=[torch.device("cuda")])
    expected_half = pack(x.half(), torch.arange(n), group_size, iterations=3, search=search)
    assert torch.equal(order, expected_half)
    assert torch.equal(from_host, expected_half)
    # Vectors in float16 are other vectors, if hardly; the groups are as close.
    assert cohesion(x.cuda(), order, group_size) == pytest.approx(cohesion(x, expected, group_size), rel=0.02)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("where", ["cuda:0", "cpu"])
def test_all_gpus_give_the_order_of_one(where: str) -> None:
    """Vectors on the first GPU or on the host; each GPU does parts, and none has more than one at a time."""
    n, width, search = 400_003, 256, 20_000
    generator = torch.Generator().manual_seed(n)
    centre = torch.randn(n // 20, width, generator=generator)
    x = centre[torch.randint(n // 20, (n,), generator=generator)] + torch.randn(n, width, generator=generator)
    x = torch.nn.functional.normalize(x).half().to(where)
    devices = all_devices("cuda")
    one = pack(x, torch.arange(n), 32, iterations=3, search=search, devices=devices[:1])
    for device in devices:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    began = [torch.cuda.memory_allocated(device) for device in devices]
    assert torch.equal(pack(x, torch.arange(n), 32, iterations=3, search=search, devices=devices), one)
    peaks = [torch.cuda.max_memory_allocated(device) - before for device, before in zip(devices, began, strict=True)]
    assert min(peaks) > search // 2 * width * 2  # a part's vectors, at least
    assert max(peaks[1:]) < 4 * 512 * search * 4 + 4 * BLOCK_BYTES  # a round's similarities and what is made of them, and blocks
