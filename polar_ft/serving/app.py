"""The application: its routes in the server's own format and in those of engines, and what describes it."""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import TypeAdapter
from starlette.exceptions import HTTPException as StarletteHTTPException

import polar_ft
from polar_ft.data.answers import Thinking
from polar_ft.errors import PolarError
from polar_ft.scoring.scorer import RewardScorer
from polar_ft.serving.batching import Candidate, Job
from polar_ft.serving.guard import CLIENT_GONE, OPEN_ROUTE, Guard, error_response, playground
from polar_ft.serving.inputs import TooLargeError
from polar_ft.serving.limits import Limits
from polar_ft.serving.rollouts import OPENRLHF, SLIME, add_rollout_routes
from polar_ft.serving.server import ERRORS, ClientGoneError, GroupInputs, PoolingFormat, Server
from polar_ft.serving.wire import (
    AnyRewardRequest,
    ClassifyMeta,
    ClassifyRequest,
    ClassifyResult,
    LmdeployPooling,
    ModelList,
    PoolingRequest,
    PoolingResponse,
    PoolingUsage,
    RewardRequest,
    RewardResponse,
    RewardsRequest,
    RewardsResponse,
    ScoreRequest,
    ScoreResponse,
    ScoreUsage,
    Status,
    Usage,
    VllmPooling,
)

E = TypeVar("E", ClassifyRequest, PoolingRequest, ScoreRequest)

_REWARDS: TypeAdapter[RewardRequest | RewardsRequest] = TypeAdapter(AnyRewardRequest)
_CLASSIFY = TypeAdapter(ClassifyRequest)
_POOLING = TypeAdapter(PoolingRequest)
_SCORE = TypeAdapter(ScoreRequest)


@dataclass(frozen=True)
class EngineRewards(Generic[E]):
    """The body of a request in an engine's format, its rewards, and the tokens of each sequence."""

    body: E
    rewards: list[float]
    tokens: list[int]


