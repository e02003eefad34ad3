"""The routes of the labelling page.

Which answer is which is known only here: a browser gets the two texts in the order in which they are shown,
and sends back left or right. Whether a pair is shown for the second time is not sent either.
"""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from starlette.exceptions import HTTPException as StarletteHTTPException

from polar_ft.data.records import Message, Text
from polar_ft.errors import PolarError
from polar_ft.labelling.store import ChangedError, Labeller, Store
from polar_ft.serving.bodies import read_body
from polar_ft.serving.connections import Connections
from polar_ft.serving.guard import OPEN_ROUTE, Guard, error_response, html_page
from polar_ft.serving.limits import InUse, Limits
from polar_ft.serving.telemetry import Metrics

PAGE = Path(__file__).with_name("page.html")

_PROMPT: TypeAdapter[str | list[Message]] = TypeAdapter(Text)


class _Form(BaseModel):
    model_config = ConfigDict(extra="forbid")

    labeller: Annotated[str, Field(max_length=100)]


class NextForm(_Form):
    """Body of /v1/next: whose turn it is."""


class UndoForm(_Form):
    """Body of /v1/undo: with the number of decisions that the page knows of."""

    number: int


class DecideForm(UndoForm):
    """Body of /v1/decide."""

    pair: Annotated[str, Field(max_length=100)]
    choice: Literal["left", "right", "tie", "skip"]
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]


class Labelling:
    """A folder of decisions and what the server needs: `polar_ft.serving.connections.HttpServer` reads it.

    Args:
        store: The folder.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.limits = Limits(max_body=2**14, max_connections=256, timeout=30)
        self.in_use = InUse()
        self.metrics = Metrics(lambda: 0, lambda: self.in_use.requests, lambda: self.connections.count)
        self.connections = Connections(self.limits, self.metrics)
        self._one_at_a_time = threading.Lock()

    async def answer(self, request: Request, form: TypeAdapter[Any]) -> Response:
        """Answers a request of the page: does what its body says, and shows what is next."""
        kind = request.headers.get("content-type", "")
        body = read_body(await request.body(), kind, form, self.limits)
        # In a thread: it waits for the disk.
        return JSONResponse(await asyncio.to_thread(self._do, body))

    def _do(self, body: NextForm | UndoForm | DecideForm) -> dict[str, Any]:
        with self._one_at_a_time:
            labeller = self.store.labeller(body.labeller)
            if isinstance(body, DecideForm):
                labeller.decide(body.number, body.pair, body.choice, body.seconds)
            elif isinstance(body, UndoForm):
                labeller.undo(body.number)
            return _state(labeller)


def _state(labeller: Labeller) -> dict[str, Any]:
    """What the page shows."""
    shown = labeller.next()
    done, total = labeller.progress
    state: dict[str, Any] = {"labeller": labeller.name, "number": len(labeller.decisions)}
    state |= {"done": done, "total": total, "pair": None}
    if shown is not None:
        pair = shown.pair
        prompt = _PROMPT.validate_python(pair.prompt)
        turns = [("", prompt)] if isinstance(prompt, str) else [(turn.role, turn.content) for turn in prompt]
        state["pair"] = {
            "key": pair.key,
            "prompt": [{"role": role, "content": content} for role, content in turns],
            "reference": pair.reference,
            "answers": [pair.answers[shown.left].text, pair.answers[1 - shown.left].text],
        }
    return state


def create_app(store: Store, *, api_key: str | None = None, loopback_only: bool = False) -> FastAPI:
    """Creates the ASGI application.

    Args:
        store: The folder of decisions.
        api_key: Key that every route except /health requires.
        loopback_only: See `polar_ft.serving.guard.Guard`.
    """
    labelling = Labelling(store)
    app = FastAPI(title="polar_ft labelling", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.server = labelling
    app.add_middleware(
        Guard,
        limits=labelling.limits,
        metrics=labelling.metrics,
        in_use=labelling.in_use,
        connections=labelling.connections,
        api_key=api_key,
        loopback_only=loopback_only,
        page=PAGE,
    )
    _answer_errors(app)
    for path, form in (("next", NextForm), ("decide", DecideForm), ("undo", UndoForm)):
        _add_route(app, labelling, f"/v1/{path}", TypeAdapter[Any](form))

    @app.get(OPEN_ROUTE)
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/")
    async def page() -> Response:
        return html_page(PAGE)

    return app


def _add_route(app: FastAPI, labelling: Labelling, path: str, form: TypeAdapter[Any]) -> None:
    @app.post(path)
    async def answer(request: Request) -> Response:
        return await labelling.answer(request, form)


def _answer_errors(app: FastAPI) -> None:
    @app.exception_handler(StarletteHTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        return error_response(error.status_code, error.detail, dict(error.headers or {}))

    @app.exception_handler(PolarError)
    async def refused(request: Request, error: PolarError) -> Response:
        return error_response(409 if isinstance(error, ChangedError) else 400, str(error))
