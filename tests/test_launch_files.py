"""The launch files are what Slurm, KubeRay and ray up take."""

import copy
import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray
import yaml

from haste_launch import cli

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "launch"
RAYLET = Path(ray.__file__).parent / "core" / "src" / "ray" / "raylet" / "raylet"
SCHEMAS = json.loads((ROOT / "tests" / "fixtures" / "kuberay.json").read_text(encoding="utf-8"))
PINS = dict(line.split("==") for line in (ROOT / "constraints-cpu.txt").read_text().splitlines() if "==" in line and line[0] != "#")


def read(name: str) -> Any:
    return yaml.safe_load((LAUNCH / name).read_text(encoding="utf-8"))


def cluster_of(page: dict[str, Any]) -> dict[str, Any]:
    return page["spec"].get("rayClusterSpec", page["spec"])


@pytest.mark.parametrize("name", ["kuberay.yaml", "kuberay-cluster.yaml"])
def test_kuberay_takes_it(name: str) -> None:
    page = read(name)
    schema = SCHEMAS[page["kind"]]
    jsonschema.Draft202012Validator(schema).validate(page)
    cluster = cluster_of(page)
    assert cluster["rayVersion"] == PINS["ray"]
    assert cluster["authOptions"] == {"mode": "token"}
    (workers,) = cluster["workerGroupSpecs"]
    assert workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"]  # a run takes what is there
    for pod in (cluster["headGroupSpec"]["template"]["spec"], workers["template"]["spec"]):
        (container,) = pod["containers"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}

    for damage in (
        lambda page: page.update(spek={}),
        lambda page: cluster_of(page).update(rayVersion=2.6),
        lambda page: cluster_of(page)["authOptions"].update(mode="tokens"),
        lambda page: cluster_of(page)["workerGroupSpecs"][0].update(replicas="2"),
        lambda page: cluster_of(page)["workerGroupSpecs"][0].pop("groupName"),
        lambda page: cluster_of(page)["headGroupSpec"]["template"]["spec"]["containers"][0].update(imag="x"),
        lambda page: cluster_of(page)["headGroupSpec"]["template"]["spec"]["containers"][0].pop("name"),
    ):
        broken = copy.deepcopy(page)
        damage(broken)
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.Draft202012Validator(schema).validate(broken)


def test_the_jobs_command_is_one_of_ours() -> None:
    command, *words = shlex.split(read("kuberay.yaml")["spec"]["entrypoint"])
    assert command == "haste"
    cli.parse(words)


def test_ray_up_takes_it() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    whole = prepare_config(read("ray-up.yaml"))
    validate_config(whole)
    assert whole["provider"]["worker_ips"] == ["gpu-1", "gpu-2", "gpu-3"]
    for commands in (whole["head_start_ray_commands"], whole["worker_start_ray_commands"]):
        assert "RAY_AUTH_MODE=token" in commands[-1]
        for option in re.findall(r"(--[a-z-]+)", commands[-1]):
            assert option in ray_start_options()


def test_the_options_of_ray_start_in_the_documents_exist() -> None:
    text = (ROOT / "docs" / "launch.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("ray start ")]
    assert len(lines) == 2
    for line in lines:
        assert set(re.findall(r"(--[a-z-]+)", line)) <= ray_start_options()


def test_the_slurm_script_is_sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its words reach haste train and srun, and Ray takes them on every node; the two-host test runs it for real."""
    script = LAUNCH / "slurm.sbatch"
    assert subprocess.run(["bash", "-n", str(script)], check=False).returncode == 0
    for name, lines in {
        "srun": 'printf "%s\\n" "$@" > srun; env > environment',
        "scontrol": "echo node-a; echo node-b",
        "getent": "echo 10.0.0.1 STREAM node-a",
        "haste": 'echo "  folder: runs/mine   # run folder: config"',
        "python": "echo 0123456789abcdef; stat -c %a . > /dev/null",
    }.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{lines}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "bin" / "activate").write_text("")
    more = {"HOME": str(tmp_path), "HASTE_VENV": str(tmp_path), "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    more |= {"SLURM_JOB_ID": "123456", "SLURM_JOB_NODELIST": "node-[a-b]", "SLURM_JOB_NUM_NODES": "2"}
    words = ["bash", str(script), "demo", "run.folder=runs/mine", "train.epochs=3"]
    done = subprocess.run(words, cwd=tmp_path, env={**os.environ, **more}, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    sent = (tmp_path / "srun").read_text().splitlines()
    assert sent[sent.index("--address") + 1] == "10.0.0.1:23456"
    assert sent[sent.index("--min-nodes") + 1] == "2"
    assert sent[sent.index("--") + 1 :] == ["haste", "train", "demo", *words[3:], "launch.address=10.0.0.1:23456"]
    assert list((tmp_path / ".ray").iterdir()) == []  # the token went with the job
    (set_for_raylets,) = re.findall(r"^RAY_(gcs_rpc\w+)=20$", (tmp_path / "environment").read_text(), re.MULTILINE)
    known = set_for_raylets.encode() in RAYLET.read_bytes()
    assert known, "Ray has no such setting"
    at = sent.index("symmetric-run")
    said = refusals_of_ray(sent[at + 1 : sent.index("--")], monkeypatch)
    assert said == {"head": "", "worker": ""}
    said = refusals_of_ray(["--address", "10.0.0.1:23456", "--include-dashboard=false"], monkeypatch)
    assert said["head"] == ""
    assert re.search("--include-dashboard.* should only be specified when starting head node", said["worker"])


def refusals_of_ray(words: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Why ``ray start``, called as ``ray symmetric-run`` with these words calls it, would start no node; empty: it would.

    symmetric-run gives the same options to both, some of which only a head may have; what starts the node's processes is not reached.
    """
    import ray._private.node
    from click.testing import CliRunner
    from ray.scripts.scripts import start
    from ray.scripts.symmetric_run import curate_and_validate_ray_start_args

    class ReachedError(Exception):
        pass

    def node(*_words: Any, **_more: Any) -> None:
        raise ReachedError

    monkeypatch.setattr(ray._private.node, "Node", node)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    given = curate_and_validate_ray_start_args(words)
    asked = {"head": ["--head", "--node-ip-address=127.0.0.1", "--port=23456"], "worker": ["--address", "127.0.0.1:23456", "--block"]}
    said = {}
    for role, first in asked.items():
        done = CliRunner().invoke(start, [*first, *given])
        said[role] = "" if isinstance(done.exception, ReachedError) else f"{done.output}{done.exception!r}"
    return said


def ray_start_options() -> set[str]:
    from ray.scripts.scripts import start

    return {option for parameter in start.params for option in parameter.opts}
