"""haste serve as a user starts it: Ray Serve, HTTP, shared labels, checkpoints that change, the page in Chromium."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny import free_port, haste, make_prepared

from haste_dist.checkpoint import complete, point, step_of
from haste_dist.config import Config
from haste_dist.errors import ConfigError
from haste_dist.predictor import Predictor
from haste_dist.train import train
from haste_dist.use_config import ServeConfig
from haste_dist.world import join_world
from haste_launch.serve import LEAST_TOKEN, check_port, the_token

SECONDS = 120
TIMEOUT = 10  # for a slow client to send its request, and for an answer: two cores may be busy with other tests
TEXTS = ["w0 w1 w14", "w7 w8 w9 w21", "w3"]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Two checkpoints, ``best`` being the older one."""
    words = ["train.max_steps=24", "train.checkpoint_every=12", "train.evaluate_every=0", "checkpoint.keep=5"]
    config = make_prepared(tmp_path_factory.mktemp("run"), labels=101, texts=256, overrides=words)
    train(config, join_world("cpu"))
    saved = Path(config.run.folder) / "checkpoints"
    point(saved, "best", step_of(complete(saved)[0]))
    return config


class Service:
    """A running haste serve."""

    def __init__(self, run: str, folder: Path):
        self.port, self.token_file = free_port(), folder / "token"
        words = [
            f"serve.port={self.port}",
            f"serve.token_file={self.token_file}",
            "serve.reload=0.2",
            "serve.parts=2",
            f"serve.timeout={TIMEOUT}",
        ]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "haste_launch.cli", "serve", run, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.said = self.process.stdout.readline()

    def ask(self, path: str, page: Any = None, token: str | None = None) -> tuple[int, Any]:
        headers = {"authorization": f"Bearer {token or self.token_file.read_text().strip()}", "content-type": "application/json"}
        data = None if page is None else json.dumps(page).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, headers)
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())


