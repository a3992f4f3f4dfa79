"""The cost model: it finds the coefficients of made-up machines, says its errors, and warns where it guesses."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from haste_dist.cost_model import FEATURES, PARTS, STAGES_OF, CostModel, Load, Network, fit, load_model, load_of, load_of_row
from haste_dist.errors import DataError

ROOT = Path(__file__).resolve().parents[1]
TRUTH = {
    "encoder": {"operations": 2e-15, "constant": 4e-3, "bytes": 3e-12, "hops": 1e-5},
    "gather": {"constant": 2e-5, "bytes": 5e-12, "hops": 1e-5},
    "head": {"products": 1e-14, "weights": 2e-12, "constant": 1e-4},
    "tail": {"products": 1e-15, "gathered": 5e-13, "logits": 8e-13, "state bytes": 3e-13, "constant": 5e-5},
    "scatter": {"constant": 3e-5, "bytes": 5e-12, "hops": 1e-5},
    "optimizer": {"own weights": 1e-11, "weights": 3e-12, "constant": 1e-3, "bytes": 5e-12, "hops": 1e-5},
}
HOST = 2e-3


def row(labels: int, ranks: int, batch: int = 512, fan_in: int = 64, group: int = 32, noise: float = 0.0, seed: int = 0) -> dict[str, Any]:
    """What a made-up machine would measure."""
    made: dict[str, Any] = {
        "labels": labels, "ranks": ranks, "batch": batch, "tokens": 128, "width": 768, "head_rows": labels // 100, "head_width": 768,
        "tail_width": 768, "fan_in": fan_in, "group": group, "device": "made up", "weight_dtype": "auto", "momentum_dtype": "auto",
        "precision": "auto", "encoder_flops": 3.4e13 / ranks, "encoder_parameters": 110_000_000, "frozen": False, "zero": 1,
    }  # fmt: skip
    load = load_of_row(made)
    rng = np.random.default_rng([seed, labels, ranks, batch, fan_in, group])
    total = HOST
    for part in PARTS:
        seconds = sum(TRUTH[part][name] * value for name, value in FEATURES[part](load).items()) * (1 + noise * rng.normal())
        total += seconds
        for i, stage in enumerate(STAGES_OF[part]):
            made[f"{stage}_p50_ms"] = 1e3 * seconds if i == 0 else 0.0
    return {**made, "p50_ms": 1e3 * total}


def study(noise: float = 0.0) -> list[dict[str, Any]]:
    shapes = [(10**6, 512, 64, 32), (10**7, 512, 64, 32), (4 * 10**7, 512, 64, 32), (10**7, 128, 64, 32), (10**7, 512, 32, 32)]
    shapes += [(10**7, 512, 64, 16), (10**7, 512, 64, 64)]
    return [row(labels, ranks, n, f, g, noise) for ranks in (1, 2, 4) for labels, n, f, g in shapes]


def test_an_update_of_several_steps_counts_once() -> None:
    model, load = fit(study()), load_of_row(row(10**7, 2))
    every, fourth = model.predict(load), model.predict(dataclasses.replace(load, updates=0.25))
    assert fourth.parts["optimizer"] == pytest.approx(every.parts["optimizer"] / 4)
    assert every.step - fourth.step == pytest.approx(0.75 * every.parts["optimizer"])


def truth(load: Load) -> float:
    return HOST + sum(TRUTH[part][name] * value for part in PARTS for name, value in FEATURES[part](load).items())


def test_an_exact_machine_is_found_and_predicted_far_out() -> None:
    model = fit(study())
    assert model.errors["fitted"]["most"] < 1e-3
    assert model.errors["left out"]["most"] < 0.02
    assert {"largest ranks left out", "largest labels a rank left out"} <= set(model.errors)
    far = load_of_row(row(10**9, 8))
    assert abs(model.predict(far).step / truth(far) - 1) < 0.02
    assert abs(model.predict(load_of_row(row(10**9, 4, 256))).step / truth(load_of_row(row(10**9, 4, 256))) - 1) < 0.02


def test_noise_of_a_percent_stays_a_few_percent() -> None:
    errors = fit(study(0.01)).errors
    assert errors["left out"]["median"] < 0.02
    assert errors["left out"]["most"] < 0.06


@given(st.integers(10**5, 10**9), st.sampled_from([1, 2, 4, 8]), st.sampled_from([64, 512]))
def test_more_labels_never_take_less_time(labels: int, ranks: int, batch: int) -> None:
    model = fit(study(0.05))
    here, more = (model.predict(load_of_row(row(size, ranks, batch))).step for size in (labels, 2 * labels))
    assert 0 < here <= more


def test_hosts_are_joined_by_the_links_that_were_said() -> None:
    model = fit(study())
    load = load_of_row(row(10**9, 64))
    slow, fast = (model.predict(load, Network(8, gb_s)) for gb_s in (1.0, 1000.0))
    assert slow.step > fast.step
    assert any("1 GB/s a GPU and 10 us a hop are assumed" in note for note in slow.notes)
    within = model.predict(load, Network(64))
    assert not any("assumed" in note for note in within.notes)


def test_replicas_of_the_labels_see_fewer_rows_and_sum_their_gradients() -> None:
    model = fit(study())
    shape: dict[str, Any] = {
        "labels": 10**6, "ranks": 4, "batch": 4096, "tokens": 128, "width": 768, "head_rows": 10**4, "head_width": 768, "tail_width": 768,
        "fan_in": 64, "group": 32, "weight_bytes": 2, "momentum_bytes": 2, "x_bytes": 2, "encoder_flops": 3.4e13, "parameters": 110_000_000,
        "partitioned": True,
    }  # fmt: skip
    every, twice = load_of(**shape), load_of(**shape, label_parallel=2)
    alone = load_of(**{**shape, "ranks": 2, "batch": 2048, "encoder_flops": 1.7e13})
    assert (twice.copies, twice.shards, twice.rows, twice.labels_a_rank) == (2, 2, 2048, 500_000)
    whole, found, half = (model.predict(load) for load in (every, twice, alone))
    for part in ("head", "tail", "gather", "scatter"):
        assert found.parts[part] == half.parts[part]
    values = 5_000 * 768 + twice.tail_rows * 64
    assert abs(found.parts["replicas"] / (2 * (4 * values * 5e-12 / 2 + 1e-5)) - 1) < 0.02
    assert any("the update is left out" in note for note in found.notes)
    assert "replicas" not in whole.parts


def test_what_was_not_measured_is_said() -> None:
    model = fit(study())
    assert model.predict(load_of_row(row(10**7, 2))).notes == ()
    notes = model.predict(dataclasses.replace(load_of_row(row(10**9, 8)), fan_in=256)).notes
    assert any(note.startswith("ranks 8: extrapolated (measured: 1 to 4)") for note in notes)
    assert any(note.startswith("fan in 256: not measured, so this may be far off") for note in notes)
    alone = fit([one for one in study() if one["ranks"] == 1])
    assert any("what they exchange within a host counts nothing" in note for note in alone.predict(load_of_row(row(10**7, 2))).notes)


def test_a_model_is_read_back_and_a_damaged_one_is_told(tmp_path: Path) -> None:
    model = fit(study(), {"commit": "abc"})
    model.save(tmp_path / "m.json")
    assert load_model(tmp_path / "m.json") == model
    assert json.loads((tmp_path / "m.json").read_text())["assumptions"]
    (tmp_path / "m.json").write_text('{"schema_version": 1}')
    with pytest.raises(DataError, match="no cost model"):
        load_model(tmp_path / "m.json")
    with pytest.raises(DataError, match="haste scale writes one"):
        load_model(tmp_path / "none.json")
    with pytest.raises(ValueError, match="a fit needs 4"):
        fit(study()[:3])


def test_the_tails_terms_are_those_of_the_measured_kernel() -> None:
    """Three group sizes of one kernel on an H100, of which the third is predicted by the other two."""
    lines = [json.loads(line) for line in (ROOT / "benchmarks/records/tail_step.jsonl").read_text().splitlines()]
    shape = {"L": 655_360, "N": 512, "D": 768, "F": 64}
    ours = [line for line in lines if line["provider"] == "haste_dist" and shape.items() <= line["shape"].items()]
    ours = [line for line in ours if line.get("dtype") == "bfloat16"]
    latest = {line["shape"]["G"]: line["p50_ms"] / 1e3 for line in ours}
    if set(latest) < {16, 32, 64}:
        pytest.skip("no such records")

    def tail(group: int) -> dict[str, float]:
        load = load_of(
            labels=655_360, ranks=1, batch=512, tokens=1, width=768, head_rows=0, head_width=768, tail_width=768, fan_in=64, group=group,
            weight_bytes=2, momentum_bytes=2, x_bytes=2, encoder_flops=0.0, parameters=0, partitioned=True,
        )  # fmt: skip
        return FEATURES["tail"](load)

    # With N, F and L fixed, the terms are one part that G divides and one that it does not.
    a = np.array([[tail(group)["gathered"], tail(group)["logits"]] for group in (16, 64)])
    each = np.linalg.solve(a, [latest[16], latest[64]])
    predicted = float(each @ [tail(32)["gathered"], tail(32)["logits"]])
    assert abs(predicted / latest[32] - 1) < 0.1


def test_a_model_is_plain_data() -> None:
    assert CostModel(**dataclasses.asdict(fit(study()))) == fit(study())
