"""`RewardModelClient`: the rewards of a model that a server runs."""

from __future__ import annotations

import asyncio
import os
import weakref
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from typing import Any, Literal

import numpy as np

from polar_ft.client import background
from polar_ft.client.contact import Profile, ServerType, probe_sequences
from polar_ft.client.encoded_text import EncodedElement, encode_elements, parse_elements
from polar_ft.client.servers import LOGGER, Endpoint, parse_addresses
from polar_ft.client.transport import Settings, Transport
from polar_ft.client.wire import WIRES
from polar_ft.errors import PolarError
from polar_ft.groups import TokenGroup
from polar_ft.reward_scale import RewardScale
from polar_ft.template import PolarTemplate

API_KEY_VARIABLE = "POLAR_API_KEY"

# Elements of the data that are encoded and sent together.
ELEMENTS_AT_ONCE = 1024

# Besides the weights, what says how a model's inputs are made.
_TOKENIZER_FILES = ["*.json", "*.py", "*.model", "*.txt"]


class RewardModelClient:
    """Rewards from SGLang, vLLM, LMDeploy or `polar-ft serve`.

    The published client's constructor and calls (xtuner 0.2.0, ``xtuner.utils.RewardModelClient``), so that a
    script changes one import::

        client = RewardModelClient("internlm/POLAR-7B", server_address="127.0.0.1:30000")
        rewards = client(data)

    Inputs are made by the template that training uses and sent as token ids. A server is used only after it
    has shown that it gives raw rewards (see `polar_ft.client.contact`). What cannot be answered is a
    `RewardServerError` that names the server; there is no None among the rewards, and no other order.

    One client serves many threads. Connections are kept until it is closed or goes away.

    Args:
        path: The model's folder, or a hub id; its tokenizer and the settings of its template are read.
        max_length: Upper limit of an input in tokens; None takes what the model was trained with, if its
            folder says so, else 16384.
        max_response_length: Upper limit of the reference and of each candidate in tokens; None likewise, else
            4096.
        response_cut_side: "right", as in training. The published default, "left", gives a model inputs that
            it was not trained on, and is refused.
        server_type: "sglang", "vllm" or "lmdeploy"; "auto" asks the server.
        server_address: ``host:port`` or a URL, or several of them. Requests go to the least busy one; those
            of a server that fails go to the others.
        api_key: Sent as a Bearer token; None takes the environment variable POLAR_API_KEY, if it is set.
        timeout: Seconds that one request may take in all.
        max_retries: How often a request is tried per server, after connection errors, time-outs and HTTP 502,
            503 and 504. No other answer is retried, but for 429, for as long as `max_wait`.
        retry_delay: Seconds before the first retry; doubled with every further one, to at most 30.
        max_wait: Seconds for which a request waits for servers that are busy.
        tokens_per_request: A request holds at most so many tokens, or a single input.
        concurrency: Requests under way at each server.
        check_raw: False uses a server without evidence that its scores are raw rewards.
        scale: Apply the reward scale that ``polar-ft calibrate`` wrote into the model's folder.
        allow_tokenizer_code: As in `PolarTemplate.from_pretrained`.

    Raises:
        PolarError: A setting is wrong, or the folder has no usable tokenizer.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        max_length: int | None = None,
        max_response_length: int | None = None,
        response_cut_side: Literal["right"] = "right",
        server_type: ServerType = "auto",
        server_address: str | Sequence[str] = "127.0.0.1:30000",
        *,
        api_key: str | None = None,
        timeout: float = 120.0,
        max_retries: int = 8,
        retry_delay: float = 0.2,
        max_wait: float = 300.0,
        tokens_per_request: int = 32768,
        concurrency: int = 8,
        check_raw: bool = True,
        scale: bool = False,
        allow_tokenizer_code: Iterable[str] = (),
    ) -> None:
        if response_cut_side != "right":
            raise PolarError(
                f"response_cut_side={response_cut_side!r}: training cuts a response on the right, so a model "
                f"has never seen one that lacks its beginning, and its reward for it means nothing; leave "
                f"response_cut_side out, and raise max_response_length if too much is cut"
            )
        if server_type not in ("auto", *WIRES):
            raise PolarError(
                f"server_type={server_type!r}: is not known; it may be 'auto', {', '.join(map(repr, WIRES))}"
            )
        self._settings = Settings(
            api_key=clean_api_key(api_key),
            timeout=_positive("timeout", timeout),
            max_retries=int(_positive("max_retries", max_retries)),
            retry_delay=_positive("retry_delay", retry_delay),
            max_wait=_positive("max_wait", max_wait),
            tokens_per_request=int(_positive("tokens_per_request", tokens_per_request)),
            concurrency=int(_positive("concurrency", concurrency)),
            check_raw=check_raw,
        )
        self.server_type: ServerType = server_type
        self._addresses = parse_addresses(server_address)
        folder = _local_folder(path)
        self.template = PolarTemplate.from_pretrained(
            folder,
            max_length=max_length,
            max_response_length=max_response_length,
            allow_tokenizer_code=allow_tokenizer_code,
        )
        self._probes = probe_sequences(self.template)
        self._scale = RewardScale.load(folder) if scale else None
        # By event loop and settings; made and used inside that loop alone.
        self._transports: dict[Any, Transport] = {}
        self._closing = weakref.finalize(self, _close_soon, self._transports)
        # At the end of the process the operating system closes connections.
        self._closing.atexit = False

    def encode(self, data: Any) -> Any:
        """The texts of the data, as the published client spells them, with their token ids.

        Args:
            data: A dict with ``prompt``, ``reference``, ``output`` and perhaps ``wrapper``, or a list of
                them; a prompt, reference or output is a string or a list of messages. Strings that this
                method gave are passed on.

        Returns:
            An `EncodedText`, or a list of them: strings with an attribute ``ids``.

        Raises:
            PolarError: An element cannot be encoded; names it.
        """
        one = _is_one(data)
        encoded = encode_elements(self.template, list(parse_elements([data] if one else data)))
        self._report_cut(_n_cut(encoded), len(encoded))
        texts = [element.text for element in encoded]
        return texts[0] if one else texts

    def __call__(self, data: Any) -> list[float]:
        """Rewards of the data, in its order.

        Args:
            data: As in `encode`; any iterable, of which few elements are held at a time.

        Raises:
            PolarError: An element cannot be encoded; names it.
            RewardServerError: A server answered something else than rewards, or none answered.
        """
        return self._request(data, self.server_type)

    async def score_async(self, data: Any) -> list[float]:
        """As calling the client, from a coroutine, whose event loop continues meanwhile."""
        elements = parse_elements([data] if _is_one(data) else data)
        encoded = await asyncio.to_thread(lambda: encode_elements(self.template, list(elements)))
        self._report_cut(_n_cut(encoded), len(encoded))
        inputs = [element.ids for element in encoded]
        future = background.start(self._score(inputs, self.server_type, self._settings))
        return self._scaled(await asyncio.wrap_future(future))

    def sglang_request_reward(
        self, data: Any, retry_delay: float | None = None, max_retries: int | None = None
    ) -> list[float]:
        """Rewards of encoded texts, in SGLang's wire format.

        Args:
            data: What `encode` gave, or dicts.
            retry_delay: In place of the constructor's.
            max_retries: In place of the constructor's.

        Raises:
            PolarError: As in calling the client.
        """
        return self._request(data, "sglang", retry_delay, max_retries)

    def vllm_request_reward(
        self, data: Any, retry_delay: float | None = None, max_retries: int | None = None
    ) -> list[float]:
        """As `sglang_request_reward`, in vLLM's wire format."""
        return self._request(data, "vllm", retry_delay, max_retries)

    def lmdeploy_request_reward(
        self, data: Any, retry_delay: float | None = None, max_retries: int | None = None
    ) -> list[float]:
        """As `sglang_request_reward`, in LMDeploy's wire format."""
        return self._request(data, "lmdeploy", retry_delay, max_retries)

    def submit_encoded(self, encoded: Sequence[TokenGroup]) -> Future[list[list[float]]]:
        """Starts scoring what `PolarTemplate.encode` gave.

        Returns:
            A future of a reward for each candidate, `[encoded][candidates]`; cancelling it stops the
            requests.
        """
        inputs = [ids for group in encoded for ids in group.sequences]

        async def score() -> list[list[float]]:
            rewards = iter(self._scaled(await self._score(inputs, self.server_type, self._settings)))
            return [[next(rewards) for _ in group.branches] for group in encoded]

        return background.start(score())

    def servers(self) -> list[Profile | None]:
        """Contacts every server and says what it is, in the order of the addresses.

        Returns:
            What is known of each, None of one that does not answer now.

        Raises:
            RewardServerError: None of them answers, or one does not give raw rewards.
        """

        async def contact() -> list[Profile | None]:
            return await self._transport(self.server_type, self._settings).contact()

        return background.wait_for(background.start(contact()))

    def close(self) -> None:
        """Closes the connections; the next call opens them again."""
        for transport in _take(self._transports):
            background.wait_for(background.start(transport.close()))

    def __enter__(self) -> RewardModelClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _request(
        self,
        data: Any,
        server_type: ServerType,
        retry_delay: float | None = None,
        max_retries: int | None = None,
    ) -> list[float]:
        settings = self._settings
        if retry_delay is not None:
            settings = replace(settings, retry_delay=_positive("retry_delay", retry_delay))
        if max_retries is not None:
            settings = replace(settings, max_retries=int(_positive("max_retries", max_retries)))
        elements = parse_elements([data] if _is_one(data) else data)
        under_way: deque[Future[list[float]]] = deque()
        rewards: list[float] = []
        n_encoded = n_cut = 0
        try:
            while window := list(islice(elements, ELEMENTS_AT_ONCE)):
                encoded = encode_elements(self.template, window, first=n_encoded)
                n_encoded += len(encoded)
                n_cut += _n_cut(encoded)
                inputs = [element.ids for element in encoded]
                under_way.append(background.start(self._score(inputs, server_type, settings)))
                if len(under_way) > 2:  # the next window is encoded while these are scored
                    scored = background.wait_for(under_way.popleft())
                    rewards += scored
            while under_way:
                scored = background.wait_for(under_way.popleft())
                rewards += scored
        finally:
            for future in under_way:
                future.cancel()
        self._report_cut(n_cut, n_encoded)
        return self._scaled(rewards)

    async def _score(
        self, inputs: Sequence[np.ndarray], server_type: ServerType, settings: Settings
    ) -> list[float]:
        return await self._transport(server_type, settings).score(inputs)

    def _transport(self, server_type: ServerType, settings: Settings) -> Transport:
        """Called in the event loop; a forked process has another loop, and so transports of its own."""
        key = (asyncio.get_running_loop(), server_type, settings)
        if key not in self._transports:
            servers = [Endpoint(name, url) for name, url in self._addresses]
            self._transports[key] = Transport(
                servers, server_type, self._probes, settings, self.template.fingerprint
            )
        return self._transports[key]

    def _scaled(self, rewards: list[float]) -> list[float]:
        return rewards if self._scale is None else self._scale.apply(rewards)

    def _report_cut(self, n_cut: int, n_inputs: int) -> None:
        if n_cut:
            LOGGER.warning(
                "%d of %d inputs were cut: they are longer than max_length=%d, max_response_length=%d allow",
                n_cut,
                n_inputs,
                self.template.max_length,
                self.template.max_response_length,
            )


