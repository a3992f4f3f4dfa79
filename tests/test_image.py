"""The image and the dev container: what they name is there; the install steps themselves run without Docker."""

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from tiny import FULL

ROOT = Path(__file__).resolve().parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
INSTRUCTIONS = [line.split(maxsplit=1) for line in DOCKERFILE.splitlines() if line and not line.startswith(("#", " "))]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def of(word: str, stage: int = -1) -> list[str]:
    """What follows an instruction in a stage of the Dockerfile."""
    starts = [i for i, (name, _) in enumerate(INSTRUCTIONS) if name == "FROM"]
    end = starts[stage + 1] if stage + 1 and stage + 1 < len(starts) else len(INSTRUCTIONS)
    return [rest for name, rest in INSTRUCTIONS[starts[stage] : end] if name == word]


def test_the_image_is_small_pinned_and_nobodys_root() -> None:
    assert DOCKERFILE.count("\nFROM ") == 2
    assert all(re.fullmatch(r"[\w./-]+:[\w.-]+( AS \w+)?", image) and ":latest" not in image for image in of("FROM", 0) + of("FROM"))
    assert of("USER")[-1] not in {"root", "0"}
    (build,) = [line for line in of("RUN", 0) if "install.sh" in line]
    program, folder, extras = build.split()
    assert os.access(ROOT / program, os.X_OK)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    assert of("COPY") == [f"--from=build {folder} {folder}"]  # the environment alone, without the build's tools and the source
    assert f"{folder}/bin:$PATH" in of("ENV")[0]
    assert "-c constraints-cpu.txt" in (ROOT / program).read_text(encoding="utf-8")


def test_a_server_that_does_not_answer_is_unwell(tmp_path: Path) -> None:
    """The health check's line, with programs of our own in place of pgrep, wget and haste."""
    (check,) = of("HEALTHCHECK")
    line = check.split("CMD ", 1)[1]
    for pgrep, wget, haste, healthy in ((0, 0, 1, True), (0, 4, 0, False), (1, 4, 0, True), (1, 0, 1, False)):
        for name, status in (("pgrep", pgrep), ("wget", wget), ("haste", haste)):
            (tmp_path / name).write_text(f"#!/bin/sh\nexit {status}\n")
            (tmp_path / name).chmod(0o755)
        done = subprocess.run(["/bin/sh", "-c", line], env={"PATH": str(tmp_path)}, check=False)
        assert (done.returncode == 0) == healthy


def test_the_context_has_what_the_install_needs(tmp_path: Path) -> None:
    context = context_of(tmp_path)
    names = {path.relative_to(context).as_posix() for path in context.rglob("*") if path.is_file()}
    assert names >= {
        "pyproject.toml",
        "constraints-cpu.txt",
        "README.md",
        "LICENSE",
        "launch/install.sh",
        "conf/demo.yaml",
        "kernels/__init__.py",
    }
    assert not [name for name in names if name.startswith(("tests", ".git", "benchmarks")) or "__pycache__" in name]


def test_the_dev_container_makes_the_same_environment() -> None:
    page = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text(encoding="utf-8"))
    command, target = page["postCreateCommand"].split()
    assert command == "make"
    assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE)
    assert ":latest" not in page["image"]
    assert page["remoteUser"] != "root"
    assert page["remoteEnv"]["PATH"].startswith("${containerWorkspaceFolder}/.venv/bin:")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not FULL, reason="minutes: installs everything; set HASTE_FULL=1")
def test_the_install_steps_make_an_environment_that_needs_no_source(tmp_path: Path) -> None:
    context = context_of(tmp_path)
    words = [str(context / "launch" / "install.sh"), str(tmp_path / "env"), "serve,jobs"]
    subprocess.run(words, cwd=context, env={**os.environ, "PYTHON": sys.executable}, check=True)
    shutil.rmtree(context)
    for words in (["config", "demo"], ["submit", "--help"], ["--version"]):
        subprocess.run([str(tmp_path / "env" / "bin" / "haste"), *words], cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)


def context_of(folder: Path) -> Path:
    """What Docker would copy: the tree, as .dockerignore has it."""
    context, rules = folder / "context", (ROOT / ".dockerignore").read_text(encoding="utf-8").split("\n")
    kept = [rule[1:] for rule in rules if rule.startswith("!")]
    left_out = [rule.removeprefix("**/") for rule in rules if rule and rule[0] not in "#!*"] + [r[3:] for r in rules if r.startswith("**/")]
    for name in kept:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(
                source, context / name, ignore=lambda _, names: [n for n in names if any(fnmatch.fnmatch(n, rule) for rule in left_out)]
            )
        else:
            context.mkdir(exist_ok=True)
            shutil.copyfile(source, context / name)
    return context
