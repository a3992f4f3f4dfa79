"""The HTTP service without Ray: what it answers, what it refuses and how, and that no request breaks it."""

import asyncio
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    allow_header_conformance,
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.testclient import TestClient
from tiny import FULL

from haste_dist.gate import Gate, ServiceMetrics, token_digest
from haste_dist.service import PAGE, build_service, content_policy
from haste_dist.use_config import ServeConfig

TOKEN = "a token of some length"
KNOWN = {"authorization": f"Bearer {TOKEN}"}
SMALL = ServeConfig(max_texts=4, max_chars=100, max_bytes=2000, max_k=10, timeout=0.5, batch_size=4, waiting=3)


async def ask(texts: list[str], k: int, neighbours: int) -> dict[str, Any]:
    """Label i at place i; a text 'slow' takes longer than is allowed."""
    if "slow" in texts:
        await asyncio.sleep(10)
    for text in texts:
        text.encode()  # as a tokenizer would
    labels = [
        {"label": i, "text": f"label {i}", "score": 0.5, "group": i or None, "neighbours": ["near"] * (neighbours if i else 0)}
        for i in range(k)
    ]
    return {"model": "step-00000001", "predictions": [labels] * len(texts), "batch": len(texts), "step": 1}


async def ready() -> dict[str, Any]:
    return {"model": "step-00000001", "labels": 7, "reloads": 0, "reload_error": ""}


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    with TestClient(build_service(SMALL, ask, ready, token_digest(TOKEN))) as one:
        yield one


def test_an_answer(client: TestClient) -> None:
    answer = client.post("/predict", json={"texts": ["a", "b"], "k": 3, "neighbours": 2}, headers=KNOWN)
    assert answer.status_code == 200
    page = answer.json()
    assert set(page) == {"model", "predictions"}
    assert [[one["label"] for one in labels] for labels in page["predictions"]] == [[0, 1, 2]] * 2
    assert page["predictions"][0][1]["neighbours"] == ["near", "near"]
    assert [len(labels) for labels in client.post("/predict", json={"texts": ["a"]}, headers=KNOWN).json()["predictions"]] == [5]


@pytest.mark.parametrize("path", ["/health", "/ready", "/openapi.json", "/docs", "/"])
def test_open_pages(client: TestClient, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 200
    assert answer.headers["x-content-type-options"] == "nosniff"


BAD_TOKENS = [{}, {"authorization": "Bearer wrong"}, {"authorization": f"Basic {TOKEN}"}, {"authorization": TOKEN}, {"authorization": ""}]


@pytest.mark.parametrize("headers", BAD_TOKENS)
@pytest.mark.parametrize(("method", "path"), [("post", "/predict"), ("get", "/metrics"), ("delete", "/predict")])
def test_without_the_token(client: TestClient, method: str, path: str, headers: dict[str, str]) -> None:
    answer = client.request(method, path, headers=headers)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"].startswith("Bearer")
    assert TOKEN not in answer.text


def test_without_authentication_everybody_may_ask() -> None:
    with TestClient(build_service(SMALL, ask, ready, None)) as one:
        assert one.post("/predict", json={"texts": ["a"]}).status_code == 200


REFUSED: dict[str, tuple[int, Any]] = {
    "no JSON": (422, b"{"),
    "deep JSON": (400, b"[" * 1900),
    "no object": (422, b"[1]"),
    "no texts": (422, {"k": 3}),
    "texts is a string": (422, {"texts": "a"}),
    "an empty list": (422, {"texts": []}),
    "too many texts": (422, {"texts": ["a"] * 5}),
    "an empty text": (422, {"texts": [""]}),
    "a blank text": (422, {"texts": [" \n\t"]}),
    "a long text": (422, {"texts": ["a" * 101]}),
    "no text": (422, {"texts": [3]}),
    "NaN": (422, b'{"texts": [NaN]}'),
    "half a surrogate": (422, b'{"texts": ["\\ud800"]}'),
    "half a surrogate as a name": (422, b'{"texts": ["a"], "\\ud800": 1}'),
    "an endless number": (400, b'{"texts": ["a"], "k": ' + b"9" * 1900 + b"}"),
    "k = 0": (422, {"texts": ["a"], "k": 0}),
    "a large k": (422, {"texts": ["a"], "k": 11}),
    "k is true": (422, {"texts": ["a"], "k": True}),
    "k is a string": (422, {"texts": ["a"], "k": "3"}),
    "an unknown word": (422, {"texts": ["a"], "temperature": 1}),
    "many neighbours": (422, {"texts": ["a"], "neighbours": 128}),
    "too large": (413, {"texts": ["a" * 3000]}),
}


@pytest.mark.parametrize(("status", "body"), REFUSED.values(), ids=REFUSED.keys())
def test_bad_requests(client: TestClient, status: int, body: Any) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = client.post("/predict", content=data, headers={**KNOWN, "content-type": "application/json"})
    assert (answer.status_code == status) or (status == 400 and answer.status_code == 422), answer.text
    detail = answer.json()["detail"]
    assert "a" * 101 not in json.dumps(detail), "what was sent is not sent back"


def test_too_large_without_a_length(client: TestClient) -> None:
    answer = client.post("/predict", content=iter([b"x" * 900] * 3), headers=KNOWN)
    assert answer.status_code == 413


def test_a_model_that_takes_too_long(client: TestClient) -> None:
    answer = client.post("/predict", json={"texts": ["slow"]}, headers=KNOWN)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")


def run_gate(messages: list[dict[str, Any] | float], headers: dict[str, str], gate: Gate | None = None) -> list[dict[str, Any]]:
    """What the gate sends for a request that comes in pieces; a number is a pause of so many seconds."""
    sent: list[dict[str, Any]] = []

    async def receive() -> Any:
        while messages and isinstance(messages[0], float):
            await asyncio.sleep(messages.pop(0))  # type: ignore[arg-type]
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "path": "/predict", "method": "POST", "headers": [(a.encode(), b.encode()) for a, b in headers.items()]}
    gate = gate or Gate(never, SMALL, token_digest(TOKEN), ServiceMetrics(), {"/predict"})
    asyncio.run(gate(scope, receive, send))
    return sent