def _is_one(data: Any) -> bool:
    return isinstance(data, (str, Mapping))


def _n_cut(encoded: Iterable[EncodedElement]) -> int:
    return sum(element.is_cut for element in encoded)


def _take(transports: dict[Any, Transport]) -> list[Transport]:
    taken = [transport for (loop, *_), transport in transports.items() if loop is background.event_loop()]
    transports.clear()
    return taken


def _close_soon(transports: dict[Any, Transport]) -> None:
    for transport in _take(transports):
        background.start(transport.close())


def clean_api_key(given: str | None) -> str | None:
    """The key to send: what was given, else POLAR_API_KEY, else None.

    Raises:
        PolarError: It cannot be sent.
    """
    key = (given if given is not None else os.environ.get(API_KEY_VARIABLE, "")).strip()
    if not key:
        return None
    if not (key.isascii() and key.isprintable()) or " " in key:
        # Not repeated: it is a secret.
        raise PolarError(
            f"api_key (or {API_KEY_VARIABLE}): has characters that no key has; check what it holds"
        )
    return key


def _positive(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise PolarError(f"{name}={value!r}: must be a number greater than 0")
    return value


def _local_folder(path: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """The path, or what a client needs of a model on the hub, which are not its weights."""
    if os.path.exists(path):
        return path
    with suppress(Exception):  # what is wrong with the path is said by who reads the folder
        from huggingface_hub import snapshot_download

        return snapshot_download(os.fspath(path), allow_patterns=_TOKENIZER_FILES)
    return path
