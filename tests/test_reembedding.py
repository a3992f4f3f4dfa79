"""rewire.grow=embeddings: features and weights of the tail from label embeddings of the encoder as it is by then, on any ranks."""

import copy
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from test_basis import with_basis
from test_centroids import WIDTH
from tiny import check_resumed_and_shared, make_prepared, read_losses, run_ranks, train_all

from haste_dist import reembedding
from haste_dist.classifier import Classifier
from haste_dist.config import Config, RewireConfig, load_config
from haste_dist.engine import EncoderEngine
from haste_dist.live_bytes import LiveBytes
from haste_dist.loader import open_texts
from haste_dist.model import make_classifier, make_encoder, open_prepared
from haste_dist.reembedding import reembed
from haste_dist.rewire import share_due
from haste_dist.runlog import read_events
from haste_dist.sharding import label_shard
from haste_dist.train import train
from haste_dist.world import World, join_world

GROW = ["rewire.grow=embeddings", "rewire.until=1", "rewire.fraction=0.6"]


def parts(config: Config, world: World) -> tuple:
    """What a run has before its first step."""
    torch.manual_seed(0)
    prepared = open_prepared(config)
    engine = EncoderEngine(make_encoder(config, prepared.manifest), config.encoder, world)
    return prepared, engine, make_classifier(config, prepared.order, engine.width, world)


def label_embeddings(config: Config, prepared, engine: EncoderEngine) -> np.ndarray:
    """(L, D) float64 by loops: the mean of a label's texts, each of length 1, brought to length 1; zero for a label without one."""
    texts = open_texts(prepared.folder, prepared.manifest, "train", config.data.dev_fraction, config.run.seed)
    sums_LD = np.zeros((prepared.order.labels, engine.width))
    for row in range(len(texts)):
        tokens, _ = texts.tokens(np.array([row]))
        x_D = engine.embed(torch.from_numpy(tokens.astype(np.int64))[None], None)[0].double().numpy()
        for label in texts.labels(np.array([row]))[0]:
            sums_LD[label] += x_D / np.linalg.norm(x_D)
    length_L1 = np.linalg.norm(sums_LD, axis=1, keepdims=True)
    return sums_LD / np.where(length_L1 > 0, length_L1, 1)


