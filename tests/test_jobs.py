"""haste submit, jobs, logs and stop, against a real cluster with tokens on, straight and through a TLS proxy."""

import asyncio
import contextlib
import datetime
import ipaddress
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import pytest
from ray_nodes import answers, kill_all, start_node, wait_for
from tiny import free_port, haste, make_prepared

from haste_dist.config import Config, load_config, save_config
from haste_dist.errors import ConfigError, HasteError, Interrupted
from haste_dist.runlog import read_events
from haste_launch import cli, follow, submit
from haste_launch.jobs import address_of
from haste_launch.submit import check_name, copy_packages, entrypoint, job_config, next_id, read_environment


@dataclass
class Cluster:
    """One Ray node with a dashboard and a token."""

    port: int
    token: str
    mark: str

    @property
    def environment(self) -> dict[str, str]:
        """What a user sets."""
        return {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{self.port}", "RAY_AUTH_MODE": "", "RAY_AUTH_TOKEN": self.token}

    def haste(self, *words: str, **more: str) -> subprocess.CompletedProcess:
        done = haste(*words, **{**self.environment, **more})
        assert "Traceback" not in done.stderr, done.stderr
        return done


@pytest.fixture(scope="module")
def cluster(short_folder: Path) -> Iterator[Cluster]:
    cluster = Cluster(free_port(), uuid.uuid4().hex, f"mark-{uuid.uuid4()}")
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": cluster.token}
    dashboard = ["--dashboard-host=127.0.0.1", f"--dashboard-port={cluster.port}"]
    try:
        start_node(["--head", f"--port={free_port()}", *dashboard, f"--temp-dir={short_folder}"], cluster.mark, environment)
        wait_for(lambda: answers(cluster.port))
        wait_for(lambda: cluster.haste("jobs").returncode == 0)
        yield cluster
    finally:
        kill_all(cluster.mark)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    config = make_prepared(tmp_path, overrides=["train.epochs=3", "train.evaluate_every=0", "train.log_every=1"])
    save_config(config, tmp_path / "c.yaml")
    return config


def start(cluster: Cluster, *words: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "haste_launch.cli", *words]
    return subprocess.Popen(command, env={**os.environ, **cluster.environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


@pytest.mark.slow
def test_a_job_is_followed_left_stopped_and_resumed(cluster: Cluster, config: Config, tmp_path: Path) -> None:
    """Relative paths start from --folder; the second submit of a run goes on from what the stopped one saved."""
    run = tmp_path / "mine"
    words = ["submit", str(tmp_path / "c.yaml"), "--name=mine", f"--python={sys.executable}", "data.prepared=prepared"]
    words += [f"--folder={tmp_path}"]
    done = cluster.haste(*words, "train.epochs=100000", "--detach")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == f"job mine-1: train in {run}"
    wait_for(lambda: (run / "metrics.jsonl").exists() and [e for e in read_events(run) if e["event"] == "step"])

    again = cluster.haste(*words)  # two jobs in one folder would write over each other
    assert again.returncode == 2
    assert again.stderr.startswith(f"haste: error: job mine-1 is at work in {run}; haste logs mine-1 --follow shows it")

    watching = start(cluster, "logs", "mine", "--follow", "--on-interrupt=leave")
    assert watching.stdout is not None
    assert watching.stdout.readline().startswith("training on 192 texts, 101 labels, ")
    watching.send_signal(signal.SIGINT)
    _, said = watching.communicate(timeout=120)
    assert (watching.returncode, said.count("\n")) == (130, 1), said
    assert said.startswith("haste: interrupted: job mine-1 goes on; ")
    assert " running " in cluster.haste("jobs").stdout.splitlines()[1]

    watching = start(cluster, "logs", "mine-1", "--follow", "--on-interrupt=stop")
    assert watching.stdout is not None
    watching.stdout.readline()
    watching.send_signal(signal.SIGINT)
    _, said = watching.communicate(timeout=120)
    assert watching.returncode == 130, said
    assert last_line(said) == "haste: interrupted: job mine-1 is stopped; the same haste submit goes on from where it saved"
    end = read_events(run)[-1]
    assert (end["event"], end["reason"]) == ("end", "stopped")
    gone = cluster.haste("stop", "mine")
    assert (gone.returncode, gone.stderr) == (2, "haste: error: job mine-1 is over: stopped\n")

    steps = end["step"] + 2
    done = cluster.haste(*words, "train.epochs=100000", f"train.max_steps={steps}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == f"job mine-2: train in {run}"
    assert f"resumed at step {end['step']:,}" in done.stdout
    assert f" at step {steps:,}; best " in last_line(done.stdout)
    assert read_events(run)[-1]["step"] == steps
    table = cluster.haste("jobs").stdout.splitlines()
    assert [line.split()[:2] for line in table[1:3]] == [["mine-2", "succeeded"], ["mine-1", "stopped"]]


@pytest.mark.slow
def test_the_exit_status_of_a_job_arrives(cluster: Cluster, config: Config, tmp_path: Path) -> None:
    """And again when its log is followed through a proxy that takes TLS off."""
    words = ["submit", str(tmp_path / "c.yaml"), f"--python={sys.executable}", "data.prepared=nosuch", "--name=wrong"]
    done = cluster.haste(*words, f"--folder={tmp_path}")
    assert done.returncode == 2
    assert last_line(done.stdout).startswith("haste: error: ")
    assert "haste prepare" in last_line(done.stdout)
    assert done.stderr == "haste: job wrong-1 failed with exit status 2, for the reason above\n"
    with tls_proxy(cluster.port, tmp_path) as (address, authority):
        there = {"RAY_API_SERVER_ADDRESS": address}
        refused = cluster.haste("jobs", **there)
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
        assert "its certificate is not trusted; name the file of its authority by --ca FILE" in refused.stderr
        again = cluster.haste("logs", "wrong", "--follow", f"--ca={authority}", **there)
        assert (again.returncode, again.stdout.splitlines()) == (2, done.stdout.splitlines()[1:])


@pytest.mark.slow
def test_what_is_wrong_with_a_cluster_is_one_line(cluster: Cluster, tmp_path: Path) -> None:
    nothing = f"http://127.0.0.1:{free_port()}"
    here = cluster.environment["RAY_API_SERVER_ADDRESS"]
    for words, more, says in (
        (["jobs"], {"RAY_AUTH_TOKEN": "another"}, f"{here} refuses this token; set RAY_AUTH_TOKEN"),
        (["jobs"], {"RAY_AUTH_TOKEN": "", "HOME": str(tmp_path)}, f"{here} asks for a token; set RAY_AUTH_TOKEN"),
        (["submit", "demo", f"--address={nothing}"], {}, f"no Ray dashboard answers at {nothing}; "),
        (["logs", "nosuch"], {}, "no job or run 'nosuch' on this cluster; haste jobs lists them"),
        (["stop", "nosuch"], {}, "no job or run 'nosuch' on this cluster"),
        (["jobs", f"--address=https://127.0.0.1:{cluster.port}"], {}, "does not speak TLS; try http://"),
        (["jobs", "--ca=nosuch.pem"], {}, "--ca nosuch.pem: no such file"),
    ):
        done = cluster.haste(*words, **more)
        assert (done.returncode, done.stderr.count("\n"), done.stdout) == (2, 1, ""), done.stderr
        assert done.stderr.startswith("haste: error: ")
        assert says in done.stderr


@contextlib.contextmanager
def tls_proxy(port: int, folder: Path) -> Iterator[tuple[str, Path]]:
    """(https address, certificate) of a proxy that takes TLS off and passes bytes on to ``port``."""
    certificate, key = make_certificate(folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                plain, _ = server.accept()
            except OSError:
                return
            threading.Thread(target=join, args=(plain,), daemon=True).start()

    def join(plain: socket.socket) -> None:
        with contextlib.suppress(OSError), context.wrap_socket(plain, server_side=True) as near:
            far = socket.create_connection(("127.0.0.1", port))
            threading.Thread(target=pump, args=(far, near), daemon=True).start()
            pump(near, far)

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError):
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"https://127.0.0.1:{server.getsockname()[1]}", certificate
    finally:
        server.close()


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that nobody knows, and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a test")])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    builder = builder.serial_number(1).not_valid_before(now).not_valid_after(now + datetime.timedelta(days=1))
    address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    builder = builder.add_extension(address, False).add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
    encoding = serialization.Encoding.PEM
    (folder / "cert.pem").write_bytes(builder.sign(key, hashes.SHA256()).public_bytes(encoding))
    secret = key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (folder / "key.pem").write_bytes(secret)
    return folder / "cert.pem", folder / "key.pem"


def test_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")  # of the control plane
    assert address_of("") == "http://127.0.0.1:8265"
    assert address_of("head:8265/") == "http://head:8265"
    monkeypatch.setenv("RAY_ADDRESS", "https://head")
    assert address_of("") == "https://head"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://other:1")
    assert address_of("") == "http://other:1"
    assert address_of("https://head") == "https://head"
    with pytest.raises(ConfigError, match="a dashboard's address reads"):
        address_of("ray://head:10001")


def test_names_and_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    args = cli.parse(["submit", "demo", "--name", "mine"])
    assert job_config(load_config("demo", []), args).run.folder == "runs/mine"
    with pytest.raises(ConfigError, match="leave one out"):
        job_config(load_config("demo", []), cli.parse(["submit", "demo", "run.folder=x", "--name", "mine"]))
    with pytest.raises(ConfigError, match="names no run"):
        check_name("a b")
    monkeypatch.setenv("HASTE_TEST_KEY", "from here")
    assert read_environment(["A=b=c", "HASTE_TEST_KEY", "B="]) == {"A": "b=c", "HASTE_TEST_KEY": "from here", "B": ""}
    with pytest.raises(ConfigError, match="--env NOSUCH: not set here"):
        read_environment(["NOSUCH"])


def job(name: str, status: str, folder: str = "", code: int | None = None, message: str = "") -> SimpleNamespace:
    state = SimpleNamespace(value=status, is_terminal=lambda: status not in {"PENDING", "RUNNING"})
    metadata = {"haste_run": name.rpartition("-")[0], "haste_folder": folder}
    return SimpleNamespace(submission_id=name, start_time=0, status=state, metadata=metadata, driver_exit_code=code, message=message)


def test_jobs_of_a_run_are_numbered_and_alone() -> None:
    jobs = [job("a-1", "FAILED", "/r/a"), job("a-10", "STOPPED", "/r/a"), job("b-3", "RUNNING", "/r/b"), job("a-x", "RUNNING")]
    client = SimpleNamespace(list_jobs=lambda: jobs)
    assert next_id(client, "a", "/r/a") == "a-11"  # type: ignore[arg-type]
    assert next_id(client, "b", "/elsewhere/b") == "b-4"  # type: ignore[arg-type]
    with pytest.raises(HasteError, match="job b-3 is at work in /r/b"):
        next_id(client, "b", "/r/b")  # type: ignore[arg-type]


def test_a_cluster_that_has_just_started_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "AGAIN_SECONDS", 0.0)
    refusals = ["Request failed with status code 500: No available agent to submit job, please try again later"] * 2
    taken: list[dict] = []

    def submit_job(**job: str) -> None:
        if refusals:
            raise RuntimeError(refusals.pop())
        taken.append(job)

    submit.hand_over(SimpleNamespace(submit_job=submit_job), submission_id="a-1")  # type: ignore[arg-type]
    assert taken == [{"submission_id": "a-1"}]
    refusals.extend(["No available agent"] * 9)
    monkeypatch.setattr(submit, "AGENT_SECONDS", -1.0)
    with pytest.raises(HasteError, match=r"no node of this cluster takes jobs: .* --dashboard-agent-listen-port=PORT"):
        submit.hand_over(SimpleNamespace(submit_job=submit_job), submission_id="a-2")  # type: ignore[arg-type]
    refusals[:] = ["Request failed with status code 500: another"]
    with pytest.raises(RuntimeError, match="another"):
        submit.hand_over(SimpleNamespace(submit_job=submit_job), submission_id="a-3")  # type: ignore[arg-type]


def test_how_a_job_ended() -> None:
    assert follow.exit_status(job("a-1", "SUCCEEDED", code=0)) == 0  # type: ignore[arg-type]
    assert follow.exit_status(job("a-1", "FAILED", code=3)) == 3  # type: ignore[arg-type]
    assert follow.exit_status(job("a-1", "FAILED", code=-9)) == 1  # type: ignore[arg-type]
    with pytest.raises(Interrupted, match="job a-1 was stopped"):
        follow.exit_status(job("a-1", "STOPPED"))  # type: ignore[arg-type]
    with pytest.raises(HasteError, match="failed before its command ended: no room"):
        follow.exit_status(job("a-1", "FAILED", message="no\nroom"))  # type: ignore[arg-type]


def test_a_log_is_shown_once_across_broken_connections(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each connection sends the log from its start, in chunks that do not end with lines."""
    monkeypatch.setattr(follow, "AGAIN_SECONDS", 0.0)
    sent = iter((["one\ntw"], ["one", "\ntwo\nthr"], ["one\ntwo\nthree\n", "step 4 of 5  epoch 1\nfour"]))
    statuses = iter(("RUNNING", "SUCCEEDED"))

    async def tail(_: str) -> AsyncIterator[str]:
        chunks = next(sent)
        for chunk in chunks:
            yield chunk
        if chunks == ["one\ntw"]:
            raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")

    client = SimpleNamespace(tail_job_logs=tail, get_job_info=lambda name: job(name, next(statuses)))
    assert follow.Stream(client, "a-1").run().status.value == "SUCCEEDED"  # type: ignore[arg-type]
    assert capsys.readouterr().out == "one\ntwo\nthree\nstep 4 of 5  epoch 1\nfour\n"


def test_ctrl_c_is_not_lost_in_a_connection_that_closes(capsys: pytest.CaptureFixture[str]) -> None:
    """It comes while a line is printed, and what is cancelled by it says so with an error of its own."""

    class Client:
        calls = 0

        async def tail_job_logs(self, _: str) -> AsyncIterator[str]:
            self.calls += 1
            assert self.calls == 1, "went on"
            yield "one\n"
            os.kill(os.getpid(), signal.SIGINT)
            try:
                await asyncio.sleep(20)
            except asyncio.CancelledError:
                raise aiohttp.ClientError("closing") from None

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="job a-1 goes on"):
        follow.follow(Client(), "a-1", "leave")  # type: ignore[arg-type]
    assert capsys.readouterr().out == "one\n"
    assert signal.getsignal(signal.SIGINT) is before


def test_the_shell_line_starts_where_relative_paths_do(tmp_path: Path) -> None:
    (tmp_path / "a folder").mkdir()
    python = tmp_path / "py thon"
    python.write_text('#!/bin/sh\necho "$PWD" "$@"\nexit 7\n')
    python.chmod(0o755)
    line = entrypoint("train", str(python), str(tmp_path / "a folder"))
    done = subprocess.run(["/bin/sh", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (7, f"{tmp_path}/a folder -m haste_launch.cli train {tmp_path}/config.yaml\n")


def test_the_packages_go_whole_and_import_elsewhere(tmp_path: Path) -> None:
    folders = copy_packages(tmp_path)
    assert [Path(folder).name for folder in folders] == ["haste_conf", "haste_dist", "haste_kernels", "haste_launch"]
    code = "import haste_kernels.backend, haste_dist.config as c; c.load_config('demo'); print(haste_kernels.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(str(tmp_path))
