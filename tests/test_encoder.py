"""The encoder's settings: what should change nothing changes nothing, and adapters train, resume and predict."""

import copy
import dataclasses
import functools
import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import check_resumed_and_shared, make_prepared, read_losses, train_all
from transformers import AutoConfig, AutoModel

from haste_dist import encoder, hub
from haste_dist.config import EncoderConfig, load_config
from haste_dist.encoder import WHOLE_MASK, Encoder, build_encoder, compile_blocks, load_tokenizer, model_config
from haste_dist.errors import ConfigError, HasteError
from haste_dist.flat import FlatModule
from haste_dist.manifest import Manifest, TokenizerRecord
from haste_dist.model import check_features, make_encoder, open_prepared
from haste_dist.train import train
from haste_dist.world import join_world

STEPS = "train.max_steps=12"


def test_deepspeed_says_nothing_where_answers_go() -> None:
    program = "import haste_dist.encoder, deepspeed; deepspeed.accelerator.get_accelerator(); print('an answer')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "an answer\n"


def test_checkpointing_and_compiling_change_no_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With dropout, whose masks must come back in the backward pass."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))  # without the minute of C++
    plain = make_prepared(tmp_path, overrides=[STEPS, "encoder.dropout=0.1"])
    compiled = make_prepared(tmp_path / "compiled", overrides=[STEPS, "encoder.compile=true", "encoder.dropout=0"])
    checkpointed, reference = copy.deepcopy(plain), copy.deepcopy(compiled)
    checkpointed.encoder.checkpointing, reference.encoder.compile = True, False
    for config in (checkpointed, reference):
        config.run.folder += "-other"
    train_all(join_world("cpu"), [plain, checkpointed, compiled, reference])
    assert read_losses(checkpointed.run.folder) == read_losses(plain.run.folder)
    np.testing.assert_allclose(read_losses(compiled.run.folder), read_losses(reference.run.folder), rtol=1e-5)


@pytest.mark.parametrize("family", ["bert", "mpnet"])
def test_blocks_of_one_kind_are_compiled_once(family: str) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    encoder = Encoder(tiny_model(family, layers=4)).train()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
        compile_blocks(encoder)
    flat = FlatModule(encoder)
    for tokens in (8, 16, 24, 32, 8):
        ids = torch.randint(5, 99, (3, tokens))
        flat(ids, torch.ones_like(ids)).sum().backward()
    assert counter.frame_count == 2  # the first shape, then all others
    assert not torch._dynamo.utils.counters["graph_break"]


def tiny_model(family: str, layers: int = 2) -> torch.nn.Module:
    sizes = {"hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": 64}
    if family == "distilbert":
        sizes = {"dim": 32, "n_layers": layers, "n_heads": 2, "hidden_dim": 64}
    if family in ("electra", "albert"):
        sizes["embedding_size"] = 32
    torch.manual_seed(0)
    return AutoModel.from_config(AutoConfig.for_model(family, **sizes, vocab_size=100, pad_token_id=0)).eval()


@pytest.mark.parametrize("family", [*WHOLE_MASK, "mpnet", "deberta-v2"])
def test_a_whole_mask_hides_what_a_mask_of_texts_hides(family: str) -> None:
    """Where a family cannot take it, or has attention of its own as deberta-v2 has, it is not made."""
    encoder = Encoder(tiny_model(family))
    assert encoder.whole_mask == (family != "deberta-v2")
    ids = torch.randint(5, 99, (3, 7))
    mask = torch.ones_like(ids)
    mask[0, 4:] = mask[1, 6:] = 0
    with torch.no_grad():
        x_BD = encoder(ids, mask)
        encoder.whole_mask = False
        assert torch.equal(x_BD, encoder(ids, mask))
        torch.testing.assert_close(x_BD[:1], encoder(ids[:1, :4], mask[:1, :4]))


def test_a_model_without_sdpa_is_built(tmp_path: Path) -> None:
    tiny_model("mpnet").save_pretrained(tmp_path)
    config = EncoderConfig(name=str(tmp_path))
    assert build_encoder(config, 100, 0, 64).width == 32


