"""The gate of ``haste bench kernels``: right providers pass, a kernel that is broken somewhere does not, and then no speed is shown."""

import dataclasses
import importlib.machinery
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import haste_kernels
from haste_kernels import Positives, StepArgs, TailState, reference, stochastic_round
from haste_launch import bench, cli
from haste_launch.bench_case import BACKWARD, FORWARD, TAIL, TOPICS_OF, Case, Ceilings
from haste_launch.bench_gate import check_small
from haste_launch.bench_providers import PROVIDERS, Provider, Unsupported

CPU = torch.device("cpu")
TINY = "--labels 96 --batch 20 --width 32 --fan-in 8 --group 16 -k 5 --seconds 0.001"
ALL_TOPICS = [topic for topics in TOPICS_OF.values() for topic in topics]
Step = Callable[..., tuple[Tensor, Tensor | None]]


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(bench, "measure_ceilings", lambda *_: Ceilings(10.0, 0.1))


def run(line: str) -> int:
    return cli.main(["bench", "kernels", *line.split()])


def case(topic: str = TAIL, dtype: str = "float32", momentum: str = "", bias: bool = True, group: int = 16) -> Case:
    return Case(topic, 96, 20, 32, 8, group, 5, dtype, momentum or dtype, bias)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("topic", ALL_TOPICS)
def test_every_provider_passes(topic: str, dtype: str) -> None:
    compared = 0
    for name, provider in PROVIDERS.items():
        if topic not in provider.build or provider.missing():
            continue
        for momentum, bias in ((dtype, True), ("none", False)):
            checks = check_small(name, provider, case(topic, dtype, momentum, bias), CPU)
            assert [check for check in checks if check.red] == []
            compared += len(checks)
    assert compared


@pytest.mark.parametrize("topic", ALL_TOPICS)
def test_float8_weights_pass_where_they_are_supported(topic: str) -> None:
    for name, provider in PROVIDERS.items():
        if topic not in provider.build or provider.missing():
            continue
        for momentum in ("bfloat16", "float8", "none"):
            if name == "haste_dist" and topic not in (FORWARD, BACKWARD):
                checks = check_small(name, provider, case(topic, "float8", momentum), CPU)
                assert checks
                assert [check for check in checks if check.red] == []
            elif topic not in provider.unchecked:
                with pytest.raises(Unsupported):
                    check_small(name, provider, case(topic, "float8", momentum), CPU)


def kept(step: Step, change: Callable[[TailState, TailState], None]) -> Step:
    """``step``, after which ``change`` spoils the new state, given the old one."""

    def broken(x: Tensor, positives: Positives, tail: TailState, args: StepArgs, want_loss: bool = False) -> tuple[Tensor, Tensor | None]:
        old = dataclasses.replace(tail, weight=tail.weight.clone(), momentum=None if tail.momentum is None else tail.momentum.clone())
        result = step(x, positives, tail, args, want_loss)
        change(old, tail)
        return result

    return broken


def dx_of_half_the_batch(step: Step) -> Step:
    def broken(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor | None]:
        dx, loss = step(x, *rest)
        dx[len(x) // 2 :] = 0
        return dx, loss

    return broken


def no_number_in_dx(step: Step) -> Step:
    def broken(*given: Any) -> tuple[Tensor, Tensor | None]:
        dx, loss = step(*given)
        dx[-1, -1] = torch.nan
        return dx, loss

    return broken


def positives_forgotten(step: Step) -> Step:
    def broken(x: Tensor, positives: Positives, *rest: Any) -> tuple[Tensor, Tensor | None]:
        return step(x, Positives(positives.batch[1:], positives.row[1:]), *rest)

    return broken


def last_group_not_stored(step: Step) -> Step:
    return kept(step, lambda old, new: new.weight[-1].copy_(old.weight[-1]))  # type: ignore[arg-type,return-value]


def momentum_not_stored(step: Step) -> Step:
    return kept(step, lambda old, new: new.momentum.copy_(old.momentum))  # type: ignore


BROKEN = [dx_of_half_the_batch, no_number_in_dx, positives_forgotten, last_group_not_stored, momentum_not_stored]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("breaks", BROKEN)
def test_a_broken_kernel_shows_no_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], breaks: Callable[[Step], Step], dtype: str
) -> None:
    monkeypatch.setattr(haste_kernels, "tail_step", breaks(haste_kernels.tail_step))
    assert run(f"{TINY} --what head,tail --dtype {dtype} --records {tmp_path}") == bench.WRONG
    out, err = capsys.readouterr()
    assert out == ""
    assert "haste: gate: haste_dist tail_step F=8 G=16 tail" in err
    assert "no speed is shown" in err
    assert "head_step" not in err
    assert list(tmp_path.iterdir()) == []


