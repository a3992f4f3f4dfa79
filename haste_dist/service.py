"""The HTTP service: POST /predict, and what goes with it. Knows neither Ray nor the model: ``ask`` answers.

POST /predict        texts, k, neighbours -> ranked labels       token
GET  /metrics        for Prometheus                              token
GET  /health         the service runs
GET  /ready          the model answers, and which one it is
GET  /openapi.json   the interface, and /docs, a page about it
GET  /               a page to try it
"""

import asyncio
import base64
import hashlib
import html
import json
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from haste_dist import __version__
from haste_dist.gate import App, Gate, ServiceMetrics
from haste_dist.use_config import ServeConfig

PAGE = Path(__file__).with_name("page.html")
TITLE = "haste: ranked labels for texts"
MOST_NEIGHBOURS = 127


class RankedLabel(BaseModel):
    """A label of a text."""

    label: int = Field(description="number of the label in the data that the model was trained on")
    text: str = Field(description="what the label is called")
    score: float = Field(ge=0, le=1, description="how likely it is")
    group: int | None = Field(description="group of labels that read the same features; null for a frequent label, which reads all")
    neighbours: list[str] = Field(description="other labels of the group, as many as were asked for")


class Answer(BaseModel):
    """The labels of each text, best first."""

    model: str = Field(description="checkpoint that answered")
    predictions: list[list[RankedLabel]]


class Refusal(BaseModel):
    """Why a request was refused."""

    detail: Any


class Ready(BaseModel):
    """Which model answers."""

    model: str
    labels: int
    reloads: int = Field(description="checkpoints that took over since the start")
    reload_error: str = Field(description="why the newest checkpoint could not; empty if it could")


class Health(BaseModel):
    """The service runs."""

    status: str


Ask = Callable[[list[str], int, int], Awaitable[dict[str, Any]]]
"""(texts, k, neighbours) -> an Answer, with ``batch``, how many texts were computed together, and ``step``."""


def build_service(settings: ServeConfig, ask: Ask, ready: Callable[[], Awaitable[dict[str, Any]]], digest: bytes | None) -> App:
    """The ASGI application behind its gate. ``digest``: of the token; None lets everybody in."""
    metrics = ServiceMetrics()
    app = FastAPI(title=TITLE, version=__version__, docs_url=None, redoc_url=None)  # FastAPI's own pages load scripts from elsewhere
    _add_pages(app)
    _add_predict(app, settings, ask, metrics)
    token = [Depends(HTTPBearer(auto_error=False))]  # for the documentation: the gate has looked at it

    @app.get("/health", response_model=Health)
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready", response_model=Ready, responses={503: {"model": Refusal, "description": "the model does not answer"}})
    async def is_ready() -> Any:
        try:
            async with asyncio.timeout(settings.timeout):
                return await ready()
        except TimeoutError:
            raise HTTPException(503, "the model does not answer") from None

    @app.get("/metrics", dependencies=token, response_class=Response, responses={401: {"model": Refusal}})
    async def prometheus() -> Response:
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        """Without what was sent: it may be long, or no text that JSON can hold."""
        detail = [{"loc": list(one["loc"]), "msg": one["msg"], "type": one["type"]} for one in error.errors()]
        return Response(json.dumps({"detail": detail}), 422, media_type="application/json")

    paths = {path for route in app.routes if (path := getattr(route, "path", ""))}
    return Gate(app, settings, digest, metrics, paths)


def _add_predict(app: FastAPI, settings: ServeConfig, ask: Ask, metrics: ServiceMetrics) -> None:
    Text = Annotated[str, StringConstraints(max_length=settings.max_chars, pattern=r"\S")]

    class Question(BaseModel):
        """What to rank labels for."""

        model_config = ConfigDict(extra="forbid")
        texts: list[Text] = Field(min_length=1, max_length=settings.max_texts, examples=[["high blood pressure"]])  # type: ignore[valid-type]
        k: int = Field(5, strict=True, ge=1, le=settings.max_k, description="labels a text")
        neighbours: int = Field(0, strict=True, ge=0, le=MOST_NEIGHBOURS, description="other labels of each label's group to name")

    told = {
        400: "not JSON",
        401: "no token, or a wrong one",
        408: "the request did not arrive in time",
        413: "the request is too large",
        429: "too many requests at once; Retry-After says when to come back",
        503: "no answer in time",
    }

    async def predict(question: Question) -> Any:
        try:
            async with asyncio.timeout(settings.timeout):
                answer = await ask(question.texts, question.k, question.neighbours)
        except TimeoutError:
            raise HTTPException(503, "no answer in time", {"Retry-After": "1"}) from None
        metrics.texts.inc(len(question.texts))
        metrics.batch.observe(answer.pop("batch"))
        metrics.step.set(answer.pop("step"))
        return JSONResponse(answer)  # as it is: checking it against the model again would take longer than making it

    app.post(
        "/predict",
        dependencies=[Depends(HTTPBearer(auto_error=False))],
        response_model=Answer,
        responses={status: {"model": Refusal, "description": why} for status, why in told.items()},
    )(predict)


def _add_pages(app: FastAPI) -> None:
    page = PAGE.read_text(encoding="utf-8")

    @app.get("/", include_in_schema=False)
    async def try_it() -> Response:
        return HTMLResponse(page, headers={"content-security-policy": content_policy(page)})

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        text = describe_interface(app.openapi())
        return HTMLResponse(text, headers={"content-security-policy": content_policy(text)})


def content_policy(page: str) -> str:
    """A policy that lets the page's own style and script run, and nothing else load."""
    hashes = {}
    for tag in ("style", "script"):
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in found]
        hashes[tag] = " ".join(f"'sha256-{digest}'" for digest in digests) or "'none'"
    own = f"style-src {hashes['style']}; script-src {hashes['script']}"
    return f"default-src 'none'; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; {own}"


def describe_interface(openapi: dict[str, Any]) -> str:
    """The OpenAPI page as HTML that needs nothing from elsewhere."""
    style = (
        "body{font:16px/1.5 system-ui,sans-serif;max-width:52rem;margin:2rem auto;padding:0 1rem}table{border-collapse:collapse}"
        "td,th{text-align:left;padding:.2rem .8rem .2rem 0;vertical-align:top}pre{overflow:auto;background:#8881;padding:.6rem}"
        ":root{color-scheme:light dark}"
    )
    parts = [f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'><title>{TITLE}</title>"]
    parts.append(f"<style>{style}</style><h1>{TITLE}</h1><p>As data: <a href=openapi.json>openapi.json</a>. To try it: <a href=.>/</a>.")
    for path, methods in openapi["paths"].items():
        for method, about in methods.items():
            needs = " <small>with Authorization: Bearer TOKEN</small>" if about.get("security") else ""
            parts.append(f"<h2><code>{method.upper()} {html.escape(path)}</code>{needs}</h2><table>")
            for status, answer in about["responses"].items():
                parts.append(f"<tr><th>{status}<td>{html.escape(answer.get('description', ''))}")
            parts.append("</table>")
    for name, schema in openapi["components"]["schemas"].items():
        shown = html.escape(json.dumps({key: value for key, value in schema.items() if key != "title"}, indent=1))
        parts.append(f"<h2>{html.escape(name)}</h2><pre>{shown}</pre>")
    return "\n".join(parts)