def create_app(
    scorer: RewardScorer,
    *,
    name: str = "reward",
    limits: Limits | None = None,
    api_key: str | None = None,
    loopback_only: bool = False,
    pooling_format: PoolingFormat = "vllm",
    thinking: Thinking | None = None,
) -> FastAPI:
    """Creates the ASGI application.

    Args:
        scorer: The model.
        name: Name of the model for clients.
        limits: Limits on what is accepted at a time; None takes the defaults.
        api_key: Key that every route except /health requires.
        loopback_only: See `Guard`.
        pooling_format: Format of answers of /pooling where the request does not determine it.
        thinking: How outputs of policies mark their thoughts; None takes the defaults.
    """
    limits = limits or Limits()
    server = Server(
        scorer, name=name, limits=limits, pooling_format=pooling_format, thinking=thinking or Thinking()
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        # uvicorn has waited for all requests to be answered.
        await asyncio.to_thread(server.close)

    # No /docs: FastAPI's page loads scripts from another site.
    app = FastAPI(
        title="polar_ft reward server",
        version=polar_ft.__version__,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.server = server
    app.add_middleware(
        Guard,
        limits=limits,
        metrics=server.metrics,
        in_use=server.in_use,
        connections=server.connections,
        api_key=api_key,
        loopback_only=loopback_only,
    )
    _answer_errors(app)
    _add_reward_routes(app, server)
    add_rollout_routes(app, server)
    _add_engine_routes(app, server)
    _add_status_routes(app, server)
    _describe_bodies(app)
    return app


def _answer_errors(app: FastAPI) -> None:
    @app.exception_handler(StarletteHTTPException)
    async def http_error(request: Request, error: StarletteHTTPException) -> Response:
        return error_response(error.status_code, error.detail, dict(error.headers or {}))

    @app.exception_handler(PolarError)
    async def cannot_score(request: Request, error: PolarError) -> Response:
        return error_response(413 if isinstance(error, TooLargeError) else 400, str(error))

    @app.exception_handler(ClientGoneError)
    async def client_gone(request: Request, error: ClientGoneError) -> Response:
        return Response(status_code=CLIENT_GONE)


def _describe_bodies(app: FastAPI) -> None:
    """Puts the forms of bodies into /openapi.json; FastAPI does not know them, as it does not read them."""
    paths: dict[str, TypeAdapter[Any]] = {
        "/v1/rewards": _REWARDS,
        "/get_reward": OPENRLHF,
        "/slime": SLIME,
        "/classify": _CLASSIFY,
        "/pooling": _POOLING,
        "/v1/score": _SCORE,
    }
    described = app.openapi

    def openapi() -> dict[str, Any]:
        schema = described()
        for path, form in paths.items():
            body = form.json_schema(ref_template="#/components/schemas/{model}")
            schema["components"]["schemas"] |= body.pop("$defs", {})
            schema["paths"][path]["post"]["requestBody"] = {
                "required": True,
                "content": {"application/json": {"schema": body}},
            }
        return schema

    app.openapi = openapi  # type: ignore[method-assign]


def _add_reward_routes(app: FastAPI, server: Server) -> None:
    @app.post("/v1/rewards", responses=ERRORS, tags=["rewards"])
    async def rewards(request: Request) -> RewardResponse | RewardsResponse:
        """Scores candidates given as texts: the server applies the template and truncates as in training."""

        def read(body: RewardRequest | RewardsRequest) -> GroupInputs[RewardRequest | RewardsRequest]:
            given = body.inputs if isinstance(body, RewardsRequest) else [body]
            return server.read_groups(body, [one.group() for one in given], [one.combine for one in given])

        inputs = await server.read(request, _REWARDS, read)
        body = inputs.body
        scale = server.scorer.reward_scale() if body.scale else server.measured_scale()
        raw = inputs.rewards(await server.score(request, inputs.job))
        scaled = [scale.apply(values) for values in raw] if scale is not None and body.scale else raw
        tempered = None
        if scale is not None and scale.temperature is not None:
            tempered = [[reward / scale.temperature for reward in values] for values in raw]
        cut = inputs.cut()
        usage = Usage(tokens=sum(len(one.ids) for one in inputs.job.candidates))
        if isinstance(body, RewardsRequest):
            return RewardsResponse(
                model=server.name, rewards=scaled, raw=raw, tempered=tempered, cut=cut, usage=usage
            )
        return RewardResponse(
            model=server.name,
            rewards=scaled[0],
            raw=raw[0],
            tempered=None if tempered is None else tempered[0],
            cut=cut[0],
            usage=usage,
        )


def _add_engine_routes(app: FastAPI, server: Server) -> None:
    async def score_input(
        request: Request, form: TypeAdapter[E], read: Callable[[E], list[Candidate]]
    ) -> EngineRewards[E]:
        body, job = await server.read(request, form, lambda body: (body, Job(read(body))))
        rewards = await server.score(request, job)
        return EngineRewards(body, rewards, [len(one.ids) for one in job.candidates])

    def read_input(body: ClassifyRequest | PoolingRequest) -> list[Candidate]:
        given: Any = body.input
        if isinstance(given, str):
            return server.reader.from_texts([given])
        if isinstance(given[0], str):
            return server.reader.from_texts(given)
        return server.reader.from_ids([given] if isinstance(given[0], int) else given)

    @app.post("/classify", responses=ERRORS, tags=["engines"])
    async def classify(request: Request) -> ClassifyResult | list[ClassifyResult]:
        """Scores in SGLang's format: a list of results, or one object for a single input."""
        answer = await score_input(request, _CLASSIFY, read_input)
        results = [
            ClassifyResult(embedding=[reward], meta_info=ClassifyMeta(prompt_tokens=count))
            for reward, count in zip(answer.rewards, answer.tokens, strict=True)
        ]
        given = answer.body.input
        single = isinstance(given, str) or isinstance(given[0], int)
        return results[0] if single else results

    @app.post("/v1/score", responses=ERRORS, tags=["engines"])
    async def score(request: Request) -> ScoreResponse:
        """Scores items after a query, which they share, in the format of SGLang's score API."""

        answer = await score_input(
            request, _SCORE, lambda body: server.reader.from_items(body.query, body.listed_items)
        )
        total = sum(answer.tokens)
        return ScoreResponse(
            scores=[[reward] for reward in answer.rewards],
            model=server.name,
            usage=ScoreUsage(prompt_tokens=total, total_tokens=total),
        )

    @app.post("/pooling", responses=ERRORS, tags=["engines"])
    async def pooling(request: Request) -> PoolingResponse:
        """Scores in vLLM's format if the request has ``use_activation``, else in ``--pooling-format``.

        Below /vllm and /lmdeploy, as in /lmdeploy/pooling, the format is always that engine's.
        """
        answer = await score_input(request, _POOLING, read_input)
        body, scored, total = answer.body, answer.rewards, sum(answer.tokens)
        if body.use_activation:
            scored = [_sigmoid(reward) for reward in scored]
        default = "vllm" if "use_activation" in body.model_fields_set else server.pooling_format
        data: list[VllmPooling] | list[LmdeployPooling]
        if request.scope.get("polar_ft.engine", default) == "lmdeploy":
            data = [LmdeployPooling(index=i, data=reward) for i, reward in enumerate(scored)]
        else:
            data = [VllmPooling(index=i, data=[[reward]]) for i, reward in enumerate(scored)]
        return PoolingResponse(
            id=f"pool-{uuid.uuid4().hex}",
            created=int(time.time()),
            model=server.name,
            data=data,
            usage=PoolingUsage(prompt_tokens=total, total_tokens=total),
        )


def _add_status_routes(app: FastAPI, server: Server) -> None:
    @app.get(OPEN_ROUTE, tags=["status"])
    async def health() -> Status:
        """Says that the process answers; requires no key."""
        return Status(status="ok")

    @app.get("/ready", responses={401: ERRORS[401], 503: ERRORS[503]}, tags=["status"])
    async def ready() -> Status:
        """Says whether requests are accepted: the model is loaded and its thread runs."""
        if not server.batcher.alive:
            raise HTTPException(503, "the server is shutting down, or its model thread has ended")
        return Status(status="ready")

    @app.get("/v1/models", responses={401: ERRORS[401]}, tags=["status"])
    async def models() -> ModelList:
        """Describes the model; ``owned_by`` is "polar_ft"."""
        return ModelList(data=[server.card()])

    @app.get("/metrics", responses={401: ERRORS[401]}, response_class=Response, tags=["status"])
    async def metrics() -> Response:
        """Returns metrics in Prometheus' text format."""
        return Response(generate_latest(server.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return playground()


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
