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

# Most candidates in one request; each takes about a kilobyte in addition to its tokens.
MAX_CANDIDATES = 65536

_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": text}
    for status, text in {
        400: "The model cannot score this input.",
        401: "The API key is missing or wrong.",
        408: "The body did not arrive in time.",
        413: "More than the server accepts in one request.",
        421: "The request names another host.",
        422: "The request does not have the format of this route.",
        429: "The queue is full; Retry-After says when to try again.",
        500: "The model failed.",
        503: "Shutting down.",
        504: "The request was not answered in time.",
    }.items()
}


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
        """Runs a function that tokenizes in a thread, so that the event loop is not blocked."""
        return await asyncio.get_running_loop().run_in_executor(self.encoders, make)

    async def score(self, request: Request, candidates: Sequence[Candidate]) -> list[float]:
        """Scores candidates; rewards come in their order.

        Raises:
            HTTPException: There are too many tokens, no room in the queue, or not enough time.
            _ClientGoneError: The client has disconnected.
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
            rewards.cancel()  # removes what is still in the queue

    async def score_engine_input(self, request: Request, given: Any) -> tuple[list[float], list[int]]:
        """Scores the input of a request in an engine's format: rewards, and tokens of each sequence."""
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
        """Answers the requests that were accepted and ends the threads."""
        self.batcher.close()
        self.encoders.shutdown(cancel_futures=True)

    def card(self) -> ModelCard:
        """Describes the model for /v1/models."""
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
    """The client has disconnected, so nobody waits for the answer."""


async def _client_gone(request: Request) -> None:
    """Returns when the client closes the connection; called after the body has been read."""
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
    """The wrong fields and the reasons, without the values that the client sent.

    Names of the arms of a union are omitted from paths; they are pydantic's, not the request's.
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
        """Scores candidates given as texts: the server applies the template and truncates as in training."""
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
        """Scores in SGLang's format: a list of results, or one object for a single input."""
        scored, tokens = await server.score_engine_input(request, body.input)
        results = [
            ClassifyResult(embedding=[reward], meta_info=ClassifyMeta(prompt_tokens=count))
            for reward, count in zip(scored, tokens, strict=True)
        ]
        single = isinstance(body.input, str) or isinstance(body.input[0], int)
        return results[0] if single else results

    @app.post("/pooling", responses=_ERRORS, tags=["engines"])
    async def pooling(body: PoolingRequest, request: Request) -> PoolingResponse:
        """Scores in vLLM's format if the request has ``use_activation``, else in ``--pooling-format``.

        Below /vllm and /lmdeploy, as in /lmdeploy/pooling, the format is always that engine's.
        """
        scored, tokens = await server.score_engine_input(request, body.input)
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
            usage=PoolingUsage(prompt_tokens=sum(tokens), total_tokens=sum(tokens)),
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
