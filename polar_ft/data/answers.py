"""What of a policy's output reaches the reward model: the answer, without the thoughts before it.

POLAR compares an answer with a reference answer, so a chain of thought in front of it must not be scored. A
policy in training leaves tags open, repeats them and nests them; the rules here are few, so that a policy
cannot earn a reward for an answer that never came.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True, slots=True)
class Thinking:
    """How a policy marks its thoughts.

    Everything up to the last closing tag is thought, however many tags there are and however they are
    nested. An opening tag after that begins a thought that was never ended: no answer came. Without any tag
    the whole output is the answer, except where the prompt has already opened the tag.

    Attributes:
        start: The opening tag.
        end: The closing tag.
        opened_by_prompt: The prompt template ends with the opening tag, as Qwen3's with thinking and
            DeepSeek-R1's do: an output without a closing tag is a thought that was never ended.
    """

    start: str = "<think>"
    end: str = "</think>"
    opened_by_prompt: bool = False

    def answer(self, output: str) -> str | None:
        """The answer of an output, without white space around it; None if no answer came.

        >>> thinking = Thinking()
        >>> thinking.answer("<think>2 + 2 is 4.</think> Four."), thinking.answer("Four.")
        ('Four.', 'Four.')
        >>> thinking.answer("<think>a<think>b</think>c</think>Four."), thinking.answer("2 + 2</think>Four.")
        ('Four.', 'Four.')
        >>> [thinking.answer(output) for output in ("<think>It is", "<think>4</think>Four. <think>Or", " ")]
        [None, None, None]
        >>> Thinking(opened_by_prompt=True).answer("It is 4, since")
        """
        _, closed, answer = output.rpartition(self.end)
        if self.start in answer or (self.opened_by_prompt and not closed):
            return None
        return answer.strip() or None


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
