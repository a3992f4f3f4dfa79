"""The repository itself: style, types, import rules, and documents that agree with the code."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from haste_launch import cli

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("haste_dist", "kernels", "launch", "conf", "tests", "benchmarks", "docs", ".ci", ".devcontainer")
PACKAGES = {"haste_dist": "haste_dist", "haste_kernels": "kernels", "haste_launch": "launch", "haste_conf": "conf"}
MADE = {"__pycache__", "records"}  # made by tools, not by hand
PYTHON = sorted(p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py") if "__pycache__" not in p.parts)
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKE_TARGETS = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


def tracked_files() -> set[str]:
    """What a clone holds, by hand: tests also run where there is no git."""
    tops = [p.name for p in ROOT.iterdir() if p.is_file() and p.name != ".git"]
    inner = [p for folder in FOLDERS for p in (ROOT / folder).rglob("*") if p.is_file()]
    return {*tops, *(p.relative_to(ROOT).as_posix() for p in inner if not MADE & set(p.relative_to(ROOT).parts))}


def run_tool(*words: str, **environment: str) -> None:
    program = shutil.which(words[0], path=f"{Path(sys.executable).parent}") or words[0]
    more = {**os.environ, **environment}
    done = subprocess.run([program, *words[1:]], cwd=ROOT, env=more, capture_output=True, text=True, timeout=280, check=False)
    if done.returncode:
        pytest.fail(f"{' '.join(words)}\n{done.stdout}{done.stderr}", pytrace=False)


def test_ruff_finds_nothing() -> None:
    run_tool("ruff", "check")


def test_the_code_is_formatted() -> None:
    run_tool("ruff", "format", "--check")


def test_mypy_finds_nothing(tmp_path: Path) -> None:
    # mypy cannot see through an editable install that gives folders other names, so it gets folders of those names.
    for name, folder in PACKAGES.items():
        (tmp_path / name).symlink_to(ROOT / folder)
    run_tool("mypy", MYPYPATH=str(tmp_path))


def test_imports_run_one_way() -> None:
    run_tool("lint-imports")


PICKLES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "shelve", "marshal", "joblib", "jsonpickle", "copyreg"}
RUNS_A_FILE = re.compile(
    r"(torch\.(load|save|hub\.\w+|jit\.load|package\.\w+)|eval|exec|compile|importlib\.import_module|runpy\.\w+|os\.(system|popen)"
    r"|yaml\.((full_|unsafe_)?load(_all)?)|(np|numpy)\.(load|fromfile|save\w*)|(pd|pandas)\.read_pickle|\w+\.read_pickle|shutil\.unpack_archive"
    r"|dist\.\w+_object(_list)?|torch\.distributed\.\w+_object(_list)?|(dcp|torch\.distributed\.checkpoint)\.\w+)"
)
SAFE_WORDS = {"trust_remote_code": "False", "use_safetensors": "True", "shell": "False"}  # the only values these may have


def runs_what_a_file_says(source: str) -> list[str]:
    """The lines of a program that could run what a file holds, or load what could."""
    found = []
    for node in ast.walk(ast.parse(source)):
        at = getattr(node, "lineno", 0)
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            names += [node.module or "", *(f"{node.module}.{name}" for name in names)] if isinstance(node, ast.ImportFrom) else []
            found += [f"{at}: imports {name}" for name in names if name.split(".")[0] in PICKLES or RUNS_A_FILE.fullmatch(name)]
        if isinstance(node, ast.Call):
            called, words = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            plain_array = called in {"np.load", "np.save"} and words.get("allow_pickle") == "False"
            if RUNS_A_FILE.fullmatch(called) and not plain_array:
                found.append(f"{at}: {called}")
            found += [f"{at}: {word}" for word in words if word in {"allow_pickle", "weights_only", "auto_map"} and not plain_array]
            found += [f"{at}: {word}={words[word]}" for word, value in SAFE_WORDS.items() if words.get(word, value) != value]
            if re.fullmatch(r"Auto\w+\.(from_pretrained|from_config)", called) and "trust_remote_code" not in words:
                found.append(f"{at}: {called} asks on the terminal; say trust_remote_code=False")
            if called == "AutoModel.from_pretrained" and "use_safetensors" not in words:
                found.append(f"{at}: {called} takes pickles too; say use_safetensors=True")
            if called.endswith(".extractall"):
                found.append(f"{at}: {called}: Python before 3.11.4 has no safe one")
    return found


@pytest.mark.parametrize("path", PYTHON, ids=[p.relative_to(ROOT).as_posix() for p in PYTHON])
def test_no_code_runs_what_a_file_says(path: Path) -> None:
    """Files are data: no pickle in any of its forms, no remote code. Comments in prose may name them."""
    found = runs_what_a_file_says(path.read_text(encoding="utf-8"))
    assert [line for line in found if "tests" not in path.parts or ": Auto" not in line] == []  # tests load what they made


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "from joblib import load",
        "from torch import load",
        "torch.load('x', weights_only=True)",
        "np.load('x')",
        "numpy.load('x', allow_pickle=True)",
        "np.load('x', allow_pickle=True)",
        "np.save('x', y)",
        "pd.read_pickle('x')",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.unsafe_load(text)",
        "AutoModel.from_pretrained(name, use_safetensors=True, trust_remote_code=config.trust)",
        "AutoModel.from_pretrained(name, trust_remote_code=False)",
        "AutoTokenizer.from_pretrained(name)",
        "torch.hub.load('a', 'b')",
        "dist.all_gather_object(a, b)",
        "archive.extractall('x')",
        "subprocess.run(line, shell=True)",
        "eval(text)",
        "import_module = importlib.import_module(name)",
        "shutil.unpack_archive('x')",
    ],
)
def test_the_scan_sees(line: str) -> None:
    assert len(runs_what_a_file_says(line)) >= 1


def test_no_file_knows_the_machine_it_was_written_on() -> None:
    here = re.compile(r"(?<![\w.])/(?:work|root|home|Users|scratch|mnt|data)/\w|\bpypi\.org|files\.pythonhosted|registry\.npmjs")
    found = []
    for name in sorted(tracked_files()):
        path = ROOT / name
        if path.suffix in {".py", ".yaml", ".yml", ".toml", ".md", ".txt", ".sh", ""} and name != "LICENSE" and path != Path(__file__):
            lines = path.read_text(encoding="utf-8").splitlines()
            found += [f"{name}:{i}: {line.strip()}" for i, line in enumerate(lines, 1) if here.search(line)]
    assert found == []


def test_files_stay_short() -> None:
    long = {p.relative_to(ROOT).as_posix(): n for p in PYTHON if (n := len(p.read_text(encoding="utf-8").splitlines())) > 400}
    assert long == {}, "one idea a file; split these"


def test_the_readme_tree_lists_every_file_and_no_other() -> None:
    block = README.split("## Files", 1)[1].split("```")[1]
    listed, folder = set(), ""
    for line in block.splitlines()[1:]:
        name = line.split()[0] if line.split() else ""
        if line.startswith("  "):
            listed.add(f"{folder}{name}")
        elif name.endswith("/"):
            folder = name
        elif name:
            listed.add(name)
    files = tracked_files()
    assert {name for name in files if not name.endswith(("py.typed", "__init__.py"))} == listed


def test_every_command_in_the_documents_exists() -> None:
    seen = set()
    for name in (
        "README.md",
        "CONTRIBUTING.md",
        "Makefile",
        *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md")),
        *(f"conf/{p.name}" for p in (ROOT / "conf").glob("*.yaml")),
    ):
        text = (ROOT / name).read_text(encoding="utf-8").replace("\\\n", " ")
        for line in text.splitlines():
            words = line.lstrip("#\t $").split(" #")[0]
            words = words.split("|| ")[-1].replace("[a.b=c ...]", "a.b=c")
            if words.startswith("haste ") and ("conf/" in name or name == "Makefile" or line.startswith("haste ")):
                cli.parse(shlex.split(words)[1:])  # exits where the parser does not know a word
                seen.add(words.split()[1])
        for target in re.findall(r"`make ([a-z]+)|^make ([a-z]+)", text, re.MULTILINE):
            assert "".join(target) in MAKE_TARGETS, f"{name}: make {target}"
    commands = {"prepare", "train", "evaluate", "predict", "plot", "config", "datasets", "bench"}
    assert seen == commands | {
        "verify",
        "export",
        "inspect",
        "scale",
        "plan",
        "serve",
        "study",
        "submit",
        "jobs",
        "logs",
        "stop",
        "doctor",
        "labels",
        "sweep",
        "average",
    }


def test_the_constraints_pin_every_dependency_of_the_project() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wanted = [
        *project["dependencies"],
        *(word for extra in ("dev", "demo", "serve", "jobs", "sweep", "mlflow", "wandb") for word in extras[extra]),
    ]
    names = {re.split(r"[\[><=~! ]", word)[0].lower().replace("_", "-") for word in wanted} - {project["name"]}
    lines = [line for line in (ROOT / "constraints-cpu.txt").read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    assert all(re.fullmatch(r"[\w.-]+==[\w.!]+", line) for line in lines)
    pinned = {line.split("==")[0].lower().replace("_", "-") for line in lines}
    assert names <= pinned
