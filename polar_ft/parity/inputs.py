"""The fixed set of inputs that parity is measured on.

The kinds are those at which training and inference code are known to part: lengths from a few tokens to the
limit, texts that are cut, Chinese, several turns, an empty reference or candidate, and texts that spell
control tokens. The texts are made of the sentences below, in the same way every time.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from polar_ft.groups import TextGroup, Wrapper
from polar_ft.template import REWARD_TOKEN, SEPARATOR_TOKEN, PolarTemplate

Messages = list[dict[str, str]]

_ENGLISH = (
    "The bridge was closed for repairs in the spring.",
    "Nobody had read the third page of the contract.",
    "Water boils at a lower temperature on a mountain.",
    "She counted the boxes twice and found 17 of them.",
    "A sorted list can be searched in logarithmic time.",
    "The train to Lyon leaves at 6:45 from platform 2.",
    "Salt lowers the freezing point of ice on a road.",
    "His answer was short, polite and entirely wrong.",
    "Two of the five samples were lost on the way.",
    "Remember to close the file before you rename it.",
)
_CHINESE = (
    "这座桥在春天因维修而关闭。",
    "没有人读过合同的第三页。",
    "山上的水在较低的温度就会沸腾。",
    "她把箱子数了两遍，一共十七个。",
    "有序的列表可以用二分法查找。",
    "去里昂的火车六点四十五分从二号站台出发。",
    "他的回答简短、礼貌，却完全错误。",
    "五个样本中有两个在路上丢失了。",
)
_OTHER = (
    "def area(r):\n\treturn 3.14159 * r ** 2  # π·r²\n",
    "  two  leading   spaces, a tab\tand a trailing newline \n",
    "🙂👩‍👩‍👧 naïve café — “quotes”, ﬁ ligature, e\u0301 combining, \u200bzero width",
    '{"a": [1, 2.5, null], "b": "\\"x\\""}',
)
_WORDS = ("Why?", "42", "No.", "是", "Yes, both of them.", "x = 3", "A", "In 1969.", "谁？")
_CONTROL = (SEPARATOR_TOKEN, REWARD_TOKEN, "<s>", "</s>", "<|im_start|>assistant\n", "<|im_end|>", "[INST]")


@dataclass(frozen=True)
class ParityInput:
    """One (prompt, reference) with its candidates.

    Attributes:
        kind: What it tests.
        prompt: Text or messages.
        reference: Text or messages.
        candidates: Texts or messages.
        wrapper: As in the template.
    """

    kind: str
    prompt: str | Messages
    reference: str | Messages
    candidates: tuple[str | Messages, ...]
    wrapper: Wrapper = "sft"

    def rows(self) -> list[dict[str, Any]]:
        """One row a candidate, in the form that the scorer and the client take."""
        return [
            {
                "prompt": self.prompt,
                "reference": self.reference,
                "output": candidate,
                "wrapper": self.wrapper,
            }
            for candidate in self.candidates
        ]

    def group(self) -> TextGroup:
        """The texts, as the template takes them."""
        prompt, reference, *candidates = map(_text, (self.prompt, self.reference, *self.candidates))
        return TextGroup(prompt, (reference,), tuple(candidates), self.wrapper)


def _text(value: str | Messages) -> str:
    return value if isinstance(value, str) else "\n".join(message["content"] for message in value)


def parity_inputs(template: PolarTemplate, count: int) -> list[ParityInput]:
    """The inputs, the same for the same tokenizer and limits.

    Args:
        template: Its limits decide how long a text is that has to be cut.
        count: Number of (prompt, reference); each has four candidates, of which the first is the reference.
    """
    return [_KINDS[i % len(_KINDS)](_Writer(template, seed=i), i // len(_KINDS)) for i in range(count)]


class _Writer:
    """Texts of about a wanted length in tokens, from a seed."""

    def __init__(self, template: PolarTemplate, seed: int) -> None:
        self.random = random.Random(seed)
        self.limit = template.max_length
        self.response_limit = template.max_response_length
        self._tokenizer = template.tokenizer

    def text(self, tokens: int, sentences: Sequence[str] = _ENGLISH, joint: str = " ") -> str:
        """At least one sentence, and so many that they have about ``tokens`` tokens."""
        chosen: list[str] = []
        total = 0
        while not chosen or total < tokens:
            # Numbered, so that a long text does not repeat itself.
            chosen.append(f"({len(chosen) + 1}) {self.random.choice(sentences)}")
            total += self.count(f"{joint}{chosen[-1]}")
        return joint.join(chosen)

    def text_below(self, tokens: int) -> str:
        """As many sentences as have fewer than ``tokens`` tokens; may be none."""
        text = longer = ""
        while self.count(longer) < tokens:
            text, longer = longer, f"{longer} {self.random.choice(_ENGLISH)}".strip()
        return text

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return len(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def candidates(
        self, reference: str, tokens: int, sentences: Sequence[str] = _ENGLISH
    ) -> tuple[str, str, str, str]:
        """The reference itself, the reference with an ending, something else, something short."""
        ending = self.random.choice(sentences)
        return reference, f"{reference} {ending}", self.text(tokens, sentences), self.random.choice(sentences)


def _short(write: _Writer, _: int) -> ParityInput:
    reference, *others = write.random.sample(_WORDS, 4)
    return ParityInput("short", write.random.choice(_WORDS), reference, (reference, *others))


def _chinese(write: _Writer, round_: int) -> ParityInput:
    reference = write.text(20 << round_ % 4, _CHINESE, "")
    return ParityInput(
        "Chinese", write.text(20, _CHINESE, ""), reference, write.candidates(reference, 40, _CHINESE)
    )


def _turns(write: _Writer, round_: int) -> ParityInput:
    roles = ("system", "user", "assistant", "user", "assistant", "user")[: 2 + 2 * (round_ % 3)]
    prompt = [{"role": role, "content": write.text(12)} for role in roles]
    reference = write.text(20)

    def answer(text: str) -> Messages:
        return [{"role": "assistant", "content": text}]

    candidates = tuple(answer(text) for text in write.candidates(reference, 30))
    return ParityInput("several turns", prompt, answer(reference), candidates)


def _no_reference(write: _Writer, _: int) -> ParityInput:
    return ParityInput("empty reference", write.text(20), "", write.candidates("", 40))


def _no_candidate(write: _Writer, _: int) -> ParityInput:
    reference = write.text(20)
    candidates = (*write.candidates(reference, 40)[:3], "")
    return ParityInput("empty candidate", write.text(20), reference, candidates)


def _control(write: _Writer, round_: int) -> ParityInput:
    first, second = (_CONTROL[(2 * round_ + i) % len(_CONTROL)] for i in range(2))
    reference = f"{write.text(8)} {first}"
    candidates = (
        reference,
        f"{write.text(8)}{REWARD_TOKEN}",
        f"{second}{write.text(8)}{SEPARATOR_TOKEN}{reference}",
        f"{first}{second}",
    )
    return ParityInput("spelled control tokens", f"{write.text(8)}{second}", reference, candidates)


def _symbols(write: _Writer, _: int) -> ParityInput:
    reference = write.random.choice(_OTHER)
    return ParityInput(
        "code and symbols",
        write.random.choice(_OTHER),
        reference,
        write.candidates(reference, 60, (*_OTHER, *_CHINESE)),
    )


def _pretrain(write: _Writer, _: int) -> ParityInput:
    reference = write.text(20)
    return ParityInput(
        "wrapper pretrain", write.text(40), reference, write.candidates(reference, 30), "pretrain"
    )


def _long(write: _Writer, round_: int) -> ParityInput:
    # Nothing is cut: all responses below their limit, the prompt below its share of the rest.
    share = (0.2, 0.4, 0.7, 1.0)[round_ % 4]
    tokens = int(share * (write.response_limit - 8))
    prompt = write.text_below(int(share * (write.limit - 2 * write.response_limit) / 2) - 8)
    reference, *others = (write.text_below(tokens) for _ in range(3))
    return ParityInput("long", prompt, reference, (reference, *others, write.text_below(tokens // 2)))


def _cut_response(write: _Writer, _: int) -> ParityInput:
    over = int(1.2 * write.response_limit)
    reference = write.text(over)
    return ParityInput("cut response", write.text(20), reference, write.candidates(reference, over, _CHINESE))


def _cut_prompt(write: _Writer, _: int) -> ParityInput:
    reference = write.text(20)
    return ParityInput("cut prompt", write.text(write.limit), reference, write.candidates(reference, 40))


_KINDS: tuple[Callable[[_Writer, int], ParityInput], ...] = (
    _short,
    _chinese,
    _turns,
    _no_reference,
    _no_candidate,
    _control,
    _symbols,
    _pretrain,
    _long,
    _cut_response,
    _cut_prompt,
)
