"""What a policy wrote, out of the decoded text that a framework hands over."""

from __future__ import annotations

from collections.abc import Sequence

from polar_ft.data.records import RowError

# What decoded responses of common chat models end with.
END_TOKENS = (
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|end_of_text|>",
    "<|end|>",
    "<end_of_turn>",
    "<｜end▁of▁sentence｜>",
    "</s>",
)

# Characters by which the end of a prompt is found, and how many such places are tried.
_TAIL = 32
_MOST_TAILS = 64


def response_of(query: str, prompt: str, end_tokens: Sequence[str] = END_TOKENS) -> str:
    r"""What a policy wrote, from a decoded text: without the prompt before it and the end tokens after it.

    Args:
        query: Prompt and response, decoded with their control tokens, as OpenRLHF hands them over. A prompt
            that was too long may lack its beginning.
        prompt: The prompt in its chat template.
        end_tokens: Control tokens that a decoded response ends with.

    Raises:
        RowError: The query does not begin with the prompt, or its end.

    >>> prompt = "<|user|>What is 2 + 2? Answer in words.<|assistant|>"
    >>> [response_of(f"{begin}Four.<|im_end|>\n<|endoftext|>", prompt) for begin in (prompt, prompt[9:])]
    ['Four.', 'Four.']
    """
    if query.startswith(prompt):
        return without_end(query[len(prompt) :], end_tokens)
    tail, place = prompt[-_TAIL:], -1
    for _ in range(_MOST_TAILS):
        place = query.find(tail, place + 1)
        if place < 0:
            break
        rest_of_prompt = query[: place + len(tail)]
        if prompt.endswith(rest_of_prompt):
            return without_end(query[len(rest_of_prompt) :], end_tokens)
    raise RowError("query", "does not begin with its prompt — does the prompt column hold another text?")


def without_end(response: str, end_tokens: Sequence[str] = END_TOKENS) -> str:
    r"""Removes control tokens and white space from the end of a decoded response.

    >>> without_end("Four.<|im_end|>\n<|endoftext|><|endoftext|>")
    'Four.'
    """
    end = len(response)
    while True:
        before = end
        while end and response[end - 1].isspace():
            end -= 1
        end -= next((len(token) for token in end_tokens if response.endswith(token, 0, end)), 0)
        if end == before:
            return response[:end]
