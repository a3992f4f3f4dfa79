"""Learning rate and rewiring over a run."""

import hypothesis.strategies as st
import pytest
from hypothesis import given

from haste_dist.config import load_config
from haste_dist.schedule import due, plan_steps, rewire_fraction, warmup_cosine


@given(st.integers(1, 5000), st.floats(0, 0.9))
def test_learning_rate_rises_then_falls_and_stays_in_range(total: int, warmup: float) -> None:
    factors = [warmup_cosine(step, total, warmup) for step in range(total + 1)]
    top = factors.index(max(factors))
    assert all(0 <= f <= 1 for f in factors)
    assert factors[: top + 1] == sorted(factors[: top + 1])
    assert factors[top:] == sorted(factors[top:], reverse=True)
    assert factors[0] > 0
    assert factors[-1] == pytest.approx(0, abs=1e-9)
    for step, factor in enumerate(factors):  # a warm-up starts from 0 all the same
        assert warmup_cosine(step, total, warmup, 0.3) == (factor if step < warmup * total else max(0.3, factor))


def test_learning_rate_at_known_places() -> None:
    assert warmup_cosine(0, 100, 0.0) == 1
    assert warmup_cosine(50, 100, 0.0) == pytest.approx(0.5)
    assert warmup_cosine(9, 100, 0.1) == pytest.approx(10 / 11)


def test_rewiring_falls_on_intervals_until_its_end_and_decays() -> None:
    fractions = {step: rewire_fraction(step, 100, 10, 0.66, 0.25) for step in range(101)}
    assert [step for step, f in fractions.items() if f] == [10, 20, 30, 40, 50, 60]
    assert list(filter(None, fractions.values())) == sorted(filter(None, fractions.values()), reverse=True)
    assert fractions[10] < 0.25
    assert not any(rewire_fraction(step, 100, 0, 0.66, 0.25) for step in range(100))


def test_due_never_at_the_start_or_without_an_interval() -> None:
    assert [step for step in range(10) if due(step, 3)] == [3, 6, 9]
    assert not any(due(step, 0) for step in range(10))


@given(st.integers(1, 400), st.integers(1, 7), st.floats(0.1, 9), st.floats(0, 3), st.integers(0, 300))
def test_every_interval_ends_an_encoder_update(per_epoch: int, whole: int, epochs: float, every: float, most: int) -> None:
    words = [f"train.accumulation={whole}", f"train.epochs={epochs}", f"train.evaluate_every={every}", f"train.max_steps={most}"]
    plan = plan_steps(load_config(None, words), per_epoch)
    assert all(steps % whole == 0 for steps in (plan.total, plan.last, plan.evaluate, plan.checkpoint))
    assert 0 < plan.last <= plan.total
    assert plan.total >= epochs * per_epoch - 1e-3
    assert (plan.evaluate > 0) == (every > 0)
