"""First contact: which engine answers, and are its answers raw rewards?

An engine that applies an activation to the rewards returns plausible numbers, with which a policy is trained
towards the wrong goal: vLLM returns sigmoid(reward) by default, SGLang's ``/v1/classify`` a softmax over one
class, which is 1. So a server first scores the known inputs of `probe_sequences`, and there has to be
evidence that the scores are raw rewards:

1. A score outside [0, 1] is evidence: neither sigmoid nor softmax can give it. The scores of good, wrong,
   empty and garbled answers nearly always include one.
2. Where all scores lie within [0, 1] and the server is a vLLM, the same inputs are scored with the activation
   on. If that gives sigmoid(score), the score is raw. If the switch of older versions (``activation``) gives
   it, that switch is used from then on.
3. The embedded server of polar_ft has no activation.

Anything else is an error that says how to start the server. The scores of the known inputs also reveal a
server that has another model than the others, or that gives the same score for every input.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from polar_ft.client.errors import RewardServerError, WireError
from polar_ft.client.wire import ROUTES, WIRES, Wire, read_answer, request_body, requests_of
from polar_ft.groups import TextGroup
from polar_ft.template import PolarTemplate

ServerType = Literal["auto", "sglang", "vllm", "lmdeploy", "sglang-mis"]

# GET (path, body None) or POST (path, body) to the server: HTTP status and JSON, None where it is not JSON.
Ask = Callable[[str, Any], Awaitable[tuple[int, Any]]]

ENGINE_NAMES = {"sglang": "SGLang", "vllm": "vLLM", "lmdeploy": "LMDeploy", "polar_ft": "polar-ft serve"}

# Where an engine gives its version; SGLang renamed its route in 2026.
_VERSION_ROUTES = {"vllm": ["/version"], "sglang": ["/server_info", "/get_server_info"]}

_HOW_TO_START = {
    "vllm": "start it with: vllm serve MODEL --runner pooling --trust-remote-code "
    """--pooler-config '{"use_activation": false}'""",
    "sglang": "start it with: python -m sglang.launch_server --model MODEL --trust-remote-code "
    "--is-embedding",
    "sglang-mis": "start it with: python -m sglang.launch_server --model MODEL --is-embedding --enable-mis "
    "--attention-backend flashinfer; models whose class pools the last token only, as "
    "LlamaForSequenceClassification, need server_type='sglang'",
    "lmdeploy": "start it with: lmdeploy serve api_server MODEL --backend pytorch",
    "polar_ft": "start it with: polar-ft serve MODEL",
}

# Scores of one model by two servers differ by rounding: about 3 in 1000 of the largest score in bf16.
_SAME_MODEL = 0.05


@dataclass(frozen=True)
class Profile:
    """What is known of a server.

    Attributes:
        wire: Wire format of requests to it.
        engine: "sglang", "vllm", "lmdeploy" or "polar_ft"; None where it does not say.
        version: Version of the engine; None where it does not say.
        model: The server's name for its model.
        model_path: From where it loaded the model: a folder on its machine, or a hub id.
        max_tokens: Longest input that it accepts, in tokens; None where it does not say.
        template: Fingerprint of the template of `polar-ft serve`; None for the other engines.
        extra: Fields that every request contains.
        probe_scores: Its scores of the known inputs; empty where they were not asked for.
    """

    wire: Wire
    engine: str | None = None
    version: str | None = None
    model: str | None = None
    model_path: str | None = None
    max_tokens: int | None = None
    template: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    probe_scores: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        """Engine and version, for messages."""
        return " ".join(filter(None, (ENGINE_NAMES.get(self.engine or "", self.engine), self.version)))


def probe_sequences(template: PolarTemplate) -> list[np.ndarray]:
    """The known inputs, `[inputs][tokens]`: texts to which any reward model gives different scores."""
    candidates = (
        "Beijing.",
        "Shanghai.",
        "",
        "I will not answer that.",
        "北京是中国的首都。",
        "zq)(x%% 9 9 9 9 9 9",
    )
    question = TextGroup("What is the capital of China?", ("Beijing.",), candidates)
    other = TextGroup("Write a haiku about rain.", ("",), ("7", "Rain on the tin roof"))
    return [ids for group in template.encode([question, other]) for ids in group.sequences]


async def identify(server: str, ask: Ask, server_type: ServerType) -> Profile:
    """Finds out which engine answers, without scoring anything.

    Args:
        server: Its name, for errors.
        ask: Sends a request.
        server_type: The engine that the user named; "auto" takes what the server says.

    Raises:
        RewardServerError: The server is another engine than the user named, or cannot be identified.
        UnavailableError: It does not answer now.
    """
    status, listing = await ask("/v1/models", None)
    card = first_card(listing) if status == 200 else {}
    engine = card.get("owned_by") if card.get("owned_by") in ENGINE_NAMES else None
    wire = _choose_wire(server, engine, server_type, status)
    limit = card.get("max_model_len")
    return Profile(
        wire=wire,
        engine=engine,
        version=await _version(ask, engine, card),
        model=_text(card.get("id")),
        model_path=_text(card.get("root")) or _text(card.get("id")),
        max_tokens=limit if type(limit) is int and limit > 0 else None,
        template=_text(card.get("template")) if engine == "polar_ft" else None,
    )


def first_card(listing: Any) -> Mapping[str, Any]:
    """The first model in an answer of ``GET /v1/models``; empty where the answer has none."""
    data = listing.get("data") if isinstance(listing, Mapping) else None
    card = data[0] if isinstance(data, list) and data else None
    return card if isinstance(card, Mapping) else {}


def _choose_wire(server: str, engine: str | None, server_type: ServerType, status: int) -> Wire:
    if engine == "polar_ft":
        # It has all formats; answers in this one have the fewest bytes.
        return "sglang"
    if server_type == "auto":
        if engine is None:
            raise RewardServerError(
                server,
                f"does not say which engine it is (GET /v1/models gave HTTP {status}); name it with "
                f"server_type={', '.join(map(repr, WIRES))} (--server-type)",
            )
        return engine  # type: ignore[return-value]
    if engine not in (None, server_type.removesuffix("-mis")):
        raise RewardServerError(
            server,
            f"is {ENGINE_NAMES[engine or '']}, not {ENGINE_NAMES[server_type.removesuffix('-mis')]}; "
            f"say server_type={engine!r} or server_type='auto'",
        )
    return server_type


async def _version(ask: Ask, engine: str | None, card: Mapping[str, Any]) -> str | None:
    if _text(card.get("version")):
        return _text(card["version"])
    for route in _VERSION_ROUTES.get(engine or "", []):
        status, answer = await ask(route, None)
        if status == 200 and isinstance(answer, Mapping) and _text(answer.get("version")):
            return _text(answer["version"])
    return None


def _text(value: Any) -> str | None:
    return value[:200] if isinstance(value, str) and value else None


async def check_scores(
    server: str, ask: Ask, profile: Profile, probes: Sequence[np.ndarray], separator_id: int
) -> tuple[Mapping[str, Any], tuple[float, ...]]:
    """Scores the known inputs and checks that the scores are raw rewards; see the top of the module.

    Args:
        server: Its name, for errors.
        ask: Sends a request.
        profile: What `identify` found.
        probes: The known inputs, `[inputs][tokens]`.
        separator_id: See `requests_of`.

    Returns:
        The fields that every request must contain, and the scores.

    Raises:
        RewardServerError: The scores are not raw, or there is no evidence that they are.
        UnavailableError: It does not answer now.
    """

    async def ask_for(inputs: Sequence[np.ndarray], extra: Mapping[str, Any]) -> list[float]:
        status, answer = await ask(ROUTES[profile.wire], request_body(profile.wire, inputs, extra))
        if status != 200:
            raise RewardServerError(
                server, refusal(status, answer, how_to_start(profile)), status if status >= 400 else None
            )
        try:
            return read_answer(profile.wire, answer, inputs)
        except WireError as error:
            raise RewardServerError(server, f"{error} ({how_to_start(profile)})") from None

    async def score(**extra: Any) -> tuple[float, ...]:
        scores = dict.fromkeys(range(len(probes)), 0.0)
        for part in requests_of(profile.wire, probes, separator_id, profile.max_tokens):
            scores.update(zip(part, await ask_for([probes[i] for i in part], extra), strict=True))
        return tuple(scores.values())

    if profile.wire != "vllm":
        scores = await score()
        if profile.engine != "polar_ft" and not _has_raw_score(scores):
            raise _not_raw(server, profile, scores)
        return {}, _tells_apart(server, scores)

    raw = {"use_activation": False}
    scores = await score(**raw)
    if _has_raw_score(scores):
        return raw, _tells_apart(server, scores)
    if _is_sigmoid_of(await score(use_activation=True), scores):
        return raw, _tells_apart(server, scores)
    # vLLM 0.10 and 0.11 call the switch "activation", and ignore a field that they do not know.
    with suppress(RewardServerError):
        older = await score(activation=False)
        if _is_sigmoid_of(scores, older):
            return {"activation": False}, _tells_apart(server, older)
    raise _not_raw(server, profile, scores)


def check_same_model(server: str, scores: Sequence[float], other: str, others: Sequence[float]) -> None:
    """Checks that two servers, or one server before and after a failure, give the same scores up to rounding.

    Raises:
        RewardServerError: The scores differ; the message names both servers.

    >>> check_same_model("a:1", [-0.5, -11.0], "b:1", [-0.52, -10.9])
    """
    allowed = _SAME_MODEL * max(map(abs, [*scores, *others])) + 1e-6
    for mine, yours in zip(scores, others, strict=True):
        if abs(mine - yours) > allowed:
            before = "it scored it before" if other == server else f"{other} scores it"
            raise RewardServerError(
                server,
                f"scores a known input {mine:.4g} where {before} {yours:.4g}; is it the same model, with the "
                f"same settings?",
            )


def refusal(status: int, answer: Any, hint: str = "") -> str:
    """The error that a server answered with, shortened, as it may repeat the request.

    >>> refusal(400, {"error": {"message": "too long"}})
    'HTTP 400: too long'
    """
    message = answer
    while isinstance(message, Mapping):
        message = next((message[key] for key in ("error", "message", "detail") if key in message), "")
    if isinstance(message, list):  # FastAPI's list of problems
        message = next((p["msg"] for p in message if isinstance(p, Mapping) and "msg" in p), "")
    said = " ".join(str(message or "").split())[:300]
    if status in (401, 403):
        hint = "check the key: --api-key-file FILE, POLAR_API_KEY in the environment, or in Python api_key=…"
    return f"HTTP {status}" + (f": {said}" if said else "") + (f" ({hint})" if hint else "")


def how_to_start(profile: Profile) -> str:
    """The command that starts such a server so that it gives raw rewards."""
    return _HOW_TO_START["polar_ft" if profile.engine == "polar_ft" else profile.wire]


def _has_raw_score(scores: Sequence[float]) -> bool:
    return any(not 0.0 <= score <= 1.0 for score in scores)


def _is_sigmoid_of(activated: Sequence[float], raw: Sequence[float]) -> bool:
    """Whether the first scores are the sigmoids of the others, within the rounding of bf16, and differ.

    >>> _is_sigmoid_of([0.5, 0.731], [0.0, 1.0]), _is_sigmoid_of([0.5, 0.7], [0.5, 0.7])
    (True, False)
    """

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))

    pairs = list(zip(activated, raw, strict=True))
    # A number near 0.66 is its own sigmoid.
    return all(abs(a - sigmoid(r)) < 0.02 for a, r in pairs) and any(abs(a - r) > 0.05 for a, r in pairs)


def _tells_apart(server: str, scores: tuple[float, ...]) -> tuple[float, ...]:
    if len(set(scores)) == 1:
        raise RewardServerError(
            server,
            f"gives {scores[0]:.4g} for each of {len(scores)} different inputs; is its reward head (v_head) "
            f"loaded and trained?",
        )
    return scores


def _not_raw(server: str, profile: Profile, scores: Sequence[float]) -> RewardServerError:
    shown = ", ".join(f"{score:.4g}" for score in scores)
    if all(score == 1.0 for score in scores):
        what = "gives 1 for every input, as a softmax over one class does"
    else:
        what = (
            f"gives {shown} for {len(scores)} known inputs, all between 0 and 1 as a sigmoid's are, and no "
            f"switch shows otherwise"
        )
    start = how_to_start(profile)
    name = f" ({profile.name})" if profile.name else ""
    return RewardServerError(
        server,
        f"{what}{name}; rewards have to be raw: {start}. If you know that they are, pass check_raw=False "
        f"(--no-check-raw)",
    )
