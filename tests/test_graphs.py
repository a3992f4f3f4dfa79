"""Which passes are recorded, and how batches are padded for it; tests/gpu/test_graphs_gpu.py records and replays them."""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import make_prepared

from haste_dist.config import Config, EncoderConfig
from haste_dist.dry_run import EncoderNeeds, _dry_run
from haste_dist.encoder import build_encoder, model_config
from haste_dist.fits import facts_of
from haste_dist.graphs import ACTIVATIONS, LEAST_TOKENS, GraphedModule, can_replay, most_tokens, padded_length
from haste_dist.memory import STEP_PHASES, Facts, memory_plan
from haste_dist.model import make_encoder, open_prepared


@given(st.integers(1, 600), st.integers(0, 600))
def test_batches_are_padded_to_few_lengths_that_the_encoder_has(tokens: int, longest: int) -> None:
    length = padded_length(tokens, longest)
    assert tokens <= length <= max(tokens, longest)
    assert length - tokens < (8 if tokens <= 128 else 32)


def test_few_lengths() -> None:
    assert len({padded_length(tokens, 512) for tokens in range(1, 513)}) == 16 + 12


@pytest.mark.parametrize(
    ("words", "replays"),
    [
        (["encoder.compile=false"], True),
        (["encoder.graphs=false"], False),
        (["encoder.compile=true"], False),
        (["encoder.checkpointing=true"], False),
    ],
)
def test_what_may_not_be_recorded_is_not(tmp_path: Path, words: list[str], replays: bool) -> None:
    config = make_prepared(tmp_path, overrides=["encoder.graphs=true", *words])
    encoder = make_encoder(config, open_prepared(config).manifest)
    assert can_replay(config.encoder, encoder) == replays
    assert most_tokens(config.encoder, encoder) == replays * ACTIVATIONS // 32


