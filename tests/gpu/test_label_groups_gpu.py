"""Grouping on a GPU, where vectors are stored in float16, gives the order that the CPU gives."""

import pytest
import torch

from haste_dist.bisection import bisect, cohesion

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.mark.parametrize(("n", "width", "group_size"), [(20_000, 384, 32), (50_001, 768, 16), (1003, 100, 64)])
def test_gpu_order_is_the_cpu_order(n: int, width: int, group_size: int) -> None:
    generator = torch.Generator().manual_seed(n)
    centre = torch.randn(n // 20, width, generator=generator)
    x = torch.nn.functional.normalize(
        centre[torch.randint(n // 20, (n,), generator=generator)] + torch.randn(n, width, generator=generator)
    )
    expected = bisect(x, group_size, iterations=3)
    order = bisect(x.cuda(), group_size, iterations=3)
    assert torch.equal(order.cpu(), expected)
    assert cohesion(x.cuda(), order, group_size) == pytest.approx(cohesion(x, expected, group_size), rel=1e-6)
