"""One model, its queue, and what every route does with them: read a body, score, answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Generic, Literal, TypeVar

from fastapi import HTTPException, Request
from pydantic import TypeAdapter

import polar_ft
from polar_ft.data.answers import Thinking
from polar_ft.errors import PolarError
from polar_ft.groups import FieldLengths, TextGroup, against
from polar_ft.reward_scale import FILE_NAME, RewardScale
from polar_ft.scoring.scorer import RewardScorer
from polar_ft.serving.batching import Batcher, Job, QueueFullError, ScoringError, ShuttingDownError
from polar_ft.serving.bodies import SMALL_BODY, read_body
from polar_ft.serving.connections import Connections
from polar_ft.serving.inputs import InputReader
from polar_ft.serving.limits import InUse, Limits, overloaded
from polar_ft.serving.telemetry import Metrics, log
from polar_ft.serving.wire import Combine, CutTokens, ErrorResponse, ModelCard, ScaleCard

T = TypeVar("T")
PoolingFormat = Literal["vllm", "lmdeploy"]

# The errors of every route that scores, for /openapi.json.
ERRORS: dict[int | str, dict[str, Any]] = {
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
class GroupInputs(Generic[T]):
    """What is made of a body with texts: candidates of each group against each of its references.

    Attributes:
        body: The validated body.
        groups: Its groups.
        combine: For each group how the rewards against several references become one.
        job: The candidates to score, one after another for each group and reference.
        cuts: What was cut, for each group and reference.
    """

    body: T
    groups: Sequence[TextGroup]
    combine: Sequence[Combine]
    job: Job
    cuts: Sequence[FieldLengths]

    def rewards(self, scored: Sequence[float]) -> list[list[float]]:
        """The rewards of each group's candidates, from those of the job's candidates."""
        values = iter(scored)
        rewards = []
        for group, combine in zip(self.groups, self.combine, strict=True):
            against_each = [[next(values) for _ in group.candidates] for _ in group.references]
            join = max if combine == "max" else fmean
            rewards.append([join(column) for column in zip(*against_each, strict=True)])
        return rewards

    def cut(self) -> list[CutTokens]:
        """What was cut of each group."""
        cuts = iter(self.cuts)
        return [CutTokens.of([next(cuts) for _ in group.references]) for group in self.groups]


class ClientGoneError(Exception):
    """The client has disconnected, so nobody waits for the answer."""


class Server:
    """One model, its queue, and what the routes need of it.

    Args:
        scorer: The model.
        name: Name of the model for clients.
        limits: Limits on what is accepted at a time.
        pooling_format: Format of answers of /pooling where the request does not determine it.
        thinking: How outputs of policies mark their thoughts.
    """

    def __init__(
        self,
        scorer: RewardScorer,
        *,
        name: str,
        limits: Limits,
        pooling_format: PoolingFormat,
        thinking: Thinking,
    ) -> None:
        self.scorer = scorer
        self.name = name
        self.limits = limits
        self.pooling_format: PoolingFormat = pooling_format
        self.thinking = thinking
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

    async def read(self, request: Request, form: TypeAdapter[Any], read: Callable[[Any], T]) -> T:
        """Reads the body of a request in a thread.

        Args:
            request: The request.
            form: What its body must be.
            read: Makes inputs of it.
        """
        body = await request.body()
        kind = request.headers.get("content-type", "")
        threads = self.readers if len(body) <= SMALL_BODY else self.large_readers
        return await asyncio.get_running_loop().run_in_executor(
            threads, lambda: read(read_body(body, kind, form, self.limits))
        )

    def read_groups(self, body: T, groups: Sequence[TextGroup], combine: Sequence[Combine]) -> GroupInputs[T]:
        """Makes inputs of texts; called in a thread.

        Raises:
            PolarError: A reference leaves no room for the prompt, or the texts are too large.
        """
        of_one_reference = [against(group, text) for group in groups for text in group.references]
        encoded, cuts = self.reader.from_groups(of_one_reference)
        job = Job([candidate for candidates in encoded for candidate in candidates])
        return GroupInputs(body, groups, combine, job, cuts)

    async def score(self, request: Request, job: Job) -> list[float]:
        """Scores candidates; rewards come in their order.

        Raises:
            HTTPException: There are too many tokens, no room in the queue, or not enough time.
            ClientGoneError: The client has disconnected.
        """
        candidates = job.candidates
        request.scope["polar_ft"].update(candidates=len(candidates), tokens=job.tokens)
        if not candidates:
            return []
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
                raise ClientGoneError
            raise HTTPException(504, f"not scored within {self.limits.timeout:g} s; the server is too busy")
        except ScoringError as error:
            raise HTTPException(500, f"{error}; the server's log says more") from None
        finally:
            gone.cancel()
            # Removes what is still in the queue, at once: cancelling `rewards` alone would do so in the next
            # turn of the event loop, after the request has been counted.
            job.future.cancel()
            rewards.cancel()

    def measured_scale(self) -> RewardScale | None:
        """The scale that polar-ft calibrate measured; None without one, or if its file is damaged."""
        with suppress(PolarError):  # whoever asks for scaled rewards is told what is wrong with the file
            return self.scorer.reward_scale()
        return None

    def close(self) -> None:
        """Answers the requests that were accepted and ends the threads."""
        self.batcher.close()
        for threads in (self.readers, self.large_readers):
            threads.shutdown(cancel_futures=True)

    def card(self) -> ModelCard:
        """Describes the model for /v1/models."""
        template, folder = self.scorer.template, self.scorer.folder
        scale = self.measured_scale()
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
            has_scale=folder is not None and (folder / FILE_NAME).is_file(),
            scale=None if scale is None else ScaleCard(**scale.model_dump()),
        )


async def _client_gone(request: Request) -> None:
    """Returns when the client closes the connection; called after the body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