@pytest.mark.parametrize("hidden", [False, True])
def test_mpnet_through_fused_attention_is_what_transformers_has(hidden: bool) -> None:
    """Embeddings, and gradients of all weights, those of the distances' biases among them."""
    plain = tiny_model("mpnet").double()
    with torch.no_grad():
        plain.encoder.relative_attention_bias.weight.normal_()
    encoder = Encoder(copy.deepcopy(plain))
    assert [name for name, _ in plain.named_parameters()] == [name for name, _ in encoder.model.named_parameters()]
    assert encoder.model.state_dict().keys() == plain.state_dict().keys()
    ids = torch.randint(5, 99, (3, 150))  # farther apart than buckets of their own reach
    mask = torch.ones_like(ids)
    if hidden:
        mask[0, 4:] = mask[1, 140:] = 0
    keep_BS1 = mask.unsqueeze(-1)
    expected = (plain(input_ids=ids, attention_mask=mask).last_hidden_state * keep_BS1).sum(1) / keep_BS1.sum(1)
    for given in (mask,) if hidden else (mask, None):
        x_BD = encoder(ids, given)
        torch.testing.assert_close(x_BD, expected)
    given_BD = torch.randn(3, 32).double()
    expected.backward(given_BD)
    x_BD.backward(given_BD)
    for (name, one), other in zip(plain.named_parameters(), encoder.model.parameters(), strict=True):
        if not name.startswith("pooler"):
            torch.testing.assert_close(other.grad, one.grad, msg=lambda text, name=name: f"{name}: {text}")
    trained_K = plain.encoder.relative_attention_bias.weight.grad.abs().amin(1) > 0
    assert trained_K.sum() == 31  # no distance has the bucket of 0 tokens to the right
    dropouts = [part for part in encoder.train().modules() if isinstance(part, torch.nn.Dropout)]
    for part in dropouts:
        part.p = 0.0
    torch.testing.assert_close(encoder(ids, mask), expected)
    encoder.model.encoder.layer[0].attention.attn.dropout.p = 0.5
    assert not torch.equal(encoder(ids, mask), encoder(ids, mask))


def test_mpnet_makes_activations_again(tmp_path: Path) -> None:
    """With dropout; the layers' run in the backward pass is counted."""
    tiny_model("mpnet").save_pretrained(tmp_path)
    ids, runs, gradients = torch.randint(5, 99, (3, 20)), [], []
    for checkpointing in (False, True):
        encoder = build_encoder(EncoderConfig(name=str(tmp_path), checkpointing=checkpointing), 100, 1, 64).train()
        attention: Any = encoder.model.encoder.layer[0].attention.attn
        runs.append(0)
        attention.register_forward_hook(lambda *_: runs.append(runs.pop() + 1))
        torch.manual_seed(1)
        encoder(ids, torch.ones_like(ids)).square().sum().backward()
        gradients.append([p.grad for p in encoder.parameters()])
    assert runs == [1, 2]
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(other, one)


def test_models_that_cannot_be_had_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"^encoder '\./no/such': there is no such folder$"):
        build_encoder(EncoderConfig(name="./no/such"), 100, 0)

    def unreachable(*_: object, **__: object) -> None:
        raise OSError("We couldn't connect to the hub.\nCheck it.")

    monkeypatch.setattr(AutoConfig, "from_pretrained", unreachable)
    advice = r"\(We couldn't connect to the hub\); where .* reached, name a folder that has its files; there is no such folder here$"
    with pytest.raises(ConfigError, match=advice):
        build_encoder(EncoderConfig(name="a/b"), 100, 0)


def test_a_tokenizer_that_knows_more_than_the_model_is_told(tmp_path: Path) -> None:
    page = make_prepared(tmp_path)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    AutoModel.from_config(AutoConfig.for_model("bert", vocab_size=50, **sizes)).save_pretrained(tmp_path / "model")
    page.encoder.name = str(tmp_path / "model")
    with pytest.raises(ConfigError, match=r"knows 50 tokens, the tokenizer of its texts has 202; set encoder\.tokenizer"):
        make_encoder(page, open_prepared(page).manifest)