def test_ties_in_the_wrong_order_are_noticed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def last_first(x_head: Any, x: Tensor, head: Any, tail: TailState, k: int) -> tuple[Tensor, Tensor]:
        z = reference.logits(x, reference.dense_tail(tail.weight, tail.index, x.shape[1]), tail.bias.view(-1))  # type: ignore
        z = z[:, : tail.rows].flip(1)
        scores, at = z.sort(dim=1, descending=True, stable=True)
        return scores[:, :k].float(), tail.rows - 1 - at[:, :k]

    monkeypatch.setattr(haste_kernels, "topk", last_first)
    assert run(f"{TINY} --what topk") == bench.WRONG
    assert "haste_dist topk F=8 G=16 places that differ" in capsys.readouterr().err


def test_a_kernel_that_is_wrong_at_full_size_alone_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = haste_kernels.tail_step

    def broken(x: Tensor, positives: Positives, tail: TailState, args: StepArgs) -> tuple[Tensor, Tensor | None]:
        momentum = tail.momentum[-1].clone()  # type: ignore[index]
        result = right(x, positives, tail, args)
        if len(tail.weight) > 100:  # more than the gate's shape has
            tail.momentum[-1] = momentum  # type: ignore[index]
        return result

    monkeypatch.setattr(haste_kernels, "tail_step", broken)
    assert run(f"{TINY} --what tail --records {tmp_path}") == 0
    capsys.readouterr()
    assert run(f"{TINY} --what tail --labels 3200 --records none") == bench.WRONG
    out, err = capsys.readouterr()
    assert out == ""
    assert "tail_step at full size tail momentum" in err


# The authors' package, in the shape of its interface


class FakeSGD:
    def __init__(self, groups: list[dict[str, Any]], lr: float, momentum: float, use_momentum: bool, seed: int):
        self.groups, self.lr, self.momentum, self.use = groups, lr, momentum, use_momentum
        self.state = {group["params"][0]: {"momentum_buf": torch.zeros_like(group["params"][0], dtype=torch.float32)} for group in groups}

    @torch.no_grad()
    def step(self) -> None:
        for i, group in enumerate(self.groups):
            value = group["params"][0]
            m = value.grad.float() + group["weight_decay"] * value
            if self.use:
                m = self.state[value]["momentum_buf"].mul_(self.momentum).add_(m)
            new = (value - self.lr * m).reshape(-1, 1)
            if value.dtype == torch.bfloat16:
                new = stochastic_round(new, i, 0, torch.arange(len(new)), 0)
            value.copy_(new.view_as(value))

    def zero_grad(self, set_to_none: bool) -> None:
        for group in self.groups:
            group["params"][0].grad = None


def group_ffi_mul(x: Tensor, weight: Tensor, locations: Tensor, bias: Tensor | None, gsize: int = 32) -> Tensor:
    assert locations.dtype == torch.int32
    z = torch.einsum("ntf,tgf->ntg", x[:, locations.long()], weight.view(len(locations), gsize, -1)).flatten(1)
    return z if bias is None else z + bias


@pytest.fixture
def authors(monkeypatch: pytest.MonkeyPatch) -> Provider:
    package, ops, optimizer = (ModuleType(name) for name in ("shared_ffi", "shared_ffi.ops", "shared_ffi.optim_sr"))
    package.__spec__ = importlib.machinery.ModuleSpec("shared_ffi", None)
    package.ops, ops.group_ffi_mul, optimizer.SRSgd = ops, group_ffi_mul, FakeSGD  # type: ignore[attr-defined]
    for module in (package, ops, optimizer):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    found = dataclasses.replace(PROVIDERS["haste_authors"], missing=lambda: "")
    monkeypatch.setitem(PROVIDERS, "haste_authors", found)
    return found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_authors_package_is_gated_and_measured_where_it_is_there(authors: Provider, dtype: str) -> None:
    for topic in authors.build:
        for momentum, bias in ((dtype, True), ("none", False)):
            one = dataclasses.replace(case(topic, dtype, momentum, bias), fan_in=16)
            checks = check_small("haste_authors", authors, one, CPU)
            assert checks
            assert [check for check in checks if check.red] == []


def test_a_shape_that_the_authors_do_not_support_is_left_out(authors: Provider, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(f"{TINY} --what tail --group 128 --labels 256 --fan-in 16") == 0
    assert "not supported" in " ".join(capsys.readouterr().out.split())
