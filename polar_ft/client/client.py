"""`RewardModelClient`: rewards from a model that a server runs."""

from __future__ import annotations

import asyncio
import os
import threading
import weakref
from collections import deque
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from typing import Any, Literal, TypeVar

import numpy as np

from polar_ft.client.contact import Profile, ServerType, probe_sequences
from polar_ft.client.encoded_text import EncodedElement, encode_elements, parse_elements
from polar_ft.client.servers import LOGGER, Endpoint, parse_addresses
from polar_ft.client.transport import Settings, Transport
from polar_ft.client.wire import WIRES
from polar_ft.errors import PolarError
from polar_ft.groups import TokenGroup
from polar_ft.reward_scale import RewardScale
from polar_ft.template import PolarTemplate

Result = TypeVar("Result")

API_KEY_VARIABLE = "POLAR_API_KEY"

# Elements of the data that are encoded and sent together.
ELEMENTS_AT_ONCE = 1024

# The files that say how inputs of a model are made; the weights are not needed.
_TOKENIZER_FILES = ["*.json", "*.py", "*.model", "*.txt"]


class RewardModelClient:
    """Rewards from SGLang, vLLM, LMDeploy or `polar-ft serve`.

    Constructor and calls are those of the published client (xtuner 0.2.0,
    ``xtuner.utils.RewardModelClient``), so that a script changes one import::

        client = RewardModelClient("internlm/POLAR-7B", server_address="127.0.0.1:30000")
        rewards = client(data)

    Inputs are encoded by the same template as in training and sent as token ids. Before a server is used, it
    has to show that it gives raw rewards (see `polar_ft.client.contact`). Rewards come in the order of the
    data, and none is None: what a server does not answer raises a `RewardServerError` that names it.

    ``server_type="sglang-mis"`` is SGLang with multi-item scoring: candidates of a (prompt, reference) are
    one sequence for the engine, which computes what they share once.

    Many threads can share one client. Connections stay open until it is closed or garbage-collected.

    Args:
        path: Folder of the model, or a hub id; its tokenizer and the settings of its template are read.
        max_length: Upper limit of an input in tokens; None takes the limit of training if the folder states
            it, else 16384.
        max_response_length: Upper limit of the reference and of each candidate in tokens; None takes the
            limit of training if the folder states it, else 4096.
        response_cut_side: "right", as in training. The published default, "left", makes inputs that the model
            was not trained on, and is refused.
        server_type: "sglang", "vllm" or "lmdeploy"; "auto" asks the server.
        server_address: ``host:port`` or a URL, or several of them. All candidates of a (prompt, reference)
            go to the same server, unless it is overloaded; those of a server that fails go to the others.
        api_key: Sent as a Bearer token; None takes the environment variable POLAR_API_KEY, if it is set.
        timeout: Seconds that one request may take in total.
        max_retries: How often a request is tried per server, after connection errors, time-outs and HTTP 502,
            503 and 504. HTTP 429 is retried for `max_wait` seconds; no other answer is retried.
        retry_delay: Seconds before the first retry; doubled with every further one, up to 30.
        max_wait: Seconds for which a request waits for busy servers.
        tokens_per_request: Most tokens in a request; a longer input is sent alone.
        concurrency: Requests in progress at each server.
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
                f"has never seen one without its beginning, and its reward for it means nothing; leave "
                f"response_cut_side out, and raise max_response_length if too much is cut"
            )
        if server_type not in ("auto", *WIRES):
            raise PolarError(
                f"server_type={server_type!r}: is not known; use 'auto', {', '.join(map(repr, WIRES))}"
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
        # By event loop, server type and settings; made and used only inside that loop.
        self._transports: dict[Any, Transport] = {}
        self._closing = weakref.finalize(self, _close_soon, self._transports)
        # When the process ends, the operating system closes the connections.
        self._closing.atexit = False

    def encode(self, data: Any) -> Any:
        """Encodes the data: its texts, as the published client spells them, with their token ids.

        Args:
            data: A dict with ``prompt``, ``reference``, ``output`` and an optional ``wrapper``, or a list of
                them; a prompt, reference or output is a string or a list of messages. Strings that this
                method returned stay as they are.

        Returns:
            An `EncodedText`, or a list of them: strings with an attribute ``ids``.

        Raises:
            PolarError: An element cannot be encoded; the message names it.
        """
        one = _is_one(data)
        encoded = encode_elements(self.template, list(parse_elements([data] if one else data)))
        self._report_cut(_n_cut(encoded), len(encoded))
        texts = [element.text for element in encoded]
        return texts[0] if one else texts

    def __call__(self, data: Any) -> list[float]:
        """Scores the data; rewards come in its order.

        Args:
            data: As in `encode`; of an iterable few elements are held at a time.

        Raises:
            PolarError: An element cannot be encoded; the message names it.
            RewardServerError: A server answered with something other than rewards, or no server answered.
        """
        return self._request(data, self.server_type)

    async def score_async(self, data: Any) -> list[float]:
        """As calling the client, from a coroutine, whose event loop continues meanwhile."""
        elements = parse_elements([data] if _is_one(data) else data)
        encoded = await asyncio.to_thread(lambda: encode_elements(self.template, list(elements)))
        self._report_cut(_n_cut(encoded), len(encoded))
        inputs = [element.ids for element in encoded]
        future = _start(self._score(inputs, self.server_type, self._settings))
        return self._scaled(await asyncio.wrap_future(future))

    def sglang_request_reward(
        self, data: Any, retry_delay: float | None = None, max_retries: int | None = None
    ) -> list[float]:
        """Scores encoded texts in SGLang's wire format.

        Args:
            data: What `encode` returned, or dicts.
            retry_delay: Overrides the constructor's.
            max_retries: Overrides the constructor's.

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
        """Starts scoring token groups.

        Returns:
            A future of a reward for each candidate, `[encoded][candidates]`; cancelling it stops the
            requests.
        """
        inputs = [ids for group in encoded for ids in group.sequences]

        async def score() -> list[list[float]]:
            rewards = iter(self._scaled(await self._score(inputs, self.server_type, self._settings)))
            return [[next(rewards) for _ in group.branches] for group in encoded]

        return _start(score())

    def servers(self) -> list[Profile | None]:
        """Contacts every server and identifies it, in the order of the addresses.

        Returns:
            For each server its profile, None where it does not answer now.

        Raises:
            RewardServerError: None of them answers, or one does not give raw rewards.
        """

        async def contact() -> list[Profile | None]:
            return await self._transport(self.server_type, self._settings).contact()

        return _wait_for(_start(contact()))

    def close(self) -> None:
        """Closes the connections; the next call opens them again."""
        for transport in _take(self._transports):
            _wait_for(_start(transport.close()))

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
                under_way.append(_start(self._score(inputs, server_type, settings)))
                if len(under_way) > 2:  # the next window is encoded while these are scored
                    scored = _wait_for(under_way.popleft())
                    rewards += scored
            while under_way:
                scored = _wait_for(under_way.popleft())
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
        """The transport of the running event loop; a forked process has its own loop and transports."""
        key = (asyncio.get_running_loop(), server_type, settings)
        if key not in self._transports:
            servers = [Endpoint(name, url) for name, url in self._addresses]
            self._transports[key] = Transport(servers, server_type, self._probes, settings, self.template)
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


