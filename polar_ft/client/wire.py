"""The wire formats of the engines: from token ids to a request, from an answer to rewards.

SGLang    ``POST /classify {"input_ids": [[…], …]}``
          ``[{"embedding": [s]}, …]``, with the number of tokens read in ``meta_info.prompt_tokens``
vLLM      ``POST /pooling {"input": [[…], …], "use_activation": false}``
          ``{"data": [{"index": 0, "data": [[s], [s], …]}, …], "usage": {"prompt_tokens": n}}``: one ``[s]``
          per token, the reward last; of a …ForSequenceClassification ``[s]`` alone
LMDeploy  ``POST /pooling {"input": [[…], …]}``
          ``{"data": [{"index": 0, "data": s}, …], "usage": {"prompt_tokens": n}}``
SGLang with multi-item scoring ("sglang-mis"), for inputs that share a prefix, which is computed once
          ``POST /v1/score {"query": […], "items": [[…], …]}``: the prefix, and what follows it in each input
          ``{"scores": [[s], …], "usage": {"prompt_tokens": n}}``

As of SGLang 0.5.23, vLLM 0.32 and LMDeploy 0.18. An answer is accepted only with as many rewards as inputs,
each a finite number, and, where the engine gives the number of tokens it read, with as many as were sent.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from polar_ft.client.errors import WireError
from polar_ft.data.records import describe
from polar_ft.groups import common_prefix_length

Wire = Literal["sglang", "vllm", "lmdeploy", "sglang-mis"]
WIRES: tuple[Wire, ...] = ("sglang", "vllm", "lmdeploy", "sglang-mis")

ROUTES: dict[Wire, str] = {
    "sglang": "/classify",
    "vllm": "/pooling",
    "lmdeploy": "/pooling",
    "sglang-mis": "/v1/score",
}


def request_body(wire: Wire, inputs: Sequence[np.ndarray], extra: Mapping[str, Any]) -> dict[str, Any]:
    """Makes the body of a request.

    Args:
        wire: The wire format.
        inputs: Token ids, `[inputs][tokens]`.
        extra: More fields, such as vLLM's ``use_activation``.

    >>> request_body("vllm", [np.array([1, 2, 3])], {"use_activation": False})
    {'input': [[1, 2, 3]], 'use_activation': False}
    >>> request_body("sglang-mis", [np.array([1, 7, 8, 9]), np.array([1, 7, 9])], {})
    {'query': [1, 7], 'items': [[8, 9], [9]]}
    """
    if wire == "sglang-mis":
        shared = common_prefix_length(inputs)
        return {
            "query": inputs[0][:shared].tolist(),
            "items": [ids[shared:].tolist() for ids in inputs],
            **extra,
        }
    return {"input_ids" if wire == "sglang" else "input": [ids.tolist() for ids in inputs], **extra}


def requests_of(
    wire: Wire, inputs: Sequence[np.ndarray], separator_id: int, max_tokens: int | None
) -> list[list[int]]:
    """Divides inputs into those that one request of a wire format can hold: indices of inputs.

    All formats but multi-item scoring take any inputs. There a request is one sequence for the engine, the
    shared prefix and after a delimiter each item, so it holds candidates of one group: inputs that are the
    same up to the separator.

    Args:
        wire: The wire format.
        inputs: Token ids, `[inputs][tokens]`.
        separator_id: Id of the separator.
        max_tokens: Longest sequence that the engine takes; None where it is not known.

    >>> inputs = [np.array(ids) for ids in ([1, 5, 0, 5, 9], [1, 6, 0, 6, 9], [1, 5, 0, 5, 7, 9])]
    >>> requests_of("sglang-mis", inputs, separator_id=0, max_tokens=None)
    [[0, 2], [1]]
    """
    if wire != "sglang-mis":
        return [list(range(len(inputs)))]
    groups: dict[bytes, list[int]] = {}
    for index, ids in enumerate(inputs):
        (separators,) = np.nonzero(ids == separator_id)
        # Without a separator the whole input: it is sent alone, or with its equals.
        head = ids[: separators[0] + 1] if len(separators) else ids
        groups.setdefault(head.tobytes(), []).append(index)
    requests: list[list[int]] = []
    limit = max_tokens or sys.maxsize
    for head_bytes, group in groups.items():
        head_length = len(head_bytes) // inputs[group[0]].itemsize
        tokens = limit  # the first opens a request
        for index in group:
            added = len(inputs[index]) - head_length + 1
            if tokens + added > limit:
                requests.append([])
                tokens = head_length + 1
            requests[-1].append(index)
            tokens += added
    return requests


def fused_length(inputs: Sequence[np.ndarray]) -> int:
    """Tokens of a multi-item request: the prefix once, what follows it, and a delimiter around each item.

    >>> fused_length([np.array([1, 7, 8, 9]), np.array([1, 7, 9])])
    8
    """
    shared = common_prefix_length(inputs)
    return shared + sum(len(ids) - shared for ids in inputs) + len(inputs) + 1


def read_rewards(wire: Wire, answer: Any, lengths: Sequence[int], fused: int = 0) -> list[float]:
    """Reads the rewards of an answer, in the order of the request.

    Args:
        wire: The wire format.
        answer: The JSON of the answer.
        lengths: Tokens of each input of the request, `[inputs]`.
        fused: `fused_length` of a multi-item request.

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
        return _read_items(items, lengths, "embedding", _of_list)
    key = "scores" if wire == "sglang-mis" else "data"
    data = answer.get(key) if isinstance(answer, Mapping) else None
    if not isinstance(data, list):
        raise WireError(f'it answered {_short(answer)} where an object with "{key}" belongs')
    if wire == "sglang-mis":
        rewards = _read_items([{key: row} for row in data], lengths, key, _of_list)
    else:
        rewards = _read_items(_by_index(data), lengths, key, _of_tokens if wire == "vllm" else _number)
    usage = answer.get("usage")
    read = usage.get("prompt_tokens") if isinstance(usage, Mapping) else None
    if read != fused:  # a server without multi-item scoring reads the inputs one by one
        _check_tokens(read, sum(lengths))
    return rewards


def read_answer(wire: Wire, answer: Any, inputs: Sequence[np.ndarray]) -> list[float]:
    """`read_rewards` of a request with these inputs."""
    fused = fused_length(inputs) if wire == "sglang-mis" else 0
    return read_rewards(wire, answer, [len(ids) for ids in inputs], fused)


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


def _of_list(value: Any) -> float:
    if not isinstance(value, list) or len(value) != 1:
        raise WireError(
            f"the score is {_short(value)} where one number in a list belongs — is a reward model served?"
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
