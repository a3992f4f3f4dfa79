"""Grouping on a GPU, where vectors are stored in float16, gives the order that the CPU gives."""

import pytest
import torch

from haste_dist.bisection import cohesion
from haste_dist.packing import pack

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
    from_host = pack(x.half(), torch.arange(n), group_size, iterations=3, search=search, device=torch.device("cuda"))
    expected_half = pack(x.half(), torch.arange(n), group_size, iterations=3, search=search)
    assert torch.equal(order, expected_half)
    assert torch.equal(from_host, expected_half)
    # Vectors in float16 are other vectors, if hardly; the groups are as close.
    assert cohesion(x.cuda(), order, group_size) == pytest.approx(cohesion(x, expected, group_size), rel=0.02)
