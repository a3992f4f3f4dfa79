"""An exported run predicts as the run does, with this package and without it, and is refused once damaged."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_checkpoint import classifier
from tiny import haste, make_prepared
from transformers import AutoConfig, AutoModel, AutoTokenizer

from haste_dist import calibration
from haste_dist.checkpoint import rows_file
from haste_dist.config import Config, LaunchConfig, load_config, save_config
from haste_dist.dense import dense_layer
from haste_dist.errors import CheckpointError, HasteError
from haste_dist.export import _joined, export
from haste_dist.predictor import ModelFiles, Predictor
from haste_dist.sealed import seal
from haste_dist.tensor_file import write_tensors
from haste_dist.train import train
from haste_dist.verify import seal_run, verify
from haste_dist.world import join_world
from haste_launch import cli

TEXTS = ["w0 w1 w14", "w7 w8 w9 w21", "w3", "w190 w2 w5 w6 w7"]


ENCODERS = [{"pooling": "mean", "normalize": False}, {"pooling": "cls", "normalize": True}]
STORED = {"bfloat16": "BF16", "float8": "F8_E4M3"}  # of the weights, in the first and in the second


TRAINED = list(zip(ENCODERS, STORED, strict=True))


@pytest.fixture(scope="module", params=TRAINED, ids=["mean", "cls"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Labels that do not fill their last group, slices for head and tail."""
    encoder, weight = request.param
    words = ["output.head_features=[0,24]", "output.tail_features=[8,32]", f"output.weight_dtype={weight}", "train.max_steps=24"]
    words += [f"encoder.{name}={value}" for name, value in encoder.items()]
    config = make_prepared(tmp_path_factory.mktemp("run"), labels=101, texts=256, overrides=words)
    train(config, join_world("cpu"))
    return config


