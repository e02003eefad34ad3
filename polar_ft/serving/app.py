"""The routes of the embedded server."""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, Literal, TypeVar

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException as StarletteHTTPException

import polar_ft
from polar_ft.errors import PolarError, validation_sentences
from polar_ft.reward_scale import FILE_NAME
from polar_ft.scoring.scorer import RewardScorer
from polar_ft.serving.batching import Batcher, Candidate, Job, QueueFullError, ScoringError, ShuttingDownError
from polar_ft.serving.guard import (
    CLIENT_GONE,
    OPEN_ROUTE,
    Guard,
    InFlight,
    Limits,
    error_response,
    playground,
)
from polar_ft.serving.inputs import InputReader
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
    RewardResponse,
    RewardsRequest,
    RewardsResponse,
    Status,
    Usage,
    VllmPooling,
)

T = TypeVar("T")
PoolingFormat = Literal["vllm", "lmdeploy"]

# Of one request. Each takes about a kilobyte in addition to its tokens, however short it is.
MAX_CANDIDATES = 65536

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": text}
    for status, text in {
        400: "Not something that this model can score.",
        401: "No API key, or not the right one.",
        408: "The body did not come in time.",
        413: "More than the server takes in one request.",
        421: "The request names another host than this one.",
        422: "Not a request of this route.",
        429: "The queue is full; Retry-After says when to try again.",
        500: "The model failed.",
        503: "Shutting down.",
        504: "Not answered in time.",
    }.items()
}


class Server:
    """One model, its queue, and what clients ask of it.

    Args:
        scorer: The model.
        name: What clients see as the model's name.
        limits: What is taken at once.
        pooling_format: The shape of /pooling where a request does not tell.
    """

    def __init__(
        self, scorer: RewardScorer, *, name: str, limits: Limits, pooling_format: PoolingFormat = "vllm"
    ) -> None:
        self.scorer = scorer
        self.name = name
        self.limits = limits
        self.pooling_format: PoolingFormat = pooling_format
        self.created = int(time.time())
        self.reader = InputReader(scorer.template, scorer.vocab_size)
        self.in_flight = InFlight()
        self.metrics = Metrics(lambda: self.batcher.waiting_tokens, lambda: self.in_flight.count)
        self.batcher = Batcher(
            scorer,
            tokens_per_batch=scorer.tokens_per_batch,
            max_tokens=limits.max_queue_tokens,
            on_batch=self.metrics.note_batch,
            on_error=lambda error: log.error("the model failed", exc_info=error),
        )
        # Tokenizing releases the GIL; two threads keep the model fed.
        self.encoders = ThreadPoolExecutor(2, thread_name_prefix="polar-ft encode")

    async def encode(self, make: Callable[[], T]) -> T:
        """Runs what tokenizes, off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self.encoders, make)

    async def score(self, request: Request, candidates: Sequence[Candidate]) -> list[float]:
        """The rewards of candidates, in their order.

        Raises:
            HTTPException: They will not be scored: too many, no room, no time, or the client has gone.
        """
        job = await self.encode(lambda: Job(candidates))
        request.scope["polar_ft"].update(candidates=len(candidates), tokens=job.tokens)
        if job.tokens > self.limits.max_queue_tokens:
            raise HTTPException(
                413,
                f"the request has {job.tokens} tokens, more than the {self.limits.max_queue_tokens} that the "
                f"server's queue holds; send fewer inputs at once",
            )
        try:
            self.batcher.submit(job)
        except QueueFullError as error:
            raise HTTPException(429, str(error), {"Retry-After": str(error.retry_after)}) from None
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
            rewards.cancel()  # and with it what is still in the queue

    async def score_engine_input(self, request: Request, given: Any) -> tuple[list[float], list[int]]:
        """Rewards and numbers of tokens of what a request in an engine's format holds."""

        if not isinstance(given, str):
            _check_number(0 if isinstance(given[0], int) else len(given))

        def read() -> list[Candidate]:
            if isinstance(given, str):
                return self.reader.from_texts([given])
            if isinstance(given[0], str):
                return self.reader.from_texts(given)
            return self.reader.from_ids([given] if isinstance(given[0], int) else given)

        candidates = await self.encode(read)
        rewards = await self.score(request, candidates)
        return rewards, [len(candidate.ids) for candidate in candidates]

    def close(self) -> None:
        """Answers what was taken and ends the threads."""
        self.batcher.close()
        self.encoders.shutdown(cancel_futures=True)

    def card(self) -> ModelCard:
        """What /v1/models says."""
        template = self.scorer.template
        return ModelCard(
            id=self.name,
            created=self.created,
            root=None if self.scorer.folder is None else str(self.scorer.folder.resolve()),
            version=polar_ft.__version__,
            max_model_len=template.max_length,
            max_response_length=template.max_response_length,
            vocab_size=self.scorer.vocab_size,
            dtype=str(self.scorer.dtype).removeprefix("torch."),
            device=self.scorer.device.type,
            template=template.fingerprint,
            has_scale=self.scorer.folder is not None and (self.scorer.folder / FILE_NAME).is_file(),
        )


