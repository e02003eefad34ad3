"""The routes of the embedded server."""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import TypeAdapter
from starlette.exceptions import HTTPException as StarletteHTTPException

import polar_ft
from polar_ft.errors import PolarError
from polar_ft.reward_scale import FILE_NAME, RewardScale
from polar_ft.scoring.scorer import RewardScorer
from polar_ft.serving.batching import Batcher, Job, QueueFullError, ScoringError, ShuttingDownError
from polar_ft.serving.bodies import SMALL_BODY, read_body
from polar_ft.serving.connections import Connections
from polar_ft.serving.guard import CLIENT_GONE, OPEN_ROUTE, Guard, error_response, playground
from polar_ft.serving.inputs import InputReader, TooLargeError
from polar_ft.serving.limits import InUse, Limits, overloaded
from polar_ft.serving.telemetry import Metrics, log
from polar_ft.serving.wire import (
    AnyRewardRequest,
    ClassifyMeta,
    ClassifyRequest,
    ClassifyResult,
    CutTokens,
    ErrorResponse,
    LmdeployPooling,
    ModelCard,
    ModelList,
    PoolingRequest,
    PoolingResponse,
    PoolingUsage,
    RewardRequest,
    RewardResponse,
    RewardsRequest,
    RewardsResponse,
    ScaleCard,
    Status,
    Usage,
    VllmPooling,
)

T = TypeVar("T")
E = TypeVar("E", ClassifyRequest, PoolingRequest)
PoolingFormat = Literal["vllm", "lmdeploy"]

_REWARDS: TypeAdapter[RewardRequest | RewardsRequest] = TypeAdapter(AnyRewardRequest)
_CLASSIFY = TypeAdapter(ClassifyRequest)
_POOLING = TypeAdapter(PoolingRequest)

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": text}
    for status, text in {
        400: "The model cannot score this input.",
        401: "The API key is missing or wrong.",
        408: "The body did not arrive in time.",
        413: "More than the server accepts in one request.",
        415: "The request does not say that its body is JSON.",
        421: "The request names another host.",
        422: "The request does not have the format of this route.",
        429: "There is no room now; Retry-After says when to try again.",
        500: "The model failed.",
        503: "Shutting down, or too many connections are open.",
        504: "The request was not answered in time.",
    }.items()
}


@dataclass(frozen=True)
class Inputs(Generic[T]):
    """What is made of a body.

    Attributes:
        body: The validated body.
        job: Its candidates.
        numbers: Number of candidates of each (prompt, reference).
        cuts: What was cut of each (prompt, reference).
    """

    body: T
    job: Job
    numbers: Sequence[int] = ()
    cuts: list[CutTokens] = field(default_factory=list)


@dataclass(frozen=True)
class EngineRewards(Generic[T]):
    """The body of a request in an engine's format, its rewards, and the tokens of each sequence."""

    body: T
    rewards: list[float]
    tokens: list[int]