def test_an_exported_run_predicts_as_the_run_does(trained: Config, tmp_path: Path) -> None:
    out = export(trained.run.folder, tmp_path / "deep" / "out", "last")
    with safe_open(out / "output.safetensors", framework="pt") as file:
        assert sorted(file.keys()) == ["head.bias", "head.weight", "tail.bias", "tail.index", "tail.weight"]
        assert file.get_slice("tail.weight").get_dtype() == STORED[trained.output.weight_dtype]
    here, there = Predictor(trained.run.folder, "last", "cpu"), Predictor(out, device="cpu")
    ours, scores = here.topk(TEXTS, 20)
    theirs, their_scores = there.topk(TEXTS, 20)
    assert np.array_equal(ours, theirs)
    assert np.array_equal(scores, their_scores)

    plain = subprocess.run([sys.executable, str(out / "predict.py"), *TEXTS], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (plain.returncode, plain.stderr) == (0, "")
    lines = [line.split() for line in plain.stdout.splitlines() if line.startswith("  ")]
    assert [int(line[1]) for line in lines] == ours[:, :5].ravel().tolist()
    np.testing.assert_allclose([float(line[0]) for line in lines], 1 / (1 + np.exp(-scores[:, :5].ravel().astype(float))), atol=2e-6)
    assert lines[0][2] == f"w{7 * ours[0, 0] % 200}"  # the label's text

    for path in (path for path in out.rglob("*") if path.is_file()):
        assert str(trained.run.folder).encode() not in path.read_bytes(), path
        assert str(Path(trained.data.prepared).parent).encode() not in path.read_bytes(), path
    card = (out / "README.md").read_text()
    assert "101 labels" in card
    assert "| P@1 | " in card


@pytest.mark.parametrize("trained", TRAINED[:1], ids=["mean"], indirect=True)
def test_predict_py_calibrates_as_the_package_does(trained: Config, tmp_path: Path, warm_python: str) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(trained.run.folder, run)
    (run / calibration.FILE).write_bytes(seal({"checkpoint": ModelFiles(run, "last").version, "scale": 0.5, "offset": -1.25}))
    export(run, out, "last", "onnx")
    expected = Predictor(out, device="cpu").predict(TEXTS, 5)
    plain = subprocess.run([warm_python, str(out / "predict.py"), *TEXTS], capture_output=True, text=True, check=True)
    lines = [line.split() for line in plain.stdout.splitlines() if line.startswith("  ")]
    assert [int(line[1]) for line in lines] == [one.label for ranked in expected for one in ranked]
    np.testing.assert_allclose([float(line[0]) for line in lines], [one.score for ranked in expected for one in ranked], atol=2e-6)
    told = "Scores are calibrated: sigmoid(scale * logit + offset), as in `calibration.json`; `model.onnx` gives logits.\n"
    assert told in (out / "README.md").read_text()
    assert "calibrated" not in (export(trained.run.folder, tmp_path / "bare", "last") / "README.md").read_text()


@pytest.mark.parametrize("trained", TRAINED[:1], ids=["mean"], indirect=True)
def test_predict_py_names_what_is_damaged(trained: Config, tmp_path: Path, warm_python: str) -> None:
    whole = export(trained.run.folder, tmp_path / "whole", "last")
    for number, name in enumerate(("model.json", "output.safetensors", "labels.arrow", "encoder/model.safetensors", "checksums.json")):
        for rest in (None, 40):
            out = shutil.copytree(whole, tmp_path / f"out{number}{rest}")
            if rest is None:
                (out / name).unlink()
            else:
                (out / name).write_bytes((out / name).read_bytes()[:rest])
            plain = subprocess.run([warm_python, str(out / "predict.py"), TEXTS[0]], capture_output=True, text=True, check=False)
            if name == "checksums.json":
                assert plain.returncode == 0  # it is read only where something else is wrong
            else:
                assert (plain.returncode, plain.stderr) == (1, f"{out / name}: missing or damaged; copy the exported folder again\n")
    edited = (whole / "predict.py").read_text().replace("    import torch\n", "    import torch\n    raise RuntimeError('my own')\n")
    (whole / "predict.py").write_text(edited)  # its user's mistakes stay tracebacks
    plain = subprocess.run([warm_python, str(whole / "predict.py"), TEXTS[0]], capture_output=True, text=True, check=False)
    assert plain.stderr.startswith("Traceback ")
    assert plain.stderr.endswith("RuntimeError: my own\n")


@pytest.mark.parametrize("trained", TRAINED[:1], ids=["mean"], indirect=True)
def test_predict_py_tells_options_from_texts(trained: Config, tmp_path: Path) -> None:
    out = export(trained.run.folder, tmp_path / "out", "last")

    def plain(*words: str) -> tuple[int, str, str]:
        done = subprocess.run([sys.executable, str(out / "predict.py"), *words], capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, done.stderr

    status, told, error = plain("-k", "3", *TEXTS[:2])
    assert (status, error) == (0, "")
    assert [line for line in told.splitlines() if not line.startswith("  ")] == TEXTS[:2]
    assert len(told.splitlines()) == 2 * (1 + 3)
    status, told, error = plain("--help")
    assert (status, error) == (0, "")
    assert told.startswith("usage: predict.py ")
    for words, problem in (
        ((), "required: TEXT"),
        (("-k", "0", "a text"), "-k: 0 is not at least 1"),
        (("-k", "3"), "required: TEXT"),
        (("w1", " "), "is empty"),
    ):
        status, told, error = plain(*words)
        assert (status, told) == (2, "")
        assert error.startswith("usage: predict.py ")
        assert problem in error


def test_adapters_are_merged_into_what_they_adapt(tmp_path: Path, warm_python: str) -> None:
    """predict.py builds the model without adapters: names that it does not know would leave its weights random."""
    pytest.importorskip("peft")
    config = make_prepared(tmp_path, overrides=["train.max_steps=24", "encoder.lora_rank=4", "encoder.lr=1e-2"])
    train(config, join_world("cpu"))
    out = export(config.run.folder, tmp_path / "out")
    bare = AutoModel.from_config(AutoConfig.from_pretrained(out / "encoder"))
    bare.pooler = None
    assert load_file(out / "encoder/model.safetensors").keys() == bare.state_dict().keys()
    ours, scores = Predictor(config.run.folder, device="cpu").topk(TEXTS, 5)
    theirs, their_scores = Predictor(out, device="cpu").topk(TEXTS, 5)
    assert np.array_equal(ours, theirs)
    np.testing.assert_allclose(scores, their_scores, rtol=1e-5, atol=1e-5)
    plain = subprocess.run([warm_python, str(out / "predict.py"), *TEXTS], capture_output=True, text=True, check=True)
    lines = [line.split() for line in plain.stdout.splitlines() if line.startswith("  ")]
    assert [int(line[1]) for line in lines] == ours.ravel().tolist()


def test_a_dense_layer_and_onnx_give_the_run_s_logits(trained: Config, tmp_path: Path) -> None:
    import onnxruntime

    expected_ids, scores = Predictor(trained.run.folder, "last", "cpu").topk(TEXTS, 101)
    expected = np.take_along_axis(scores, np.argsort(expected_ids), 1)  # by label id

    export(trained.run.folder, tmp_path / "onnx", "last", "onnx")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "onnx/encoder")
    tokens = dict(tokenizer(TEXTS, truncation=True, max_length=16, padding=True, return_tensors="np"))
    session = onnxruntime.InferenceSession(tmp_path / "onnx/model.onnx", providers=["CPUExecutionProvider"])
    given = {name: tokens[name] for name in ("input_ids", "attention_mask")}
    np.testing.assert_allclose(session.run(["logits"], given)[0], expected, rtol=1e-4, atol=1e-4)
    one = {name: values[1:2, :5] for name, values in given.items()}  # another number of texts and of tokens
    np.testing.assert_allclose(session.run(["logits"], one)[0], expected[1:2], rtol=1e-4, atol=1e-4)
    assert any(name.endswith("model.onnx") for name in verify(tmp_path / "onnx"))

    out = export(trained.run.folder, tmp_path / "dense", "last", "dense")
    dense = load_file(out / "dense.safetensors")
    encoder = AutoModel.from_pretrained(out / "encoder").eval()
    pytorch = {name: torch.from_numpy(values) for name, values in given.items()}
    with torch.no_grad():
        hidden, mask = encoder(**pytorch).last_hidden_state, pytorch["attention_mask"][..., None]
        x = hidden[:, 0] if trained.encoder.pooling == "cls" else (hidden * mask).sum(1) / mask.sum(1)
        x = torch.nn.functional.normalize(x, dim=-1) if trained.encoder.normalize else x
    np.testing.assert_allclose((x @ dense["weight"].T + dense["bias"]).numpy(), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(HasteError, match=r"larger than 1\.8 GB; export it as it is"):
        dense_layer({}, {"labels": 10**6, "width": 768, "head_rows": 0}, np.arange(1))


@pytest.mark.parametrize("trained", TRAINED[:1], ids=["mean"], indirect=True)
def test_the_cluster_and_the_ranks_that_trained_stay_behind(trained: Config, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained.run.folder, run)
    save_config(load_config(run / "config.yaml", ["launch.address=10.0.0.1:23456", "launch.ranks=8"]), run / "config.yaml")
    (run / "checksums.json").unlink()
    assert load_config(export(run, tmp_path / "out", "last") / "config.yaml").launch == LaunchConfig()


@pytest.mark.parametrize("trained", TRAINED[:1], ids=["mean"], indirect=True)
def test_the_command_and_its_refusals(trained: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    done = haste("export", trained.run.folder, str(out), "--checkpoint", "last", "--format", "dense")
    assert (done.returncode, done.stdout) == (0, f"{out}\n"), done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert cli.main(["predict", str(out), "--text", TEXTS[0], "launch.device=cpu"]) == 0
    assert TEXTS[0] in capsys.readouterr().out
    assert len(verify(out)) > 5
    for run, to, word in (
        (trained.run.folder, out, "exists; name a folder that does not"),
        (out, tmp_path / "b", "no run folder"),
        (tmp_path, tmp_path / "b", "no run folder"),
    ):
        with pytest.raises(HasteError, match=word):
            export(run, to, "last")
    with pytest.raises(HasteError, match="no such checkpoint"):
        export(trained.run.folder, tmp_path / "b", "step-00000001")
    for name in ("output.safetensors", "encoder/model.safetensors", "encoder/config.json", "labels.arrow", "config.yaml", "model.json"):
        data = (out / name).read_bytes()
        (out / name).write_bytes(data[:-1])
        with pytest.raises(HasteError, match=f"{(out / name).name}: damaged"):
            Predictor(out, device="cpu")
        with pytest.raises(HasteError, match=f"{(out / name).name}: damaged"):
            verify(out)
        (out / name).write_bytes(data)
    verify(out)


def test_rows_of_many_ranks_are_joined(tmp_path: Path) -> None:
    ranks = 4  # one of them without head rows
    for rank in range(ranks):
        tensors = classifier(ranks, rank, 1).tensors()
        starts = {name: str(start) for name, (_, start) in tensors.items()}
        write_tensors(tmp_path / rows_file(rank, ranks), {name: tensor for name, (tensor, _) in tensors.items()}, starts)
    joined = _joined(tmp_path, {"files": [rows_file(rank, ranks) for rank in (2, 0, 3, 1)]})
    whole = classifier(1, 0, 1).tensors()
    assert set(joined) == {name for name in whole if "momentum" not in name}
    assert all(torch.equal(tensor, whole[name][0]) for name, tensor in joined.items())


def test_an_encoder_that_does_not_fit_its_settings_is_told(tmp_path: Path) -> None:
    config = make_prepared(tmp_path, overrides=["train.max_steps=4"])
    train(config, join_world("cpu"))
    page = Path(config.run.folder) / "encoder/config.json"
    page.write_text(page.read_text().replace('"intermediate_size": 128', '"intermediate_size": 64'))
    seal_run(Path(config.run.folder))
    with pytest.raises(CheckpointError, match=r"its encoder's weights do not fit its config.yaml \(size mismatch for model"):
        export(config.run.folder, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))