@pytest.mark.parametrize(("layers", "width", "most"), [(12, 768, LEAST_TOKENS), (6, 384, 4 * LEAST_TOKENS), (24, 1024, LEAST_TOKENS)])
def test_narrow_encoders_are_recorded_with_more_tokens(layers: int, width: int, most: int) -> None:
    config = EncoderConfig(layers=layers, width=width, heads=width // 64)
    with torch.device("meta"):
        encoder = build_encoder(config, 100, 0, pretrained=False)
    assert most_tokens(config, encoder) == most


def test_a_model_that_asks_the_gpu_is_not_recorded() -> None:
    class Other:
        whole_mask = False

    assert not can_replay(EncoderConfig(), Other())


def test_a_model_that_cannot_be_recorded_is_launched_as_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told once; and full batches, padded ones and passes without a graph are what they are without recording."""
    config = make_prepared(tmp_path)
    encoder = make_encoder(config, open_prepared(config).manifest).train()
    ids = torch.randint(2, 99, (3, 7))
    expected = encoder(ids, None)
    module, tries = GraphedModule(encoder, 64), []

    def refuse(*shape: int) -> None:
        tries.append(shape)
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(module, "_record", refuse)
    torch.testing.assert_close(module(ids, None), expected)
    with torch.no_grad():
        torch.testing.assert_close(module(ids, None), expected)
    assert not tries
    with pytest.warns(UserWarning, match=r"cannot be recorded and are launched as ever.* \(operation not permitted .* capturing\)$"):
        torch.testing.assert_close(module(ids, torch.ones_like(ids)), expected)
    x_BD = module(ids, None)
    torch.testing.assert_close(x_BD, expected)
    assert tries == [(3, 8)]
    x_BD.sum().backward()
    assert module.flat.grad is not None
    assert module.held_bytes() == 0


def test_where_memory_does_not_suffice_smaller_batches_are_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_prepared(tmp_path)
    module = GraphedModule(make_encoder(config, open_prepared(config).manifest).train(), 64)
    tries = []

    def refuse(*shape: int) -> None:
        tries.append(shape)
        try:
            raise torch.OutOfMemoryError("out of memory")
        except RuntimeError:
            raise RuntimeError("not ended")  # noqa: B904  # as leaving a recording does

    monkeypatch.setattr(module, "_record", refuse)
    for rows in (4, 4, 4, 3, 4, 3, 3):
        ids = torch.randint(2, 99, (rows, 8))
        tried = len(tries)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            torch.testing.assert_close(module(ids, None), module.module(ids, None))
        assert ["cannot be recorded in batches of this size" in str(one.message) for one in told] == [True] * (len(tries) - tried)
    assert tries == [(4, 8), (3, 8)]


def test_recorded_passes_are_planned_for(tmp_path: Path) -> None:
    """On a GPU they hold their activations for good, beside those of the first batch of another shape; a larger batch is not recorded, but
    shorter ones may be."""
    most = ACTIVATIONS // 32  # one layer of 32
    sizes = (64, most // 8, most)
    small, large, huge = (make_prepared(tmp_path / str(n), overrides=["encoder.graphs=true", f"train.batch_size={n}"]) for n in sizes)
    off = make_prepared(tmp_path / "off", overrides=["train.batch_size=64", "encoder.graphs=false"])

    def held(config: Config, **facts: Any) -> int:
        return memory_plan(config, Facts(101, 3, 202, **facts)).held.get("recorded passes", 0)

    planned = memory_plan(off, Facts(101, 3, 202))
    assert held(small) >= planned.phases["encoder backward"]["activations"] > 0
    assert memory_plan(small, Facts(101, 3, 202)).phases == planned.phases
    alone = memory_plan(small, Facts(101, 3, 202, one_shape=True))  # the first batch, launched, is over before anything is recorded
    assert alone.held == memory_plan(small, Facts(101, 3, 202)).held
    for name, phase in planned.phases.items():
        activations = phase.get("activations", 0) if name in STEP_PHASES else 0
        assert sum(alone.phases[name].values()) == sum(phase.values()) - activations
    small.train.accumulation, small.train.classifier_step = 2, "global"  # passes without a graph are launched
    assert memory_plan(small, Facts(101, 3, 202, one_shape=True)).phases["encoder forward"]["activations"] > 0
    small.train.accumulation, small.train.classifier_step = 1, "micro"
    assert held(large, varied=True) == pytest.approx(held(small) * most / (64 * large.data.max_length), rel=0.1)
    assert [held(small, device="cpu"), held(off, varied=True), held(large), held(huge, varied=True)] == [0] * 4
    huge.data.label_texts = 1  # as in a study of such a page: whatever texts there may be, there are none
    alone = memory_plan(huge, Facts(101, 3, 202, one_shape=True))
    assert "recorded passes" not in alone.held
    assert alone.phases["encoder backward"]["activations"] > 0
    large.data.label_texts = 1
    assert held(large) == held(large, varied=True)
    large.data.length_buckets = 1  # every batch has a long text
    assert held(large, varied=True) == 0


def test_texts_of_many_lengths_are_known_by_their_mean(tmp_path: Path) -> None:
    manifest = open_prepared(make_prepared(tmp_path)).manifest
    train = manifest.splits["train"]
    for tokens, varied in ((train.rows * manifest.max_length, False), (train.rows * manifest.max_length // 2, True)):
        changed = dataclasses.replace(manifest, splits={"train": dataclasses.replace(train, tokens=tokens)})
        assert facts_of(changed, 2, "cuda") == Facts(manifest.labels, train.max_labels, manifest.tokenizer.vocab_size, 0, 2, "cuda", varied)


@pytest.mark.parametrize(("most_length", "tokens", "padded"), [(512, 130, 160), (512, 100, 104), (131, 130, 131)])
def test_activations_are_planned_for_as_batches_are_padded(
    most_length: int, tokens: int, padded: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("haste_dist.encoder.model_config", lambda one, vocabulary, pad, _: model_config(one, vocabulary, pad, most_length))
    config = EncoderConfig(width=64, heads=2, layers=2)

    def needs(length: int, cuda: bool, **changed: Any) -> EncoderNeeds:
        return _dry_run.__wrapped__(tuple(vars(dataclasses.replace(config, **changed)).items()), 99, 0, 3, length, torch.float32, cuda)

    on_gpu, launched = needs(tokens, True), needs(tokens, True, graphs=False)
    assert (on_gpu.tokens, launched.tokens, needs(tokens, False).tokens) == (padded, tokens, tokens)
    assert on_gpu.backward == needs(padded, True, graphs=False).backward
    assert on_gpu.scoring == launched.scoring
