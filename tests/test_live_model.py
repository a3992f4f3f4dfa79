"""A model that is replaced while it answers: versions never mix, a checkpoint that cannot be read changes nothing."""

import asyncio
import shutil
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import make_prepared

from haste_dist import deployments, live_model
from haste_dist.checkpoint import complete, point, step_of
from haste_dist.config import Config
from haste_dist.export import export
from haste_dist.live_model import LabelPart, LiveModel, asked_for, batch_sizes, compile_kernels, merged, text_lengths
from haste_dist.predictor import Predictor
from haste_dist.train import train
from haste_dist.use_config import ServeConfig
from haste_dist.world import join_world
from haste_kernels.encoder_ops import LONGEST, tile_tokens

SECONDS = 60
TEXTS = ["w0 w1 w14", "w7 w8 w9 w21", "w3", "w190 w2 w5 w6 w7"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Two checkpoints."""
    words = ["train.max_steps=36", "train.checkpoint_every=12", "train.evaluate_every=0", "checkpoint.keep=5"]
    config = make_prepared(tmp_path_factory.mktemp("run"), labels=101, texts=256, overrides=words)
    train(config, join_world("cpu"))
    return config


@pytest.fixture
def run(trained: Config, tmp_path: Path) -> Path:
    """A copy whose ``best`` is the older one."""
    folder = tmp_path / "run"
    shutil.copytree(trained.run.folder, folder)
    older = complete(folder / "checkpoints")[0]
    point(folder / "checkpoints", "best", step_of(older))
    return folder


async def in_thread(f: Callable[..., Any], *args: Any) -> Any:
    return await asyncio.to_thread(f, *args)


def follow(live: LiveModel, hold: Callable[[list[str]], Awaitable[Any]] | None = None) -> bool:
    async def nobody(versions: list[str]) -> None: ...

    return asyncio.run(live.follow(in_thread, hold or nobody))


def names(run: Path) -> list[str]:
    return [path.name for path in complete(run / "checkpoints")]


def test_a_newer_checkpoint_takes_over(run: Path) -> None:
    older, newer = names(run)[0], names(run)[-1]
    live = LiveModel(run, "best", "cpu")
    assert live.current.files.version == older
    assert not follow(live), "nothing new"
    began = live.current
    point(run / "checkpoints", "best", step_of(Path(newer)))
    assert follow(live)
    assert (live.current.files.version, live.reloads, live.reload_error) == (newer, 1, "")
    for model, version in ((began, older), (live.current, newer)):  # a batch that began with the old one ends with it
        scores, rows = live.topk(model, live.embed(model, TEXTS), 5)
        labels, logits = Predictor(run, version, "cpu").topk(TEXTS, 5)
        assert np.array_equal(model.files.order.label_at(rows), labels)
        np.testing.assert_array_equal(scores, logits)


def test_a_checkpoint_that_is_damaged_or_gone_changes_nothing(run: Path) -> None:
    older, newer = names(run)[0], names(run)[-1]
    live = LiveModel(run, "best", "cpu")
    file = run / "checkpoints" / newer / "encoder.safetensors"
    sound = file.read_bytes()
    file.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    point(run / "checkpoints", "best", step_of(Path(newer)))
    assert not follow(live)
    assert live.current.files.version == older
    assert "damaged" in live.reload_error
    file.write_bytes(sound)
    assert follow(live)
    assert live.reload_error == ""
    shutil.rmtree(run / "checkpoints" / newer)
    assert not follow(live)
    assert "missing" in live.reload_error
    assert live.current.files.version == newer


def test_a_part_that_cannot_follow_keeps_all_on_the_old_version(run: Path) -> None:
    from haste_dist.errors import CheckpointError

    async def hold(versions: list[str]) -> None:
        raise CheckpointError("disk gone")

    live = LiveModel(run, "best", "cpu", parts=2)
    point(run / "checkpoints", "best", step_of(Path(names(run)[-1])))
    assert not follow(live, hold)
    assert (live.current.files.version, live.reload_error) == (names(run)[0], "disk gone")


class Other:
    """A process that shares the labels, as Ray Serve's handles speak of it; its n-th answer to ``hold`` is ``errors[n]``, then none."""

    def __init__(self, *errors: Exception | None):
        self.errors, self.held, self.hold = list(errors), [list[str]()], self

    async def remote(self, versions: list[str]) -> None:
        if self.errors and (error := self.errors.pop(0)) is not None:
            raise error
        self.held.append(versions)


def following(live: LiveModel, *others: Other) -> deployments.Model:
    """The service's process around ``live``; to be made within a loop, in which it looks for a newer checkpoint all the time."""
    model = object.__new__(deployments.Model)
    model.live, model.others, model.settings = live, others, ServeConfig(reload=0.01)  # type: ignore[assignment]
    model.one_at_a_time = asyncio.Lock()
    model.following = asyncio.get_running_loop().create_task(model._follow())
    return model


async def until(model: deployments.Model, done: Callable[[], bool]) -> None:
    end = time.monotonic() + SECONDS
    while not done():
        assert model.following is not None
        assert not model.following.done(), "follows no more"
        assert time.monotonic() < end, model.live.reload_error
        await asyncio.sleep(0.01)


def test_a_reload_that_finds_no_memory_is_told_and_the_next_checkpoint_tried(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older, newer = names(run)[0], names(run)[-1]
    live = LiveModel(run, "best", "cpu")
    load, full = live.load, [True]

    def load_where_there_is_room(version: str) -> Any:
        if full[0]:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        return load(version)

    async def serve() -> None:
        model = following(live)
        point(run / "checkpoints", "best", step_of(Path(newer)))
        await until(model, lambda: live.reload_error != "")
        told = f"{run}: no newer checkpoint could take over (OutOfMemoryError: CUDA out of memory.); the model that answers stays"
        assert (await model.state())["reload_error"].startswith(told)
        assert live.current.files.version == older
        full[0] = False
        await until(model, lambda: live.reloads == 1)
        assert (live.current.files.version, live.reload_error) == (newer, "")
        assert model.following is not None
        model.following.cancel()
        with pytest.raises(asyncio.CancelledError):
            await model.following

    monkeypatch.setattr(live, "load", load_where_there_is_room)
    asyncio.run(serve())


def test_a_part_that_dies_while_it_lets_go_is_told_and_asked_again(run: Path) -> None:
    """Ray wraps what another process raised in a text of many lines."""
    from ray.exceptions import RayTaskError

    older, newer = names(run)[0], names(run)[-1]
    wrapped = RayTaskError("hold", "Traceback\n  lines", RuntimeError("no such device")).as_instanceof_cause()
    live, other = LiveModel(run, "best", "cpu"), Other(None, OSError("the part died"), wrapped)
    told: list[str] = []

    async def serve() -> None:
        model = following(live, other)
        point(run / "checkpoints", "best", step_of(Path(newer)))
        await until(model, lambda: told.append(live.reload_error) or len(other.held) == 3)  # type: ignore[func-returns-value]
        await until(model, lambda: live.reload_error == "")
        assert model.following is not None
        model.following.cancel()

    asyncio.run(serve())
    assert other.held[1:] == [[older, newer], [newer]]
    assert (live.current.files.version, live.reloads) == (newer, 1)
    said = {line.split("; ")[0] for line in told if line}
    why = "an older checkpoint could not be let go of"
    assert said == {f"{run}: {why} (OSError: the part died)", f"{run}: {why} (RuntimeError: no such device)"}


@pytest.mark.parametrize("parts", [2, 3])
def test_parts_answer_as_one_by_version(run: Path, parts: int) -> None:
    older, newer = names(run)[0], names(run)[-1]
    live = LiveModel(run, older, "cpu", parts)
    others = [LabelPart(run, part, parts, "cpu") for part in range(1, parts)]
    for version in (older, newer):
        model = live.load(version)
        x_ND = live.embed(model, TEXTS)
        found = merged([live.topk(model, x_ND, 20), *(other.topk(version, x_ND.numpy(), 20) for other in others)], 20)
        labels, logits = Predictor(run, version, "cpu").topk(TEXTS, 20)
        assert np.array_equal(model.files.order.label_at(found[1]), labels)
        np.testing.assert_array_equal(found[0], logits)
    for other in others:
        assert set(other._held) == {older, newer}
        other.hold([newer])
        assert set(other._held) == {newer}


def test_the_services_processes_load_before_anybody_asks(run: Path) -> None:
    part = deployments.Part(str(run), "best", "cpu", torch.get_num_threads(), ServeConfig(parts=2), 1)
    assert set(part.labels._held) == {names(run)[0]}


def test_answers_go_to_those_who_asked(run: Path) -> None:
    live = LiveModel(run, "last", "cpu")
    model = live.current
    found = live.topk(model, live.embed(model, TEXTS), 6)
    [first], [second, third, fourth] = live.answers(model, found, [(1, 2, 0), (3, 6, 3)])
    labels, logits = Predictor(run, "last", "cpu").topk(TEXTS, 6)
    assert [[one["label"] for one in ranked] for ranked in (first, second, third, fourth)] == [
        row[:k].tolist() for row, k in zip(labels, (2, 6, 6, 6), strict=True)
    ]
    assert [one["score"] for one in first] == pytest.approx((1 / (1 + np.exp(-logits[0, :2].astype(float)))).tolist())
    order = model.files.order
    for one in second:
        row = order.row_of_label[one["label"]]
        group = None if row < order.head_rows else (row - order.head_rows) // order.group_size
        assert one["group"] == group
        assert one["neighbours"] == ([] if group is None else model.files.names.of(order.neighbours(one["label"])[:3]))
    assert {len(one["neighbours"]) for one in first} == {0}


def test_few_numbers_of_labels_are_looked_for() -> None:
    assert [asked_for(k) for k in (1, 5, 8, 9, 100, 1000)] == [8, 8, 8, 16, 128, 1024]


@given(st.integers(1, 5000), st.data())
def test_each_batch_finds_its_kernels_compiled(most: int, data: st.DataObject) -> None:
    def compiled_for(n: int) -> tuple[int, bool, bool]:  # tiles go by powers of two; Triton tells 1 and multiples of 16 from the rest
        return max(16, 1 << (n - 1).bit_length()), n % 16 == 0, n == 1

    n = data.draw(st.integers(1, most))
    assert compiled_for(n) in map(compiled_for, batch_sizes(most))
    assert max(batch_sizes(most)) < 2 * most


@given(st.integers(1, 600), st.data())
def test_each_text_finds_its_kernels_compiled(longest: int, data: st.DataObject) -> None:
    """Longer texts than kernels of the encoder's take torch's, which are compiled already."""
    tokens = data.draw(st.integers(1, longest))
    lengths = text_lengths(longest)
    assert max(lengths) == longest
    assert tokens > LONGEST or tile_tokens(tokens) in map(tile_tokens, lengths)


def test_the_encoder_is_warm_for_all_lengths_on_a_gpu_alone(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    live = LiveModel(run, "best", "cpu")
    embed, seen = live.current.embedder.embed, []

    def noted(tokens: Any) -> torch.Tensor:
        seen.append([len(one) for one in tokens.to_pylist()])
        return embed(tokens)

    monkeypatch.setattr(live.current.embedder, "embed", noted)
    monkeypatch.setattr(live_model, "compile_kernels", lambda *_: None)
    live.warm(4)
    assert seen == [[1]]
    monkeypatch.setattr(live.current.labels, "device", torch.device("cuda"))
    seen.clear()
    live.warm(4)
    assert seen == [[tokens] for tokens in text_lengths(live.current.files.config.data.max_length)]


def test_kernels_are_compiled_for_all_batches_on_a_gpu_alone() -> None:
    asked: list[tuple[int, int]] = []

    class Labels:
        width, device = 12, torch.device("cuda")

        def topk(self, x_ND: Any, k: int) -> None:
            asked.append((len(x_ND), k))

    def zeros(*shape: int, **_: Any) -> np.ndarray[Any, Any]:
        return np.zeros(shape)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "zeros", zeros)
        compile_kernels(Labels(), torch.float32, 40)  # type: ignore[arg-type]
    assert asked == [(n, 8) for n in (64, 63, 32, 31, 16, 8, 4, 2, 1)]
    Labels.device = torch.device("cpu")
    compile_kernels(Labels(), torch.float32, 40)  # type: ignore[arg-type]
    assert len(asked) == 9


def test_an_exported_model_has_one_version(run: Path, tmp_path: Path) -> None:
    live = LiveModel(export(run, tmp_path / "out"), "best", "cpu")
    assert live.current.files.version == "exported"
    assert not follow(live)
    assert live.reload_error == ""