@pytest.fixture(scope="module")
def service(trained: Config, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    one = Service(trained.run.folder, tmp_path_factory.mktemp("serve"))
    try:
        yield one
    finally:
        one.process.kill()
        one.process.wait()


@pytest.mark.slow
def test_it_answers_as_the_model_does_and_follows_the_checkpoint_without_an_error(service: Service, trained: Config) -> None:
    assert service.said.startswith("serving "), service.process.stderr and service.process.stderr.read()
    assert str(service.token_file) in service.said
    assert service.token_file.stat().st_mode & 0o777 == 0o600
    saved = Path(trained.run.folder) / "checkpoints"
    older, newer = (path.name for path in complete(saved)[:2])
    answers: list[tuple[int, Any]] = []
    stop = threading.Event()

    def client() -> None:
        while not stop.is_set():
            answers.append(service.ask("/predict", {"texts": TEXTS, "k": 3}))

    threads = [threading.Thread(target=client) for _ in range(4)]
    for thread in threads:
        thread.start()
    for step in (step_of(saved / newer), step_of(saved / older), step_of(saved / newer)):
        time.sleep(0.5)
        reloads = service.ask("/ready")[1]["reloads"]
        point(saved, "best", step)
        end = time.monotonic() + SECONDS
        while service.ask("/ready")[1]["reloads"] == reloads:
            assert time.monotonic() < end
            time.sleep(0.1)
    time.sleep(0.5)
    stop.set()
    for thread in threads:
        thread.join()
    assert not [answer for answer in answers if answer[0] != 200]
    assert {page["model"] for _, page in answers} == {older, newer}
    expected = {version: Predictor(trained.run.folder, version, "cpu").predict(TEXTS, 3) for version in (older, newer)}
    for _, page in answers:  # no answer mixes the two
        ranked = [[(one["label"], one["text"]) for one in labels] for labels in page["predictions"]]
        assert ranked == [[(one.label, one.text) for one in labels] for labels in expected[page["model"]]]


@pytest.mark.slow
def test_strangers_and_slow_clients_are_refused(service: Service) -> None:
    assert service.ask("/predict", {"texts": ["w1"]}, token="x" * 40)[0] == 401
    assert service.ask("/predict", {"texts": []})[0] == 422
    assert service.ask("/predict", {"texts": ["w1" * 2**20]})[0] == 413
    token = service.token_file.read_text().strip()
    head = f"POST /predict HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {token}\r\ncontent-length: 50\r\n\r\n"
    with socket.create_connection(("127.0.0.1", service.port), SECONDS) as slow:
        slow.sendall(head.encode() + b'{"te')
        answer = b""
        while part := slow.recv(4096):  # until it is closed
            answer += part
    assert answer.startswith(b"HTTP/1.1 408 ")
    with socket.create_connection(("127.0.0.1", service.port), SECONDS) as one:
        one.sendall(b"\x16\x03\x01 no HTTP at all\r\n\r\n")
        assert one.recv(4096).startswith(b"HTTP/1.1 400 ")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium (Debian: apt install chromium)")
def test_the_page_ranks_in_a_browser(service: Service, tmp_path: Path) -> None:
    from browser import Browser

    with Browser(str(CHROMIUM), tmp_path) as browser:
        browser.open(f"http://127.0.0.1:{service.port}/#token={service.token_file.read_text().strip()}", width=360, height=740)
        browser.wait("document.getElementById('model').textContent.includes('101 labels')")
        assert browser.ask("location.hash") == "", "the token does not stay in the address"
        assert browser.ask("document.activeElement.id") == "text"
        browser.write("w0 w1 w14")
        browser.key("Enter", control=True)
        browser.wait("document.querySelectorAll('#found > li').length === 5")
        assert browser.ask("document.documentElement.scrollWidth <= innerWidth"), "nothing sticks out of a narrow window"
        first = browser.ask("document.querySelector('#found .name').textContent")
        assert first == service.ask("/predict", {"texts": ["w0 w1 w14"]})[1]["predictions"][0][0]["text"]
        browser.ask("document.querySelector('#found summary').focus()")
        browser.key("Enter")
        browser.wait("document.querySelector('#found details').open && document.querySelectorAll('#found details[open] li').length > 3")
        for expected in ("k", "token", "go"):  # from the text on, by the keyboard alone
            if expected == "k":
                browser.ask("document.getElementById('text').focus()")
            browser.key("Tab")
            assert browser.ask("document.activeElement.id") == expected
        browser.ask("document.getElementById('token').value = 'wrong'")
        browser.key("Enter")
        browser.wait("document.getElementById('said').textContent.includes('token is missing or wrong')")
        browser.screenshot(tmp_path / "page.png")
        assert (tmp_path / "page.png").stat().st_size > 5000
        assert browser.errors() == [], "no error, no blocked script, nothing asked of another host"


@pytest.mark.slow
def test_a_second_service_on_the_port_is_refused_and_a_signal_ends_it(service: Service, trained: Config) -> None:
    """The last one to use the service."""
    second = haste("serve", trained.run.folder, f"serve.port={service.port}")
    assert second.returncode == 2
    assert re.fullmatch(r"haste: error: serve.host=127.0.0.1, serve.port=\d+: cannot listen there .*\n", second.stderr)
    service.process.send_signal(signal.SIGTERM)
    _, said = service.process.communicate(timeout=SECONDS)
    assert service.process.returncode == 0, said
    assert "Traceback" not in said
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", service.port), 5)


def test_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("HASTE_SERVE_TOKEN", raising=False)
    monkeypatch.setenv("HASTE_CACHE", str(tmp_path / "cache"))
    token, told = the_token(ServeConfig())
    file = tmp_path / "cache" / "serve-token"
    assert len(token) >= 43
    assert token not in told
    assert str(file) in told
    assert file.stat().st_mode & 0o777 == 0o600
    assert the_token(ServeConfig())[0] == token, "the next start has the same"
    assert the_token(ServeConfig(token_file=str(tmp_path / "other")))[0] != token
    monkeypatch.setenv("HASTE_SERVE_TOKEN", "b" * LEAST_TOKEN)
    assert the_token(ServeConfig()) == ("b" * LEAST_TOKEN, "(token in HASTE_SERVE_TOKEN)")
    monkeypatch.setenv("HASTE_SERVE_TOKEN", "short")
    with pytest.raises(ConfigError, match="HASTE_SERVE_TOKEN: a token has at least 16"):
        the_token(ServeConfig())
    monkeypatch.delenv("HASTE_SERVE_TOKEN")
    (tmp_path / "empty").touch()
    with pytest.raises(ConfigError, match="empty: a token has at least"):
        the_token(ServeConfig(token_file=str(tmp_path / "empty")))
    assert the_token(ServeConfig(auth=False)) == ("", "(no token is asked for)")
    assert capsys.readouterr().err == ""
    the_token(ServeConfig(auth=False, host="0.0.0.0"))
    assert "whoever reaches 0.0.0.0 may ask" in capsys.readouterr().err


def test_a_port_that_is_taken() -> None:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        one.listen()
        with pytest.raises(ConfigError, match="cannot listen there"):
            check_port(ServeConfig(port=one.getsockname()[1]))
    with pytest.raises(ConfigError, match="cannot listen there"):
        check_port(ServeConfig(host="no.such.host.invalid"))


def test_what_is_no_run_is_told(tmp_path: Path) -> None:
    done = haste("serve", str(tmp_path), HASTE_CACHE=str(tmp_path / "cache"))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "no run folder" in done.stderr
    assert os.listdir(tmp_path) == []
