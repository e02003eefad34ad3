"""Messages as others write them: as text under the keys ``role`` and ``content``.

What is read:

- content in parts, as the chat completions and responses interfaces of OpenAI take it: the texts are joined
  with a line break (as vLLM does for models that take text); an image, a sound or a file is refused by name.
- calls of tools, with or without a text (``"content": null``): a line of JSON for each, after the text.
- ShareGPT's keys ``from`` and ``value``, and the names of roles that go with them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

_TEXTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
# LLaMA-Factory's tags and ms-swift's roles (data/README.md and Custom-dataset.md of the two, 2026-11-24).
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "tool",
    "observations": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
_KNOWN = ("system", "user", "assistant", "tool")


def plain_message(message: Any) -> Any:
    """Makes a message of ``role`` and ``content`` that is text; what is no such message stays as it is.

    Raises:
        ValueError: The content holds something else than text.

    >>> parts = [{"type": "text", "text": "Which?"}, {"type": "text", "text": "A or B?"}]
    >>> plain_message({"role": "user", "content": parts})
    {'role': 'user', 'content': 'Which?\\nA or B?'}
    >>> call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 2}'}}
    >>> plain_message({"role": "assistant", "content": None, "tool_calls": [call]})["content"]
    '{"name": "add", "arguments": {"a": 2, "b": 2}}'
    >>> plain_message({"from": "gpt", "value": "Four."})
    {'role': 'assistant', 'content': 'Four.'}
    """
    if not isinstance(message, Mapping):
        return message
    if (
        message.get("role") in _KNOWN
        and type(message.get("content")) is str
        and not message.get("tool_calls")
    ):
        return message  # nearly all are of this kind
    if "from" in message and "value" in message and "role" not in message:
        rest = {key: value for key, value in message.items() if key not in ("from", "value")}
        message = {"role": message["from"], "content": message["value"], **rest}
    content, calls, role = message.get("content"), message.get("tool_calls"), message.get("role")
    known = _ROLES.get(role, role) if isinstance(role, str) else role
    if known is not role:
        message = {**message, "role": known}
    if isinstance(content, str) and not calls:
        return message
    texts = []
    if isinstance(content, list):
        if not all(isinstance(part, Mapping) and isinstance(part.get("type"), str) for part in content):
            return message
        texts = [_part(part) for part in content]
    elif content:
        if not isinstance(content, str):
            return message
        texts = [content]
    if isinstance(calls, list):
        texts += [_call(call) for call in calls]
    if not texts and not isinstance(content, str):
        return message
    rest = {key: value for key, value in message.items() if key not in ("role", "content", "tool_calls")}
    return {"role": known, "content": "\n".join(texts), **rest}


def _part(part: Mapping[str, Any]) -> str:
    kind = part["type"]
    text = part.get(_TEXTS[kind]) if kind in _TEXTS else None
    if text is None and kind == "text":
        text = part.get("value")  # LLaMA-Factory's v1
    if isinstance(text, str):
        return text
    if kind == "tool_use":
        return _as_json(part.get("name"), part.get("input"))
    if kind == "tool_result":
        result = plain_message({"role": "tool", "content": part.get("content")})["content"]
        if isinstance(result, str):
            return result
    raise ValueError(
        f"has a part of the type {kind!r} in its content, but only text can be read — leave the row out"
    )


def _call(call: Any) -> str:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError('has a call in tool_calls without "name" — correct it or leave the row out')
    return _as_json(function["name"], function.get("arguments"))


def _as_json(name: Any, arguments: Any) -> str:
    if isinstance(arguments, str):  # OpenAI writes them as JSON in a string
        with suppress(ValueError):  # a text that is no JSON is kept as it is
            arguments = json.loads(arguments)
    return json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