@pytest.mark.parametrize(("basis", "head"), [(False, False), (True, False), (False, True), (True, True)])
def test_features_and_weights_are_those_of_the_definition(tmp_path: Path, basis: bool, head: bool) -> None:
    words = [
        *GROW,
        "output.momentum=0.5",
        f"rewire.head={head}",
        *([] if basis else ["output.tail_features=[4,28]", "output.head_features=[2,30]"]),
    ]
    config = with_basis(tmp_path, *words) if basis else make_prepared(tmp_path, overrides=words)
    world = join_world("cpu")
    prepared, engine, classifier = parts(config, world)
    order, tail, share = prepared.order, classifier.tail, 0.6
    for state in (tail, classifier.head):
        state.momentum.normal_()
    old_head, old_head_momentum = classifier.head.weight.double().numpy().copy(), classifier.head.momentum.double().numpy().copy()
    old_weight, old_index, old_momentum = (t.double().numpy().copy() for t in (tail.weight, tail.index, tail.momentum))
    done = reembed(config, prepared, engine, classifier, world, share)

    v_LD = label_embeddings(config, prepared, engine)
    label_of = order.label_of_row[order.head_rows :][: tail.weight.shape[0] * 16].reshape(-1, 16)
    told_TG = (label_of >= 0) & (np.abs(v_LD[np.maximum(label_of, 0)]).sum(2) > 0)
    of_head = order.label_of_row[: order.head_rows]
    mean_D = v_LD[np.concatenate([label_of[told_TG], of_head if head else of_head[:0]])].mean(0)
    assert np.abs(v_LD[of_head]).sum(1).all()
    turn = classifier.basis.double().numpy() if basis else np.eye(engine.width)[:, 4:28]
    untold = new = 0
    for group, labels in enumerate(label_of):
        v_GM = np.where(told_TG[group][:, None], v_LD[np.maximum(labels, 0)] - mean_D, 0) @ turn
        chosen = np.sort(np.argsort(-np.square(v_GM).sum(0))[: config.output.fan_in])
        if not told_TG[group].any():
            chosen = old_index[group].astype(int)
        assert tail.index[group].tolist() == chosen.tolist()
        new += len(set(chosen) - set(old_index[group].astype(int)))
        for row in range(16):
            before, momentum = np.zeros((2, turn.shape[1]))
            before[old_index[group].astype(int)], momentum[old_index[group].astype(int)] = old_weight[group, row], old_momentum[group, row]
            expected, moved = before[chosen], momentum[chosen]
            untold += labels[row] >= 0 and not told_TG[group, row]
            if told_TG[group, row]:
                own = v_GM[row, chosen] / np.linalg.norm(v_GM[row, chosen])
                expected, moved = (1 - share) * expected + share * np.linalg.norm(before) * own, (1 - share) * moved
            np.testing.assert_allclose(tail.weight[group, row].numpy(), expected, atol=2e-3)  # embeddings are kept in half precision
            np.testing.assert_allclose(tail.momentum[group, row].numpy(), moved, atol=1e-5)
    own_RD = (v_LD[of_head] - mean_D)[:, slice(None) if basis else slice(2, 30)]
    own_RD *= np.linalg.norm(old_head, axis=1, keepdims=True) / np.linalg.norm(own_RD, axis=1, keepdims=True)
    np.testing.assert_allclose(classifier.head.weight.numpy(), 0.4 * old_head + 0.6 * own_RD if head else old_head, atol=2e-3)
    np.testing.assert_allclose(classifier.head.momentum.numpy(), 0.4 * old_head_momentum if head else old_head_momentum, atol=1e-5)
    assert untold
    assert (label_of < 0).any()  # this problem has labels without a text, and a group that is not full
    assert (done.replaced, done.connections) == (new, tail.index.numel())
    assert 0 < new < done.connections


def test_ranges_change_nothing_and_hold_what_was_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, world = with_basis(tmp_path, *GROW), join_world("cpu")
    found = []
    for numbers in (2**22, 2 * 16 * WIDTH):
        monkeypatch.setattr(reembedding, "NUMBERS", numbers)
        prepared, engine, classifier = parts(config, world)
        reembed(config, prepared, engine, classifier, world, 0.6)
        found.append((classifier.tail.index, classifier.tail.weight))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-5, atol=1e-6)
    with LiveBytes([classifier.basis, *(t for t, _ in classifier.tensors().values())]) as live:
        texts = sp.csr_matrix((np.ones(32, np.float32), (np.arange(32), np.arange(32))), (len(classifier.tail.weight) * 16, 32))
        part = next(reembedding._ranges(texts, torch.randn(32, WIDTH).half(), 32))
        before = live.now
        live.restart()
        reembedding._renew_tail(classifier, part, torch.zeros(WIDTH), 0.5)
    assert 8 * numbers < live.peak - before < 16 * numbers  # as memory.py plans


def test_a_group_without_texts_stays_as_it_is() -> None:
    config = load_config(None, ["output.fan_in=8", "output.group_size=16", "output.head_fraction=0", "output.momentum=0.5"]).output
    classifier = Classifier(config, label_shard(0, 2, 16, 32, 1, 0), WIDTH, 0, torch.device("cpu"))
    tail = classifier.tail
    tail.momentum.normal_()
    old = [t.clone() for t in (tail.index, tail.weight, tail.momentum)]
    v_RD, told_R1 = torch.nn.functional.normalize(torch.randn(32, WIDTH), dim=1), torch.arange(32)[:, None] < 16
    replaced = reembedding._renew_tail(classifier, reembedding.Range(0, 32, v_RD * told_R1, told_R1), torch.zeros(WIDTH), 0.5)
    for before, now in zip(old, (tail.index, tail.weight, tail.momentum), strict=True):
        assert torch.equal(now[1], before[1])
        assert not torch.equal(now[0], before[0])
    assert replaced == len(set(tail.index[0].tolist()) - set(old[0][0].tolist()))