async def never(scope: Any, receive: Any, send: Any) -> None:
    raise AssertionError("the request came through")


def test_a_slow_client_is_told_so() -> None:
    piece: dict[str, Any] = {"type": "http.request", "body": b"x", "more_body": True}
    sent = run_gate([piece, 0.3, piece, 0.3, piece], KNOWN)
    assert sent[0]["status"] == 408
    assert (b"connection", b"close") in sent[0]["headers"]


def test_a_client_that_leaves_gets_nothing() -> None:
    assert run_gate([{"type": "http.disconnect"}], KNOWN) == []


@pytest.mark.parametrize("length", ["2001", "99999999999999999999", "-1", "many"])
def test_a_length_that_is_too_large_or_none_is_refused_unread(length: str) -> None:
    assert run_gate([], {**KNOWN, "content-length": length})[0]["status"] == 413


def test_the_token_comes_first() -> None:
    """A stranger's body is not read, and tells nothing of the limits."""
    assert run_gate([], {"content-length": "99999"})[0]["status"] == 401


def test_too_many_at_once_are_sent_away() -> None:
    gate = Gate(never, SMALL, token_digest(TOKEN), ServiceMetrics(), {"/predict"})
    gate.working = SMALL.waiting
    sent = run_gate([], KNOWN, gate)
    assert sent[0]["status"] == 429
    assert (b"retry-after", b"1") in sent[0]["headers"]
    assert gate.working == SMALL.waiting


def test_metrics_count_what_happened(client: TestClient) -> None:
    def value(name: str) -> float:
        text = client.get("/metrics", headers=KNOWN).text
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    names = ('haste_requests_total{path="/predict",status="200"}', "haste_texts_total", 'haste_requests_total{path="other",status="404"}')
    before = [value(name) for name in names]
    client.post("/predict", json={"texts": ["a", "b", "c"]}, headers=KNOWN)
    client.get("/no/such/page")
    assert [value(name) - old for name, old in zip(names, before, strict=True)] == [1.0, 3.0, 1.0]
    assert value("haste_model_step") == 1.0


def test_pages_load_nothing_from_elsewhere(client: TestClient) -> None:
    for path in ("/", "/docs"):
        answer = client.get(path)
        assert not re.findall(r"(?:src|href)=[\"']?(?:https?:)?//", answer.text), path
        assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert re.search(r"script-src 'sha256-", content_policy(PAGE.read_text()))
    assert "script-src 'none'" in content_policy("<style>a{}</style>")


def test_the_interface_describes_itself(client: TestClient) -> None:
    page = client.get("/openapi.json").json()
    assert set(page["paths"]) == {"/predict", "/health", "/ready", "/metrics"}
    assert page["paths"]["/predict"]["post"]["security"] == [{"HTTPBearer": []}]
    assert {"200", "401", "408", "413", "422", "429", "503"} <= set(page["paths"]["/predict"]["post"]["responses"])
    docs = client.get("/docs").text
    assert all(f"<code>{method} {path}</code>" in docs for method, path in (("POST", "/predict"), ("GET", "/metrics")))


CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance, allow_header_conformance]


@pytest.mark.slow
def test_no_request_that_its_description_allows_or_forbids_breaks_it() -> None:
    """Requests that schemathesis makes up from the service's own description."""
    app = build_service(ServeConfig(timeout=5.0), ask, ready, token_digest(TOKEN))
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    seen = set()
    for operation in (found.ok() for found in schema.get_all_operations()):
        for mode in GenerationMode if operation.path == "/predict" else [GenerationMode.POSITIVE]:

            @settings(max_examples=400 if FULL else 20, deadline=None, suppress_health_check=list(HealthCheck), database=None)
            @given(case=operation.as_strategy(generation_mode=mode))
            def check(case: schemathesis.Case) -> None:
                answer = case.call(headers=KNOWN)
                seen.add((case.path, answer.status_code))
                case.validate_response(answer, checks=CHECKS)

            check()
    assert {("/predict", 200), ("/predict", 422), ("/metrics", 200)} <= seen
