"""Load on `haste serve`: latencies and rates at several numbers of clients, then a soak in which the checkpoint changes again and again.

    python benchmarks/serve.py runs/demo --texts data/icd10/tst.json.gz --clients 1,8,64 --seconds 20
    python benchmarks/serve.py runs/demo --texts data/icd10/tst.json.gz --clients 8 --soak 600 --reload-every 15

Starts the service itself, on a free port. Every answer is checked: status 200, as many texts as were sent, k labels each, a checkpoint that
is there. Settings of the service may follow as a.b=c. Figures go to the topic serve_soak.
"""

import argparse
import asyncio
import gzip
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from haste_dist.checkpoint import complete, folder_name, point, read_page, step_of
from haste_dist.export import is_export
from haste_dist.records import append_record
from haste_dist.sealed import seal

K = 5


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--texts", type=Path, required=True, help="JSON lines with a title or text")
    parser.add_argument("--clients", default="1,8,64")
    parser.add_argument("--seconds", type=float, default=20.0, help="a number of clients is measured")
    parser.add_argument("--per-request", type=int, default=1, help="texts of a request")
    parser.add_argument("--soak", type=float, default=0.0, help="seconds with the last number of clients while checkpoints change")
    parser.add_argument("--reload-every", type=float, default=15.0)
    parser.add_argument("--records", default="none")
    args = parser.parse_args()
    texts = read_texts(args.texts)
    run = args.run
    if args.soak:  # on a copy, whose checkpoints are moved about
        run = run.with_name(run.name + "-soak")
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(args.run, run)
        twin(run)
    port, token = free_port(), secrets.token_urlsafe(32)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # so that the service ends, too
    server = subprocess.Popen(
        [sys.executable, "-m", "haste_launch.cli", "serve", str(run), f"serve.port={port}", "serve.reload=1", *args.overrides],
        env={**os.environ, "HASTE_SERVE_TOKEN": token},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert server.stdout is not None
        started = time.perf_counter()
        line = server.stdout.readline()
        if not line.startswith("serving"):
            raise SystemExit(f"the service did not start: {line}")
        print(f"{line.strip()} after {time.perf_counter() - started:.1f} s", flush=True)
        labels = asyncio.run(about(port))["labels"]
        asyncio.run(load(port, token, texts, 4, min(3.0, args.seconds), args.per_request))  # warm
        for clients in map(int, args.clients.split(",")):
            figures = asyncio.run(load(port, token, texts, clients, args.seconds, args.per_request))
            tell(figures, labels, args.records, "load")
        if args.soak:
            figures = asyncio.run(soak(run, port, token, texts, clients, args))
            tell(figures, labels, args.records, "soak")
            if figures["errors"]:
                raise SystemExit(f"{figures['errors']} errors")
    finally:
        server.send_signal(signal.SIGTERM)
        code = server.wait(60)
        if args.soak:
            shutil.rmtree(run, ignore_errors=True)
        print(f"the service ended with {code}")


def tell(figures: dict, labels: int, records: str, kind: str) -> None:
    print(json.dumps(figures), flush=True)
    if records != "none":
        append_record("serve_soak", "haste_dist", {"L": labels, "K": K}, {"kind": kind, **figures}, records)


async def load(port: int, token: str, texts: list[str], clients: int, seconds: float, per_request: int) -> dict:
    """``clients`` at once, each with a connection of its own that sends the next request when the last is answered."""
    stop = time.perf_counter() + seconds
    times: list[float] = []
    versions: set[str] = set()
    errors: list[str] = []

    async def client(number: int) -> None:
        rng = np.random.default_rng(number)
        connection = Connection(port, token)
        while time.perf_counter() < stop:
            asked = [texts[i] for i in rng.integers(0, len(texts), per_request)]
            begun = time.perf_counter()
            try:
                status, page = await connection.post("/predict", {"texts": asked, "k": K})
                if status != 200 or [len(one) for one in page["predictions"]] != [K] * per_request:
                    errors.append(f"{status} {str(page)[:100]}")
                else:
                    versions.add(page["model"])
                times.append(time.perf_counter() - begun)
            except (OSError, asyncio.IncompleteReadError, ValueError) as error:
                errors.append(repr(error))
                connection = Connection(port, token)
        await connection.close()

    begun = time.perf_counter()
    await asyncio.gather(*map(client, range(clients)))
    took = time.perf_counter() - begun
    p50, p95, p99, worst = (1000 * float(v) for v in np.quantile(times, [0.5, 0.95, 0.99, 1.0]))
    for error in errors[:5]:
        print(error, file=sys.stderr)
    return {
        "clients": clients,
        "texts_a_request": per_request,
        "seconds": round(took, 1),
        "requests": len(times),
        "requests_per_s": round(len(times) / took, 1),
        "p50_ms": round(p50, 2),
        "p95_ms": round(p95, 2),
        "p99_ms": round(p99, 2),
        "max_ms": round(worst, 1),
        "errors": len(errors),
        "versions": len(versions),
        "load_average": round(os.getloadavg()[0], 1),
    }


async def soak(run: Path, port: int, token: str, texts: list[str], clients: int, args: argparse.Namespace) -> dict:
    """Load, while ``best`` means one checkpoint and then another."""
    saved = run / "checkpoints"
    steps = [step_of(path) for path in complete(saved)]

    async def switch() -> None:
        turn = 0
        while True:
            await asyncio.sleep(args.reload_every)
            turn += 1
            point(saved, "best", steps[turn % len(steps)])

    switching = asyncio.create_task(switch())
    figures = await load(port, token, texts, clients, args.soak, args.per_request)
    switching.cancel()
    return {**figures, "reloads": (await about(port))["reloads"]}


def twin(run: Path) -> None:
    """A second checkpoint, the newest again under the next step's name."""
    assert not is_export(run), "a soak needs a run folder"
    saved = run / "checkpoints"
    newest = complete(saved)[-1]
    copy = saved / folder_name(step_of(newest) + 1)
    shutil.copytree(newest, copy)
    page = read_page(copy)
    page["state"]["step"] += 1
    page.pop("checksum", None)
    (copy / "state.json").write_bytes(seal(page))


class Connection:
    """HTTP/1.1 over one connection that is kept; answers carry a length or come in chunks."""

    def __init__(self, port: int, token: str) -> None:
        self.port, self.token = port, token
        self.streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def post(self, path: str, page: dict) -> tuple[int, dict]:
        body = json.dumps(page).encode()
        head = f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nauthorization: Bearer {self.token}\r\ncontent-type: application/json\r\n"
        return await self._ask(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)

    async def get(self, path: str) -> tuple[int, dict]:
        return await self._ask(f"GET {path} HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n".encode())

    async def _ask(self, request: bytes) -> tuple[int, dict]:
        if self.streams is None:
            self.streams = await asyncio.open_connection("127.0.0.1", self.port)
        reader, writer = self.streams
        writer.write(request)
        await writer.drain()
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        status = int(head.split()[1])
        if "transfer-encoding: chunked" in head:
            body = b""
            while size := int(await reader.readline(), 16):
                body += (await reader.readexactly(size + 2))[:-2]
            await reader.readline()
        else:
            body = await reader.readexactly(int(head.split("content-length: ")[1].split("\r\n")[0]))
        if "connection: close" in head:
            await self.close()
        return status, json.loads(body)

    async def close(self) -> None:
        if self.streams is not None:
            self.streams[1].close()
            self.streams = None


async def about(port: int) -> dict:
    connection = Connection(port, "")
    _, page = await connection.get("/ready")
    await connection.close()
    return page


def read_texts(path: Path) -> list[str]:
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        return [page.get("text") or page["title"] for page in map(json.loads, file)]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


if __name__ == "__main__":
    main()
