"""Token ids to rewards over HTTP: inputs are divided into requests, sent in parallel, and retried.

With several servers, the inputs of one (prompt, reference) go to the same one; see `ServerPool`.

A request is retried, with another server if there is one, after a connection error, a time-out, or HTTP 429,
502, 503 and 504: scoring has no side effect, so asking twice does no harm. Every other answer is final: a
wrong request stays wrong, and the answers of a server that sends garbled ones must not be used silently.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any

import httpx
import numpy as np

from polar_ft.client.contact import (
    Profile,
    ServerType,
    check_same_model,
    check_scores,
    how_to_start,
    identify,
    refusal,
)
from polar_ft.client.errors import RewardServerError, UnavailableError, WireError
from polar_ft.client.servers import LOGGER, Endpoint, Pending, ServerPool
from polar_ft.client.wire import ROUTES, read_answer, request_body, requests_of
from polar_ft.files import first_line
from polar_ft.template import PolarTemplate

RETRIED = (429, 502, 503, 504)
CONNECT_SECONDS = 10.0

# A server may have been restarted with another model while it got no request, so after this time it is
# contacted again. A restart during requests makes them fail, after which it is contacted again anyway.
IDLE_SECONDS = 30.0

# Requests to this machine are not sent through a proxy, whatever the environment says.
NO_PROXY = {f"all://{host}": None for host in ("127.0.0.1", "localhost", "[::1]")}


@dataclass(frozen=True)
class Settings:
    """How requests are sent.

    Attributes:
        api_key: Sent as a Bearer token; None sends none.
        timeout: Seconds that one request may take in total.
        max_retries: How often a request is tried per server.
        retry_delay: Seconds before the first retry; doubled with every further one, up to 30.
        max_wait: Seconds for which a request waits for servers that are busy (HTTP 429) or pause.
        tokens_per_request: Most tokens in a request; a longer input is sent alone.
        inputs_per_request: Most inputs in a request.
        concurrency: Requests in progress at each server.
        check_raw: Whether a server must show that it gives raw rewards.
    """

    api_key: str | None = None
    timeout: float = 120.0
    max_retries: int = 8
    retry_delay: float = 0.2
    max_wait: float = 300.0
    tokens_per_request: int = 32768
    inputs_per_request: int = 128
    concurrency: int = 8
    check_raw: bool = True


def cut_into_requests(lengths: Iterable[int], max_tokens: int, max_inputs: int) -> Iterator[slice]:
    """Divides inputs, in their order, into requests; an input longer than the limit is sent alone.

    >>> list(cut_into_requests([3, 4, 9, 1, 1], max_tokens=8, max_inputs=100))
    [slice(0, 2, None), slice(2, 3, None), slice(3, 5, None)]
    """
    start = tokens = end = 0
    for end, length in enumerate(lengths):
        if end > start and (tokens + length > max_tokens or end - start >= max_inputs):
            yield slice(start, end)
            start, tokens = end, 0
        tokens += length
    if tokens:
        yield slice(start, end + 1)


class Transport:
    """Scores token ids with several servers; belongs to one event loop.

    Args:
        servers: At least one.
        server_type: Engine of the servers; "auto" asks them.
        probes: The known inputs of the first contact, `[inputs][tokens]`.
        settings: How requests are sent.
        template: The template that encodes the inputs.
    """

    def __init__(
        self,
        servers: Sequence[Endpoint],
        server_type: ServerType,
        probes: Sequence[np.ndarray],
        settings: Settings,
        template: PolarTemplate,
    ) -> None:
        self.pool = ServerPool(servers, concurrency=settings.concurrency, retry_delay=settings.retry_delay)
        self.server_type = server_type
        self.settings = settings
        self._probes = probes
        self._template = template
        # Name and scores of the first server that scored the known inputs; the others must agree with it.
        self._known: tuple[str, tuple[float, ...]] | None = None
        connections = len(servers) * settings.concurrency
        self._http = httpx.AsyncClient(
            headers={} if settings.api_key is None else {"Authorization": f"Bearer {settings.api_key}"},
            timeout=httpx.Timeout(
                settings.timeout, connect=min(CONNECT_SECONDS, settings.timeout), pool=None
            ),
            limits=httpx.Limits(max_connections=connections, max_keepalive_connections=connections),
            mounts=NO_PROXY,
        )

    async def close(self) -> None:
        """Closes the connections."""
        await self._http.aclose()

    async def score(self, inputs: Sequence[np.ndarray]) -> list[float]:
        """Scores inputs; rewards come in their order.

        Args:
            inputs: Token ids, `[inputs][tokens]`.

        Raises:
            RewardServerError: A server answered with something other than rewards, or no server answered in
                time.
        """
        rewards = [0.0] * len(inputs)
        # All of them are load before the first is sent, so that none goes to a server that only seems free.
        requests = [
            (numbers, self.pool.enter(order, sum(len(inputs[number]) for number in numbers)))
            for order, numbers in self._divide(inputs)
        ]

        async def ask(numbers: Sequence[int], pending: Pending) -> None:
            scored = await self._score_request([inputs[number] for number in numbers], pending)
            for number, reward in zip(numbers, scored, strict=True):
                rewards[number] = reward

        try:
            await _all_or_none([asyncio.ensure_future(ask(*request)) for request in requests])
        finally:
            for _, pending in requests:
                self.pool.leave(pending)
        return rewards

    def _divide(self, inputs: Sequence[np.ndarray]) -> Iterator[tuple[list[int], list[int]]]:
        """Divides inputs into requests, each of inputs that prefer the same servers.

        Yields:
            The servers in the order of preference, and the indices of the inputs.
        """
        shares: dict[tuple[int, ...], tuple[list[int], list[int]]] = {}
        if len(self.pool.servers) == 1:
            shares[()] = [0], list(range(len(inputs)))
        else:
            heads: dict[bytes, list[int]] = {}
            for number, ids in enumerate(inputs):
                head = ids[: self._template.head_length(ids)].astype("<i4").tobytes()
                heads.setdefault(head, []).append(number)
            for head, numbers in heads.items():
                order = self.pool.preference(head)
                # By the first two choices: if the first fails, the others share its inputs, and each
                # (prompt, reference) still goes to one of them.
                shares.setdefault(tuple(order[:2]), (order, []))[1].extend(numbers)
        settings = self.settings
        for order, numbers in shares.values():
            lengths = [len(inputs[number]) for number in numbers]
            for part in cut_into_requests(lengths, settings.tokens_per_request, settings.inputs_per_request):
                yield order, numbers[part]

    async def contact(self) -> list[Profile | None]:
        """Contacts every server: for each its profile, None where it does not answer now.

        Raises:
            RewardServerError: No server answers, or one does not give raw rewards.
        """
        profiles: list[Profile | None] = []
        for server in self.pool.servers:
            sent_at = asyncio.get_running_loop().time()
            try:
                profiles.append(await self._profile(server, sent_at))
            except UnavailableError as problem:
                self.pool.failed(server, problem, sent_at)
                profiles.append(None)
        if not any(profiles):
            raise RewardServerError(self.pool.names, self.pool.reasons())
        return profiles

    async def _score_request(self, inputs: Sequence[np.ndarray], pending: Pending) -> list[float]:
        try:
            return await self._ask_until_answered(inputs, pending)
        finally:
            self.pool.leave(pending)

    async def _ask_until_answered(self, inputs: Sequence[np.ndarray], pending: Pending) -> list[float]:
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + self.settings.max_wait
        tries_left = self.settings.max_retries * len(self.pool.servers)
        while True:
            server = await self.pool.acquire(pending, give_up_at)
            sent_at = loop.time()
            try:
                profile = await self._profile(server, sent_at)
                rewards = await self._ask_for_rewards(server, profile, inputs)
                self.pool.answered(server)
                return rewards
            except UnavailableError as problem:
                self.pool.failed(server, problem, sent_at)
                tries_left -= not problem.busy
                if tries_left <= 0 or loop.time() > give_up_at + pending.queued:
                    raise RewardServerError(
                        self.pool.names,
                        f"no answer after {self.settings.max_retries} tries each; {self.pool.reasons()}"
                        if tries_left <= 0
                        else f"gave up waiting; {self.pool.reasons()}",
                    ) from None
            finally:
                self.pool.release(server)

    async def _profile(self, server: Endpoint, since: float) -> Profile:
        """The server's profile, after a first contact if it failed or had no request for a while.

        Args:
            server: The server.
            since: When it was asked for. If the contact of another request has failed since then, this one
                fails with it, and does not wait for a time-out of its own.
        """
        async with server.contact:
            if server.profile is None and server.failed_at > since:
                raise UnavailableError(server.last_reason)
            now = asyncio.get_running_loop().time()
            idle = server.requests <= 1 and now - server.answered_at > IDLE_SECONDS
            if server.profile is None or idle:
                server.profile = await self._first_contact(server)
                server.answered_at = asyncio.get_running_loop().time()
            return server.profile

    async def _first_contact(self, server: Endpoint) -> Profile:
        async def ask(path: str, body: Any) -> tuple[int, Any]:
            response = await self._send(server, path, body)
            if response.status_code in (401, 403):
                raise RewardServerError(
                    server.name, refusal(response.status_code, _json(response)), response.status_code
                )
            return response.status_code, _json(response)

        profile = await identify(server.name, ask, self.server_type)
        if self.settings.check_raw:
            extra, scores = await check_scores(
                server.name, ask, profile, self._probes, self._template.separator_id
            )
            profile = replace(profile, extra=extra, probe_scores=scores)
            if self._known is None:
                self._known = (server.name, scores)
            check_same_model(server.name, scores, *self._known)
        elif profile.wire == "vllm":
            profile = replace(profile, extra={"use_activation": False})
        if profile.template not in (None, self._template.fingerprint):
            LOGGER.warning(
                "%s: has another tokenizer, or other limits, than this client; the client's are used",
                server.name,
            )
        LOGGER.info("%s: %s, model %s", server.name, profile.name or "engine unknown", profile.model)
        return profile

    async def _ask_for_rewards(
        self, server: Endpoint, profile: Profile, inputs: Sequence[np.ndarray]
    ) -> list[float]:
        lengths = [len(ids) for ids in inputs]
        # A multi-item request has a delimiter on both sides of its only item.
        most = sys.maxsize if profile.max_tokens is None else profile.max_tokens
        most -= 2 if profile.wire == "sglang-mis" else 0
        if max(lengths) > most:
            raise RewardServerError(
                server.name,
                f"takes inputs of at most {most} tokens, and one has {max(lengths)}; start it "
                f"with a longer limit, or lower max_length",
            )
        rewards = dict.fromkeys(range(len(inputs)), 0.0)
        for part in requests_of(profile.wire, inputs, self._template.separator_id, profile.max_tokens):
            scored = await self._ask_for_part(server, profile, [inputs[i] for i in part])
            rewards.update(zip(part, scored, strict=True))
        return list(rewards.values())

    async def _ask_for_part(
        self, server: Endpoint, profile: Profile, inputs: Sequence[np.ndarray]
    ) -> list[float]:
        body = request_body(profile.wire, inputs, profile.extra)
        response = await self._send(server, ROUTES[profile.wire], body)
        if response.status_code != 200:
            hint = how_to_start(profile) if response.status_code in (404, 405) else ""
            raise RewardServerError(
                server.name, refusal(response.status_code, _json(response), hint), response.status_code
            )
        try:
            return read_answer(profile.wire, _strict_json(response), inputs)
        except WireError as error:
            raise RewardServerError(server.name, str(error)) from None

    async def _send(self, server: Endpoint, path: str, body: Any) -> httpx.Response:
        """Sends one HTTP request.

        Raises:
            UnavailableError: There was no answer, or one that asks to try again.
            RewardServerError: The answer cannot be read.
        """
        request = self._http.build_request("GET" if body is None else "POST", server.url + path, json=body)
        seconds = self.settings.timeout
        try:
            # The time-outs of httpx are for each read, not in total: a server could send a byte now and then.
            response = await asyncio.wait_for(self._http.send(request), seconds)
        except (asyncio.TimeoutError, httpx.ReadTimeout, httpx.WriteTimeout):
            raise UnavailableError(f"no answer within {seconds:g} s (timeout)") from None
        except httpx.TransportError as error:
            raise UnavailableError(f"no connection, or it broke off ({first_line(error)})") from None
        except httpx.HTTPError as error:
            raise RewardServerError(server.name, f"its answer cannot be read ({error})") from None
        status = response.status_code
        if status in RETRIED:
            retry_after = _retry_after(response.headers.get("retry-after"))
            raise UnavailableError(refusal(status, _json(response)), retry_after, busy=status == 429)
        return response


async def _all_or_none(tasks: Sequence[asyncio.Future[None]]) -> None:
    """Waits for all tasks; where one fails, or the wait is cancelled, the others are stopped."""
    try:
        await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


def _json(response: httpx.Response) -> Any:
    """The JSON of the answer; None where it is none."""
    try:
        return json.loads(response.content)
    except (ValueError, RecursionError):
        return None


def _strict_json(response: httpx.Response) -> Any:
    try:
        return json.loads(response.content)
    except (ValueError, RecursionError):
        kind = response.headers.get("content-type", "no content type")
        raise WireError(
            f"its answer is not JSON ({len(response.content)} bytes of {kind:.60}); is this the address of "
            f"the engine itself?"
        ) from None


def _retry_after(value: str | None) -> float | None:
    """Seconds of a Retry-After header (RFC 9110, section 10.2.3): a number or a date.

    >>> _retry_after("7"), _retry_after("Wed, 21 Oct 2015 07:28:00 GMT"), _retry_after("soon")
    (7.0, 0.0, None)
    """
    if value is None:
        return None
    if value.strip().isdecimal():
        return float(value)
    try:
        date = parsedate_to_datetime(value)
    except ValueError:
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=timezone.utc)
    return max(0.0, (date - datetime.now(timezone.utc)).total_seconds())