class _ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


async def _client_gone(request: Request) -> None:
    """Returns when the client has closed the connection; the body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _check_number(candidates: int) -> None:
    if candidates > MAX_CANDIDATES:
        raise HTTPException(
            413, f"the request has {candidates} candidates; send at most {MAX_CANDIDATES} at once"
        )


def create_app(
    scorer: RewardScorer,
    *,
    name: str = "reward",
    limits: Limits | None = None,
    api_key: str | None = None,
    loopback_only: bool = False,
    pooling_format: PoolingFormat = "vllm",
) -> FastAPI:
    """The ASGI application.

    Args:
        scorer: The model.
        name: What clients see as its name.
        limits: What is taken at once; None takes the defaults.
        api_key: Asked of every route but /health.
        loopback_only: See `Guard`.
        pooling_format: The shape of /pooling where a request does not tell.
    """
    limits = limits or Limits()
    server = Server(scorer, name=name, limits=limits, pooling_format=pooling_format)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        # All requests are answered by now; uvicorn waits for them first.
        await asyncio.to_thread(server.close)

    # No /docs: FastAPI's page loads its scripts from elsewhere.
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
        in_flight=server.in_flight,
        api_key=api_key,
        loopback_only=loopback_only,
    )
    _answer_errors(app)
    _add_reward_routes(app, server)
    _add_engine_routes(app, server)
    _add_status_routes(app, server)
    return app


def _answer_errors(app: FastAPI) -> None:
    @app.exception_handler(StarletteHTTPException)
    async def http_error(request: Request, error: StarletteHTTPException) -> Response:
        return error_response(error.status_code, error.detail, dict(error.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def not_valid(request: Request, error: RequestValidationError) -> Response:
        return error_response(422, _what_is_wrong(error))

    @app.exception_handler(PolarError)
    async def cannot_score(request: Request, error: PolarError) -> Response:
        return error_response(400, str(error))

    @app.exception_handler(_ClientGoneError)
    async def client_gone(request: Request, error: _ClientGoneError) -> Response:
        return Response(status_code=CLIENT_GONE)


def _what_is_wrong(error: RequestValidationError) -> str:
    """Fields and reasons, without what the client sent.

    The names of the arms of a union are left out of the path; they are pydantic's, not the request's.
    """
    arms = {"body", "one", "several", "string", "messages", "texts", "ids", "ids of several"}
    reasons = [
        sentence if ": " in sentence else f"body: {sentence}"
        for sentence in validation_sentences(error, leave_out=arms)
    ]
    more = f" (and {len(reasons) - 3} more)" if len(reasons) > 3 else ""
    return "; ".join(reasons[:3]) + more


def _add_reward_routes(app: FastAPI, server: Server) -> None:
    @app.post("/v1/rewards", responses=_ERRORS, tags=["rewards"])
    async def rewards(body: AnyRewardRequest, request: Request) -> RewardResponse | RewardsResponse:
        """Rewards of candidates given as texts: the server applies the template and cuts as training does."""
        scale = server.scorer.reward_scale() if body.scale else None
        several = isinstance(body, RewardsRequest)
        inputs = body.inputs if isinstance(body, RewardsRequest) else [body]
        _check_number(sum(len(one.candidates) for one in inputs))
        groups, cuts = await server.encode(lambda: server.reader.from_groups([x.group() for x in inputs]))
        candidates = [candidate for group in groups for candidate in group]
        scored = await server.score(request, candidates)
        values = iter(scored if scale is None else scale.apply(scored))
        grouped = [[next(values) for _ in group] for group in groups]
        usage = Usage(tokens=sum(len(one.ids) for one in candidates))
        cut = [CutTokens.of(one) for one in cuts]
        if several:
            return RewardsResponse(model=server.name, rewards=grouped, cut=cut, usage=usage)
        return RewardResponse(model=server.name, rewards=grouped[0], cut=cut[0], usage=usage)


def _add_engine_routes(app: FastAPI, server: Server) -> None:
    @app.post("/classify", responses=_ERRORS, tags=["engines"])
    async def classify(body: ClassifyRequest, request: Request) -> ClassifyResult | list[ClassifyResult]:
        """SGLang's format: a list of results, or one bare object for a single input."""
        scored, tokens = await server.score_engine_input(request, body.input)
        results = [
            ClassifyResult(embedding=[reward], meta_info=ClassifyMeta(prompt_tokens=count))
            for reward, count in zip(scored, tokens, strict=True)
        ]
        single = isinstance(body.input, str) or isinstance(body.input[0], int)
        return results[0] if single else results

    @app.post("/pooling", responses=_ERRORS, tags=["engines"])
    async def pooling(body: PoolingRequest, request: Request) -> PoolingResponse:
        """vLLM's format where the request has ``use_activation``, else that of ``--pooling-format``.

        Below /vllm and /lmdeploy, as in /lmdeploy/pooling, always that engine's.
        """
        scored, tokens = await server.score_engine_input(request, body.input)
        if body.use_activation:
            scored = [_sigmoid(reward) for reward in scored]
        told = "vllm" if "use_activation" in body.model_fields_set else server.pooling_format
        data: list[VllmPooling] | list[LmdeployPooling]
        if request.scope.get("polar_ft.engine", told) == "lmdeploy":
            data = [LmdeployPooling(index=i, data=reward) for i, reward in enumerate(scored)]
        else:
            data = [VllmPooling(index=i, data=[[reward]]) for i, reward in enumerate(scored)]
        return PoolingResponse(
            id=f"pool-{uuid.uuid4().hex}",
            created=int(time.time()),
            model=server.name,
            data=data,
            usage=PoolingUsage(prompt_tokens=sum(tokens), total_tokens=sum(tokens)),
        )


def _add_status_routes(app: FastAPI, server: Server) -> None:
    @app.get(OPEN_ROUTE, tags=["status"])
    async def health() -> Status:
        """Whether the process answers. Needs no key."""
        return Status(status="ok")

    @app.get("/ready", responses={401: _ERRORS[401], 503: _ERRORS[503]}, tags=["status"])
    async def ready() -> Status:
        """Whether requests are taken: the model is loaded and its thread runs."""
        if not server.batcher.alive:
            raise HTTPException(503, "the server is shutting down, or its model thread has ended")
        return Status(status="ready")

    @app.get("/v1/models", responses={401: _ERRORS[401]}, tags=["status"])
    async def models() -> ModelList:
        """The model, and who serves it: ``owned_by`` is "polar_ft"."""
        return ModelList(data=[server.card()])

    @app.get("/metrics", responses={401: _ERRORS[401]}, response_class=Response, tags=["status"])
    async def metrics() -> Response:
        """Metrics in Prometheus' text format."""
        return Response(generate_latest(server.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return playground()


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
