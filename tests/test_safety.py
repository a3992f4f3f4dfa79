"""What a user or a file says is never run: models with code of their own, pickled weights, YAML that names Python."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import haste, make_prepared

from haste_dist.config import Config, EncoderConfig, load_config
from haste_dist.encoder import build_encoder
from haste_dist.errors import ConfigError

CODE = """
import pathlib
pathlib.Path(__file__).with_name("RAN").touch()
from transformers import BertConfig, BertModel, BertTokenizerFast
class Own(BertConfig): model_type = "own"
class OwnModel(BertModel): config_class = Own
class OwnTokenizer(BertTokenizerFast): pass
"""


@pytest.fixture
def with_code(tmp_path: Path) -> Path:
    """A model folder whose config names classes in a file beside it."""
    folder = tmp_path / "model"
    folder.mkdir()
    names = {"AutoConfig": "own.Own", "AutoModel": "own.OwnModel", "AutoTokenizer": ["own.OwnTokenizer", "own.OwnTokenizer"]}
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": names}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "OwnTokenizer", "auto_map": names}))
    (folder / "own.py").write_text(CODE)
    return folder


def test_a_model_with_code_is_refused_whatever_the_terminal_answers(with_code: Path) -> None:
    """In a process of its own whose stdin says yes: transformers would ask."""
    program = f"""
from haste_dist.config import EncoderConfig
from haste_dist.encoder import load_tokenizer, model_config
from haste_dist.errors import ConfigError
for load in (lambda c: model_config(c, 100, 0, 16), load_tokenizer):
    try:
        load(EncoderConfig(name={str(with_code)!r}))
    except ConfigError as error:
        print("refused:", error)
"""
    modules = with_code.parent / "modules"
    environment = {**os.environ, "HF_MODULES_CACHE": str(modules)}
    done = subprocess.run([sys.executable, "-c", program], input="y\n" * 9, capture_output=True, text=True, check=False, env=environment)
    assert done.stdout.count("refused: encoder.") == 2, done.stdout + done.stderr
    assert not [path for top in (with_code, modules) for path in top.rglob("RAN")]


def test_no_setting_turns_remote_code_on(tmp_path: Path) -> None:
    for word in ("encoder.trust_remote_code=true", "trust_remote_code=true", "run.trust_remote_code=1"):
        with pytest.raises(ConfigError, match="unknown setting"):
            load_config(None, [word])
    assert not [name for name in vars(EncoderConfig()) if "trust" in name or "remote" in name]


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    config = make_prepared(tmp_path)
    encoder = build_encoder(config.encoder, 202, 0, 16)
    encoder.model.config.save_pretrained(tmp_path / "model")  # type: ignore[union-attr, operator]
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(ConfigError, match="cannot load "):
        build_encoder(EncoderConfig(name=str(tmp_path / "model")), 202, 0, 16)


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.mkdir", "!!python/object/new:os.mkdir", "!!python/name:os.mkdir"])
def test_yaml_makes_no_objects(tmp_path: Path, tag: str) -> None:
    (tmp_path / "c.yaml").write_text(f"run:\n  folder: {tag} ['{tmp_path}/made']\n")
    with pytest.raises(ConfigError):
        load_config(tmp_path / "c.yaml")
    with pytest.raises(ConfigError):
        load_config(None, [f"run.folder={tag} ['{tmp_path}/made']"])
    assert not (tmp_path / "made").exists()


def test_a_checkpoint_is_named_not_pathed(tmp_path: Path) -> None:
    from haste_dist.train import train
    from haste_dist.world import join_world

    config: Config = make_prepared(tmp_path, overrides=["train.max_steps=1"])
    train(config, join_world("cpu"))
    done = haste("predict", config.run.folder, "--text", "w1", "--checkpoint", "../../run/checkpoints/step-00000001", "launch.device=cpu")
    assert done.returncode == 2
    assert "no such checkpoint; there are: step-00000001" in done.stderr
    assert done.stderr.count("\n") == 1