class Server:
    """One model, its queue, and what the routes need of it.

    Args:
        scorer: The model.
        name: Name of the model for clients.
        limits: Limits on what is accepted at a time.
        pooling_format: Format of answers of /pooling where the request does not determine it.
    """

    def __init__(
        self, scorer: RewardScorer, *, name: str, limits: Limits, pooling_format: PoolingFormat = "vllm"
    ) -> None:
        self.scorer = scorer
        self.name = name
        self.limits = limits
        self.pooling_format: PoolingFormat = pooling_format
        self.created = int(time.time())
        self.reader = InputReader(scorer.template, scorer.vocab_size, limits.max_request_tokens)
        self.in_use = InUse()
        self.metrics = Metrics(
            lambda: self.batcher.waiting_tokens,
            lambda: self.in_use.requests,
            lambda: self.connections.count,
        )
        self.connections = Connections(limits, self.metrics)
        self.batcher = Batcher(
            scorer,
            tokens_per_batch=scorer.tokens_per_batch,
            max_tokens=limits.max_queue_tokens,
            on_batch=self.metrics.note_batch,
            on_error=lambda error: log.error("the model failed", exc_info=error),
        )
        # Tokenizing releases the GIL; two threads keep the model fed. Large bodies have a thread of their
        # own, so that small ones need not wait for them.
        self.readers = ThreadPoolExecutor(2, thread_name_prefix="polar-ft read")
        self.large_readers = ThreadPoolExecutor(1, thread_name_prefix="polar-ft read large")

    async def read(self, request: Request, form: TypeAdapter[T], read: Callable[[T], Inputs[T]]) -> Inputs[T]:
        """Reads the body of a request in a thread.

        Args:
            request: The request.
            form: What its body must be.
            read: Makes candidates of it.
        """
        body = await request.body()
        kind = request.headers.get("content-type", "")
        threads = self.readers if len(body) <= SMALL_BODY else self.large_readers
        return await asyncio.get_running_loop().run_in_executor(
            threads, lambda: read(read_body(body, kind, form, self.limits))
        )

    async def score(self, request: Request, job: Job) -> list[float]:
        """Scores candidates; rewards come in their order.

        Raises:
            HTTPException: There are too many tokens, no room in the queue, or not enough time.
            _ClientGoneError: The client has disconnected.
        """
        candidates = job.candidates
        request.scope["polar_ft"].update(candidates=len(candidates), tokens=job.tokens)
        if job.tokens > self.limits.max_queue_tokens:
            raise HTTPException(
                413,
                f"the request has {job.tokens} tokens, more than the {self.limits.max_queue_tokens} that the "
                f"server's queue holds; send fewer inputs at once",
            )
        request.scope["polar_ft.claim"].take_memory(sum(one.ids.nbytes for one in candidates))
        try:
            self.batcher.submit(job)
        except QueueFullError as error:
            raise overloaded(str(error), error.retry_after) from None
        except ShuttingDownError:
            raise HTTPException(503, "the server is shutting down") from None

        rewards = asyncio.wrap_future(job.future)
        gone = asyncio.create_task(_client_gone(request))
        either: set[asyncio.Future[Any]] = {rewards, gone}
        try:
            await asyncio.wait(either, timeout=self.limits.timeout, return_when=asyncio.FIRST_COMPLETED)
            if rewards.done():
                return rewards.result()
            if gone.done():
                raise _ClientGoneError
            raise HTTPException(504, f"not scored within {self.limits.timeout:g} s; the server is too busy")
        except ScoringError as error:
            raise HTTPException(500, f"{error}; the server's log says more") from None
        finally:
            gone.cancel()
            # Removes what is still in the queue, at once: cancelling `rewards` alone would do so in the next
            # turn of the event loop, after the request has been counted.
            job.future.cancel()
            rewards.cancel()

    async def score_engine_input(self, request: Request, form: TypeAdapter[E]) -> EngineRewards[E]:
        """Scores the input of a request in an engine's format."""

        def read(body: E) -> Inputs[E]:
            given = body.input
            if isinstance(given, str):
                candidates = self.reader.from_texts([given])
            elif isinstance(given[0], str):
                candidates = self.reader.from_texts(given)
            else:
                candidates = self.reader.from_ids([given] if isinstance(given[0], int) else given)
            return Inputs(body, Job(candidates))

        inputs = await self.read(request, form, read)
        rewards = await self.score(request, inputs.job)
        return EngineRewards(inputs.body, rewards, [len(one.ids) for one in inputs.job.candidates])

    def close(self) -> None:
        """Answers the requests that were accepted and ends the threads."""
        self.batcher.close()
        for threads in (self.readers, self.large_readers):
            threads.shutdown(cancel_futures=True)

    def card(self) -> ModelCard:
        """Describes the model for /v1/models."""
        template, folder = self.scorer.template, self.scorer.folder
        has_scale = folder is not None and (folder / FILE_NAME).is_file()
        scale = None
        with suppress(PolarError):  # who asks for scaled rewards is told what is wrong with the file
            if folder is not None and has_scale:
                scale = ScaleCard(**RewardScale.load(folder).model_dump())
        return ModelCard(
            id=self.name,
            created=self.created,
            root=None if folder is None else str(folder.resolve()),
            version=polar_ft.__version__,
            max_model_len=template.max_length,
            max_response_length=template.max_response_length,
            vocab_size=self.scorer.vocab_size,
            dtype=str(self.scorer.dtype).removeprefix("torch."),
            device=self.scorer.device.type,
            template=template.fingerprint,
            has_scale=has_scale,
            scale=scale,
        )


class _ClientGoneError(Exception):
    """The client has disconnected, so nobody waits for the answer."""