# One event loop for all clients of a process, in its own thread: so their calls work in a script, in a
# notebook (which has a running loop already) and from many threads at once, and connections stay open between
# calls.
_loop: asyncio.AbstractEventLoop | None = None
# Re-entrant: the garbage collector may close a client while the lock is held.
_loop_lock = threading.RLock()


def _event_loop() -> asyncio.AbstractEventLoop:
    """The running loop; started at the first call, and again in a forked process."""
    global _loop
    with _loop_lock:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            threading.Thread(target=_loop.run_forever, name="polar_ft.client", daemon=True).start()
        return _loop


def _forget_loop() -> None:
    # A forked process does not have the thread: what waits for it there would wait for ever.
    global _loop, _loop_lock
    _loop, _loop_lock = None, threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_loop)


def _start(work: Coroutine[Any, Any, Result]) -> Future[Result]:
    """Starts work in the loop; any thread may wait for the future."""
    return asyncio.run_coroutine_threadsafe(work, _event_loop())


def _wait_for(future: Future[Result]) -> Result:
    """The result of what was started; where the wait is interrupted (Ctrl-C), the work is stopped."""
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


def _is_one(data: Any) -> bool:
    return isinstance(data, (str, Mapping))


def _n_cut(encoded: Iterable[EncodedElement]) -> int:
    return sum(element.is_cut for element in encoded)


def _take(transports: dict[Any, Transport]) -> list[Transport]:
    taken = [transport for (loop, *_), transport in transports.items() if loop is _event_loop()]
    transports.clear()
    return taken


def _close_soon(transports: dict[Any, Transport]) -> None:
    for transport in _take(transports):
        _start(transport.close())


def clean_api_key(given: str | None) -> str | None:
    """The key to send: the given one, else that of POLAR_API_KEY, else None.

    Raises:
        PolarError: The key cannot be sent in a header.
    """
    key = (given if given is not None else os.environ.get(API_KEY_VARIABLE, "")).strip()
    if not key:
        return None
    if not (key.isascii() and key.isprintable()) or " " in key:
        # The key is a secret, so the message does not repeat it.
        raise PolarError(f"api_key (or {API_KEY_VARIABLE}): has characters that no key has; check its value")
    return key


def _positive(name: str, value: float) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
        raise PolarError(f"{name}={value!r}: must be a number greater than 0")
    return value


def _local_folder(path: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """The path itself, or of a model on the hub a download without its weights."""
    if os.path.exists(path):
        return path
    with suppress(Exception):  # whoever reads the folder reports what is wrong with the path
        from huggingface_hub import snapshot_download

        return snapshot_download(os.fspath(path), allow_patterns=_TOKENIZER_FILES)
    return path
