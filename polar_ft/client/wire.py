"""The wire formats of the engines: from token ids to a request, from an answer to rewards.

SGLang    ``POST /classify {"input_ids": [[…], …]}``
          ``[{"embedding": [s]}, …]``, with the number of tokens read in ``meta_info.prompt_tokens``
vLLM      ``POST /pooling {"input": [[…], …], "use_activation": false}``
          ``{"data": [{"index": 0, "data": [[s], [s], …]}, …], "usage": {"prompt_tokens": n}}``: one ``[s]``
          per token, the reward last
LMDeploy  ``POST /pooling {"input": [[…], …]}``
          ``{"data": [{"index": 0, "data": s}, …], "usage": {"prompt_tokens": n}}``

As of SGLang 0.5.23, vLLM 0.32 and LMDeploy 0.18. An answer is accepted only with as many rewards as inputs,
each a finite number, and, where the engine gives the number of tokens it read, with as many as were sent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from polar_ft.client.errors import WireError
from polar_ft.data.records import describe

Wire = Literal["sglang", "vllm", "lmdeploy"]
WIRES: tuple[Wire, ...] = ("sglang", "vllm", "lmdeploy")

ROUTES: dict[Wire, str] = {"sglang": "/classify", "vllm": "/pooling", "lmdeploy": "/pooling"}


def request_body(wire: Wire, inputs: Sequence[np.ndarray], extra: Mapping[str, Any]) -> dict[str, Any]:
    """Makes the body of a request.

    Args:
        wire: The wire format.
        inputs: Token ids, `[inputs][tokens]`.
        extra: More fields, such as vLLM's ``use_activation``.

    >>> request_body("vllm", [np.array([1, 2, 3])], {"use_activation": False})
    {'input': [[1, 2, 3]], 'use_activation': False}
    """
    return {"input_ids" if wire == "sglang" else "input": [ids.tolist() for ids in inputs], **extra}


def read_rewards(wire: Wire, answer: Any, lengths: Sequence[int]) -> list[float]:
    """Reads the rewards of an answer, in the order of the request.

    Args:
        wire: The wire format.
        answer: The JSON of the answer.
        lengths: Tokens of each input of the request, `[inputs]`.

    Raises:
        WireError: The answer does not have a reward for each input.

    >>> read_rewards("sglang", [{"embedding": [-0.5], "meta_info": {"prompt_tokens": 3}}], [3])
    [-0.5]
    >>> read_rewards("vllm", {"data": [{"index": 0, "data": [[0.1], [0.2], [-7.5]]}]}, [3])
    [-7.5]
    >>> read_rewards("lmdeploy", {"data": [{"data": -1.25}, {"data": 2}]}, [3, 4])
    [-1.25, 2.0]
    >>> read_rewards("lmdeploy", {"data": [{"data": -1.25}]}, [3, 4])
    Traceback (most recent call last):
    ...
    polar_ft.client.errors.WireError: 1 answer came for 2 inputs
    """
    if wire == "sglang":
        # A single input gets an object that is not in a list.
        items = [answer] if isinstance(answer, Mapping) and "embedding" in answer else answer
        return _read_items(items, lengths, "embedding", _of_embedding)
    data = answer.get("data") if isinstance(answer, Mapping) else None
    if not isinstance(data, list):
        raise WireError(f'it answered {_short(answer)} where an object with "data" belongs')
    rewards = _read_items(_by_index(data), lengths, "data", _of_tokens if wire == "vllm" else _number)
    usage = answer.get("usage")
    _check_tokens(usage.get("prompt_tokens") if isinstance(usage, Mapping) else None, sum(lengths))
    return rewards


def _read_items(items: Any, lengths: Sequence[int], key: str, read: Any) -> list[float]:
    if not isinstance(items, list):
        raise WireError(f"it answered {_short(items)} where a list of rewards belongs")
    if len(items) != len(lengths):
        came = f"{len(items)} answer{' came' if len(items) == 1 else 's came'}"
        raise WireError(f"{came} for {len(lengths)} input{'' if len(lengths) == 1 else 's'}")
    rewards = []
    for number, (item, length) in enumerate(zip(items, lengths, strict=True)):
        if not isinstance(item, Mapping) or key not in item:
            raise WireError(f'answer {number} is {_short(item)} where an object with "{key}" belongs')
        try:
            rewards.append(read(item[key]))
        except WireError as error:
            raise WireError(f"answer {number}: {error}") from None
        meta = item.get("meta_info")
        _check_tokens(meta.get("prompt_tokens") if isinstance(meta, Mapping) else None, length)
    return rewards


def _by_index(data: list[Any]) -> list[Any]:
    """The items ordered by the index that vLLM and LMDeploy give for each."""
    indices: list[Any] = [item.get("index") if isinstance(item, Mapping) else None for item in data]
    if all(index is None for index in indices):
        return data
    placed = {index: item for index, item in zip(indices, data, strict=True) if type(index) is int}
    if placed.keys() != set(range(len(data))):
        raise WireError(
            f"its answers have the indices {_short(indices)}, not 0 to {len(data) - 1}, each once"
        )
    return [placed[index] for index in range(len(data))]


def _of_embedding(value: Any) -> float:
    if not isinstance(value, list) or len(value) != 1:
        raise WireError(
            f'"embedding" is {_short(value)} where one number in a list belongs — is a reward model served?'
        )
    return _number(value[0])


def _of_tokens(value: Any) -> float:
    """The score of the last token; a pooler of only the last token gives ``[s]`` instead of ``[[s], …]``."""
    if not isinstance(value, list) or not value:
        raise WireError(f'"data" is {_short(value)} where a list with a score per token belongs')
    last = value[-1]
    if isinstance(last, list) and len(last) == 1:
        return _number(last[0])
    if len(value) == 1 and not isinstance(last, list):
        return _number(last)
    raise WireError(
        f'"data" ends in {_short(last)} where a list with one score belongs — is a reward model served?'
    )


def _number(value: Any) -> float:
    # To Python true is a number, and its JSON reader accepts NaN.
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise WireError(f"the reward is {_short(value)} where a number belongs")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise WireError(f"the reward is {value!r:.24}: the weights may hold NaN, or the dtype be too narrow")
    return number


def _check_tokens(read: Any, sent: int) -> None:
    if type(read) is int and read not in (0, sent):
        raise WireError(
            f"it says that it read {read} tokens where {sent} were sent, so it has cut or added some; start "
            f"it without truncation"
        )


def _short(value: Any) -> str:
    """A short description of a value; a server may have echoed a long request."""
    if isinstance(value, list) and len(value) <= 8 and not any(isinstance(e, (list, dict)) for e in value):
        return f"{value!r:.80}"
    return describe(value)