async def _client_gone(request: Request) -> None:
    """Returns when the client closes the connection; called after the body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def create_app(
    scorer: RewardScorer,
    *,
    name: str = "reward",
    limits: Limits | None = None,
    api_key: str | None = None,
    loopback_only: bool = False,
    pooling_format: PoolingFormat = "vllm",
) -> FastAPI:
    """Creates the ASGI application.

    Args:
        scorer: The model.
        name: Name of the model for clients.
        limits: Limits on what is accepted at a time; None takes the defaults.
        api_key: Key that every route except /health requires.
        loopback_only: See `Guard`.
        pooling_format: Format of answers of /pooling where the request does not determine it.
    """
    limits = limits or Limits()
    server = Server(scorer, name=name, limits=limits, pooling_format=pooling_format)

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

    @app.exception_handler(_ClientGoneError)
    async def client_gone(request: Request, error: _ClientGoneError) -> Response:
        return Response(status_code=CLIENT_GONE)


def _describe_bodies(app: FastAPI) -> None:
    """Puts the forms of bodies into /openapi.json; FastAPI does not know them, as it does not read them."""
    paths: dict[str, TypeAdapter[Any]] = {
        "/v1/rewards": _REWARDS,
        "/classify": _CLASSIFY,
        "/pooling": _POOLING,
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
    @app.post("/v1/rewards", responses=_ERRORS, tags=["rewards"])
    async def rewards(request: Request) -> RewardResponse | RewardsResponse:
        """Scores candidates given as texts: the server applies the template and truncates as in training."""

        def read(body: RewardRequest | RewardsRequest) -> Inputs[RewardRequest | RewardsRequest]:
            inputs = body.inputs if isinstance(body, RewardsRequest) else [body]
            groups, cuts = server.reader.from_groups([one.group() for one in inputs])
            job = Job([candidate for group in groups for candidate in group])
            return Inputs(body, job, list(map(len, groups)), [CutTokens.of(one) for one in cuts])

        inputs = await server.read(request, _REWARDS, read)
        scale = server.scorer.reward_scale() if inputs.body.scale else None
        scored = await server.score(request, inputs.job)
        values = iter(scored if scale is None else scale.apply(scored))
        grouped = [[next(values) for _ in range(number)] for number in inputs.numbers]
        usage = Usage(tokens=sum(len(one.ids) for one in inputs.job.candidates))
        if isinstance(inputs.body, RewardsRequest):
            return RewardsResponse(model=server.name, rewards=grouped, cut=inputs.cuts, usage=usage)
        return RewardResponse(model=server.name, rewards=grouped[0], cut=inputs.cuts[0], usage=usage)


def _add_engine_routes(app: FastAPI, server: Server) -> None:
    @app.post("/classify", responses=_ERRORS, tags=["engines"])
    async def classify(request: Request) -> ClassifyResult | list[ClassifyResult]:
        """Scores in SGLang's format: a list of results, or one object for a single input."""
        answer = await server.score_engine_input(request, _CLASSIFY)
        results = [
            ClassifyResult(embedding=[reward], meta_info=ClassifyMeta(prompt_tokens=count))
            for reward, count in zip(answer.rewards, answer.tokens, strict=True)
        ]
        given = answer.body.input
        single = isinstance(given, str) or isinstance(given[0], int)
        return results[0] if single else results

    @app.post("/pooling", responses=_ERRORS, tags=["engines"])
    async def pooling(request: Request) -> PoolingResponse:
        """Scores in vLLM's format if the request has ``use_activation``, else in ``--pooling-format``.

        Below /vllm and /lmdeploy, as in /lmdeploy/pooling, the format is always that engine's.
        """
        answer = await server.score_engine_input(request, _POOLING)
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

    @app.get("/ready", responses={401: _ERRORS[401], 503: _ERRORS[503]}, tags=["status"])
    async def ready() -> Status:
        """Says whether requests are accepted: the model is loaded and its thread runs."""
        if not server.batcher.alive:
            raise HTTPException(503, "the server is shutting down, or its model thread has ended")
        return Status(status="ready")

    @app.get("/v1/models", responses={401: _ERRORS[401]}, tags=["status"])
    async def models() -> ModelList:
        """Describes the model; ``owned_by`` is "polar_ft"."""
        return ModelList(data=[server.card()])

    @app.get("/metrics", responses={401: _ERRORS[401]}, response_class=Response, tags=["status"])
    async def metrics() -> Response:
        """Returns metrics in Prometheus' text format."""
        return Response(generate_latest(server.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return playground()


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