def test_a_label_of_many_texts_has_their_mean() -> None:
    """Of 300,000 texts, whose sum float16 cannot hold; others have three texts and none."""
    torch.manual_seed(0)
    embedded_nD = torch.nn.functional.normalize(torch.randn(300_000, 8) + 1, dim=1).half()
    texts = [np.arange(300_000), np.zeros(0, np.int64), np.array([5, 9, 69_999])]
    places = (np.repeat(np.arange(3), [len(one) for one in texts]), np.concatenate(texts))
    y_Rn = sp.csr_matrix((np.ones(len(places[0]), np.float32), places), (3, 300_000))
    (part,) = reembedding._ranges(y_Rn, embedded_nD, 16)
    assert part.told_R1[:, 0].tolist() == [True, False, True]
    for row, of in enumerate(texts):
        mean_D = embedded_nD[torch.from_numpy(of)].double().sum(0)
        torch.testing.assert_close(part.v_RD[row].double(), torch.nn.functional.normalize(mean_D, dim=0), rtol=0, atol=5e-4)


def test_it_trains_the_same_on_any_ranks_and_resumes(tmp_path: Path) -> None:
    one = make_prepared(tmp_path, overrides=[*GROW, "rewire.head=true", "train.max_steps=16", "rewire.interval=5"])
    plain, replicas = copy.deepcopy(one), copy.deepcopy(one)
    plain.rewire.interval, plain.run.folder = 0, one.run.folder + "-plain"
    replicas.launch.label_parallel, replicas.run.folder = 2, one.run.folder + "-replicas"
    train_all(join_world("cpu"), [one, plain])
    check_resumed_and_shared(one, stop=9)  # between two of them
    stopped = copy.deepcopy(one)
    stopped.run.folder += "-stopped"
    for steps in (10, 16):  # the step after which the tail is made anew is behind the first
        stopped.train.max_steps = steps
        train_all(join_world("cpu"), [stopped])
    assert read_losses(stopped.run.folder) == read_losses(one.run.folder)
    run_ranks(4, train_all, [replicas])
    losses = read_losses(one.run.folder)
    np.testing.assert_allclose(read_losses(replicas.run.folder), losses, rtol=1e-5)
    assert read_losses(plain.run.folder)[:5] == losses[:5]
    assert read_losses(plain.run.folder)[5] != losses[5]
    events = [event for event in read_events(one.run.folder) if event["event"] == "rewire"]
    assert [(event["step"], event["renewed"]) for event in events] == [(5, 0.6), (10, 0.6), (15, 0.6)]
    assert all(0 < event["replaced"] < event["connections"] for event in events)


def test_a_head_alone_embeds_nothing_unless_it_starts_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_prepared(tmp_path, overrides=[*GROW, "train.max_steps=8", "output.head_fraction=1"])
    anew = copy.deepcopy(config)
    config.rewire.head, anew.run.folder = False, config.run.folder + "-anew"
    train(anew, join_world("cpu"))
    monkeypatch.setattr("haste_dist.reembedding.scoring_batches", lambda *_: pytest.fail("texts were embedded"))
    train(config, join_world("cpu"))
    for one in (config, anew):
        assert [event["connections"] for event in read_events(one.run.folder) if event["event"] == "rewire"] == [0]
    assert read_losses(config.run.folder)[:7] == read_losses(anew.run.folder)[:7]
    assert read_losses(config.run.folder)[7] != read_losses(anew.run.folder)[7]


def test_the_share_stays_where_replacing_connections_fades() -> None:
    fading, staying = (RewireConfig(interval=10, until=0.6, fraction=0.5, grow=grow) for grow in ("random", "embeddings"))
    found = {step: share_due(staying, step, 100) for step in range(101)}
    assert {step for step, share in found.items() if share} == {10, 20, 30, 40, 50}
    assert set(found.values()) == {0.0, 0.5}
    assert all(share_due(fading, step, 100) < 0.5 for step in range(1, 101))
    with pytest.raises(Exception, match=r"rewire\.grow"):
        load_config(None, ["rewire.grow=embedings"])