@pytest.mark.parametrize(("family", "longest"), [("bert", 64), ("roberta", 62), ("mpnet", 62), ("distilbert", 64)])
def test_the_longest_text_is_known_by_family(tmp_path: Path, family: str, longest: int) -> None:
    """Some leave out the places up to the padding's id. The longest that is taken is embedded, one more is refused."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 64}
    made = AutoConfig.for_model(family, vocab_size=50, **sizes)
    AutoModel.from_config(made).save_pretrained(tmp_path)
    config = EncoderConfig(name=str(tmp_path))
    ids = torch.randint(3, 50, (2, longest))
    assert build_encoder(config, 50, made.pad_token_id, longest).eval()(ids, torch.ones_like(ids)).shape == (2, 32)
    with pytest.raises(ConfigError, match=f"^data.max_length={longest + 1}: '.*' takes at most {longest} tokens$"):
        build_encoder(config, 50, made.pad_token_id, longest + 1)


def test_a_model_without_a_table_of_words_takes_any_tokenizer(tmp_path: Path) -> None:
    AutoConfig.for_model("canine", hidden_size=32, num_hidden_layers=1, num_attention_heads=2).save_pretrained(tmp_path)
    made = model_config(EncoderConfig(name=str(tmp_path)), 999_999, 0, 64)
    assert not hasattr(made, "vocab_size")
    assert made.hidden_size == 32


def test_folders_that_are_no_model_are_told(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 50}
    for family in ("bert", "distilbert"):
        AutoModel.from_config(AutoConfig.for_model(family, **sizes)).save_pretrained(tmp_path / family)
    model = tmp_path / "bert"
    config = EncoderConfig(name=str(model))

    def refusal(**changed: Any) -> str:
        with pytest.raises(ConfigError) as refused:
            build_encoder(dataclasses.replace(config, **changed), 50, 0)
        return str(refused.value).replace(str(tmp_path), "")

    assert refusal(layers=2) == "encoder.layers=2: '/bert' has 1"
    assert refusal(name=str(tmp_path)).startswith("encoder.name: cannot load ''")
    for name in ("", "scratch"):
        with pytest.raises(ConfigError, match=r"^encoder\.name is empty; name a model|^encoder\.name=scratch has no tokenizer"):
            load_tokenizer(EncoderConfig(name=name))
    with pytest.raises(ConfigError, match=r"^encoder\.tokenizer: '.*/bert' has no words; its tokenizer\.json or vocabulary is missing$"):
        load_tokenizer(config)
    weights, page = (model / "model.safetensors").read_bytes(), json.loads((model / "config.json").read_text())
    (model / "model.safetensors").write_bytes((tmp_path / "distilbert/model.safetensors").read_bytes())
    message = refusal()
    assert message.startswith("encoder.name: '/bert' has no weights for '")
    assert message.endswith(" more; are its config.json and its weights of one model?")
    (model / "model.safetensors").write_bytes(weights[:-100])
    assert refusal().startswith("encoder.name: cannot load '/bert' (Error while deserializing header")
    (model / "model.safetensors").write_bytes(weights)
    (model / "config.json").write_text(json.dumps(page | {"intermediate_size": 48}))
    assert refusal() == "encoder.name: weights of '/bert' have other shapes than its config.json says"
    (model / "config.json").write_text("[]")
    assert refusal().startswith("encoder.name: cannot load '/bert' (")
    AutoConfig.for_model("t5", d_model=32, d_ff=64, num_layers=1, num_heads=2, vocab_size=50).save_pretrained(model)
    assert refusal() == "encoder.name: '/bert' (t5) has a decoder as well; name an encoder alone"


def test_attention_kernels_that_are_missing_are_told(tmp_path: Path) -> None:
    config = make_prepared(tmp_path, overrides=["encoder.attention=flash"])
    with pytest.raises(ConfigError, match="flash-attn or a GPU for it is missing"):
        train(config, join_world("cpu"))


@pytest.mark.parametrize(
    ("answers", "proxies", "offline"), [(True, {}, False), (False, {}, True), (False, {"https": "http://127.0.0.1:1"}, False)]
)
def test_a_hub_that_does_not_answer_is_asked_once(
    answers: bool, proxies: dict[str, str], offline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        if not answers:
            server.close()
        port = server.getsockname()[1] if answers else 1  # nobody listens there
        monkeypatch.setattr(hub.constants, "ENDPOINT", f"http://127.0.0.1:{port}")
        monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub.urllib.request, "getproxies", lambda: proxies)
        hub.go_offline_if_unreachable.__wrapped__()
        assert hub.constants.HF_HUB_OFFLINE is offline


def test_a_folder_is_not_looked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(encoder, "go_offline_if_unreachable", lambda: asked.append(1))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    assert [encoder.resolve_name(name) for name in ("model", "bert-base-uncased")] == ["model", "bert-base-uncased"]
    assert asked == [1]


def test_adapters_that_cannot_be_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"encoder.lora_rank=4: encoder.frozen=true trains nothing"):
        load_config(None, ["encoder.lora_rank=4", "encoder.frozen=true"])
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ConfigError, match=r"pip install 'haste-dist\[lora\]'"):
        train(make_prepared(tmp_path, overrides=["encoder.lora_rank=4"]), join_world("cpu"))


def test_a_projection_is_a_linear_layer_behind_pooling() -> None:
    torch.manual_seed(0)
    model, ids = tiny_model("bert"), torch.randint(5, 99, (3, 7))
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    plain, encoder = Encoder(model), Encoder(model, normalize=True, project=8)
    assert (plain.width, encoder.width) == (32, 8)
    assert encoder.project is not None
    weight = encoder.project.weight
    torch.testing.assert_close(weight @ weight.T, torch.eye(8), rtol=0, atol=1e-5)
    x_BD = encoder(ids, mask)
    torch.testing.assert_close(x_BD, torch.nn.functional.normalize(plain(ids, mask) @ weight.T, dim=-1))
    double = Encoder(tiny_model("bert"), project=8).double()
    assert double.project is not None
    given, pooled = torch.randn(3, 8).double(), Encoder(double.model)(ids, mask)
    double(ids, mask).backward(given)
    torch.testing.assert_close(double.project.weight.grad, given.T @ pooled)  # and the model's gradient goes through it
    first = next(double.model.parameters())
    (expected,) = torch.autograd.grad(pooled, first, given @ double.project.weight.detach())
    torch.testing.assert_close(first.grad, expected)


def test_a_projection_that_cannot_be_is_told() -> None:
    for word, says in (("encoder.frozen=true", "would leave it as it was drawn"), ("output.start=centroids", "are not projected")):
        with pytest.raises(ConfigError, match=says):
            load_config(None, ["encoder.project=16", word])
    config = load_config(None, ["encoder.project=16", "encoder.tokenizer=x"])
    with pytest.raises(ConfigError, match=r"output.fan_in=64 is larger than the 16 features"):
        check_features(config, Manifest({}, 5, 16, TokenizerRecord("x", "", 0, 100), {}))


@pytest.mark.slow
def test_a_projection_trains_resumes_and_predicts(tmp_path: Path, warm_python: str) -> None:
    """On one rank and on two, through a checkpoint and an exported folder."""
    from haste_dist.export import export
    from haste_dist.predictor import Predictor
    from haste_dist.verify import verify

    words = ["train.max_steps=24", "encoder.project=12", "output.head_fraction=1", "encoder.zero=1"]
    one = make_prepared(tmp_path, overrides=words)
    train(one, join_world("cpu"))
    check_resumed_and_shared(one, stop=10)
    last = Path(one.run.folder) / "checkpoints" / "step-00000024"
    weight, moment = (load_file(last / f"{name}.safetensors") for name in ("encoder", "optimizer"))
    assert weight["project.weight"].shape == (12, 32)
    assert moment["exp_avg.project.weight"].any()
    assert not torch.allclose(weight["project.weight"] @ weight["project.weight"].T, torch.eye(12), atol=1e-3)  # it has moved
    assert len(verify(one.run.folder)) > 5

    texts = ["w0 w1 w14", "w7 w8 w9 w21", "w3"]
    out = export(one.run.folder, tmp_path / "out", "last")
    ids, scores = Predictor(one.run.folder, "last", "cpu").topk(texts, 5)
    for found, expected in zip(Predictor(out, device="cpu").topk(texts, 5), (ids, scores), strict=True):
        assert np.array_equal(found, expected)
    plain = subprocess.run([warm_python, str(out / "predict.py"), *texts], capture_output=True, text=True, check=True)
    lines = [line.split() for line in plain.stdout.splitlines() if line.startswith("  ")]
    assert [int(line[1]) for line in lines] == ids.ravel().tolist()
    data = (out / "encoder/projection.safetensors").read_bytes()
    (out / "encoder/projection.safetensors").write_bytes(data[:-1] + b"\x01")
    with pytest.raises(HasteError, match=r"projection.safetensors: damaged"):
        Predictor(out, device="cpu")


@pytest.mark.slow
def test_adapters_train_resume_and_predict(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from haste_dist.predictor import Predictor

    one = make_prepared(tmp_path, overrides=["train.max_steps=24", "encoder.lora_rank=4", "encoder.lr=1e-3", "encoder.zero=1"])
    train(one, join_world("cpu"))
    check_resumed_and_shared(one, stop=10)

    folder = Path(one.run.folder) / "checkpoints"
    saved = load_file(folder / f"step-{json.loads((folder / 'best.json').read_text())['step']:08d}" / "encoder.safetensors")
    adapters = {name for name in saved if "lora_" in name}
    assert len(adapters) == 2 * 6  # A and B of the six linear layers of its one block
    assert all(saved[name].any() for name in adapters)
    moments = load_file(folder / "step-00000024" / "optimizer.safetensors")
    assert {name.partition(".")[2] for name in moments if name != "step"} == adapters
    texts = ["w0 w1", "w7 w8 w9"]
    expected = Predictor(one.run.folder, device="cpu").topk(texts, k=5)
    for name in adapters:  # B starts at zero: without adapters the answers are others
        saved[name].zero_()
    predictor = Predictor(one.run.folder, device="cpu")
    predictor.embedder.engine.load_state(saved, {})
    assert not np.allclose(predictor.topk(texts, k=5)[1], expected[1])
