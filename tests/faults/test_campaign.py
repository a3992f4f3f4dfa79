"""The fault campaign in its short form, and that it finds what is planted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import FULL

CAMPAIGN = Path(__file__).with_name("campaign.py")


def campaign(python: str, out: Path, *words: str) -> tuple[int, dict]:
    done = subprocess.run([python, str(CAMPAIGN), "--out", str(out), *words], capture_output=True, text=True, check=False)
    print(done.stdout, done.stderr)
    return done.returncode, json.loads(done.stdout[done.stdout.rindex("\n{\n") :])


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_kills_change_nothing(tmp_path: Path, warm_python: str) -> None:
    status, found = campaign(warm_python, tmp_path / "c", "--kills", "200" if FULL else "5", "--seed", os.environ.get("HASTE_SEED", "1"))
    assert (status, found["corrupted"], found["silently_lost"], found["hangs"], found["gave_up"]) == (0, 0, 0, 0, 0)
    assert found["kills"] >= (200 if FULL else 5)


@pytest.mark.slow
@pytest.mark.skipif(not FULL, reason="a minute long; set HASTE_FULL=1")
def test_a_checkpoint_that_is_published_too_early_is_found(tmp_path: Path) -> None:
    status, found = campaign(sys.executable, tmp_path / "c", "--kills", "12", "--plant")
    assert status == 1
    assert found["corrupted"] > 0
