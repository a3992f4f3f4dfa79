"""What every request passes before the service sees it: who asks, how much, how fast, and how many at once.

Plain ASGI, so that a request is refused before its body is parsed, or even read. A refusal is JSON, {"detail": why}:
    401  no token, or a wrong one                  408  the request did not arrive in time
    413  more bytes than allowed, told or not      429  too many requests in work; Retry-After says when
All answers are counted and timed, refusals too.
"""

import asyncio
import hashlib
import hmac
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from haste_dist.use_config import ServeConfig

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

PROTECTED = ("/predict", "/metrics")
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
HEADERS = [(b"x-content-type-options", b"nosniff"), (b"x-frame-options", b"DENY"), (b"referrer-policy", b"no-referrer")]


class ServiceMetrics:
    """What Prometheus reads."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("haste_requests", "Requests answered.", ["path", "status"], registry=self.registry)
        self.seconds = Histogram("haste_request_seconds", "Time to an answer.", ["path"], buckets=SECONDS, registry=self.registry)
        self.working = Gauge("haste_requests_in_work", "Requests being answered.", registry=self.registry)
        self.texts = Counter("haste_texts", "Texts answered.", registry=self.registry)
        sizes = [2**i for i in range(13)]
        self.batch = Histogram("haste_batch_texts", "Texts computed together with a request's.", buckets=sizes, registry=self.registry)
        self.step = Gauge("haste_model_step", "Training step of the model that answered last.", registry=self.registry)


def token_digest(token: str) -> bytes:
    """What is kept of a token where it is compared."""
    return hashlib.sha256(token.encode()).digest()


class Gate:
    """Wraps the service. ``digest``: of the token; None lets everybody in."""

    def __init__(self, app: App, settings: ServeConfig, digest: bytes | None, metrics: ServiceMetrics, paths: set[str]):
        """``paths``: those that the service has; others are counted together."""
        self.app, self.settings, self.digest, self.metrics, self.paths = app, settings, digest, metrics, paths
        self.working = 0

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        path, started, status = scope["path"], time.perf_counter(), 0

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), *HEADERS]
            await send(message)

        self.working += 1
        self.metrics.working.set(self.working)
        try:
            await self._answer(scope, receive, counted)
        finally:
            self.working -= 1
            self.metrics.working.set(self.working)
            known = path if path in self.paths else "other"
            self.metrics.requests.labels(known, str(status)).inc()
            self.metrics.seconds.labels(known).observe(time.perf_counter() - started)

    async def _answer(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        if scope["path"] in PROTECTED:
            if not self._knows(headers.get(b"authorization", b"")):
                told = "a bearer token is needed: Authorization: Bearer TOKEN"
                return await refuse(send, 401, told, [(b"www-authenticate", b'Bearer realm="haste"')])
            if self.working > self.settings.waiting:
                return await refuse(send, 429, "too many requests at once; come back in a second", [(b"retry-after", b"1")])
        most = self.settings.max_bytes
        too_large = f"the request has more than {most:,} bytes"
        length = headers.get(b"content-length", b"0")
        if not length.isdigit() or int(length) > most:
            return await refuse(send, 413, too_large)
        body = bytearray()
        try:
            async with asyncio.timeout(self.settings.timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    body += message.get("body", b"")
                    if len(body) > most:
                        return await refuse(send, 413, too_large)
                    if not message.get("more_body"):
                        break
        except TimeoutError:
            told = f"the request did not arrive within {self.settings.timeout:g} s"
            return await refuse(send, 408, told, [(b"connection", b"close")])
        whole: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def again() -> Message:
            return whole.pop() if whole else await receive()

        await self.app(scope, again, send)

    def _knows(self, given: bytes) -> bool:
        """Digests are compared, in a time that tells nothing of the token."""
        scheme, _, token = given.partition(b" ")
        digest = hashlib.sha256(token.strip()).digest()
        return self.digest is None or (scheme.lower() == b"bearer" and hmac.compare_digest(digest, self.digest))


async def refuse(send: Send, status: int, why: str, headers: list[tuple[bytes, bytes]] | None = None) -> None:
    """An answer that the service itself never saw."""
    body = json.dumps({"detail": why}).encode()
    about = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *(headers or [])]
    await send({"type": "http.response.start", "status": status, "headers": about})
    await send({"type": "http.response.body", "body": body})
