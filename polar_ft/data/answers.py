"""What of a policy's output reaches the reward model: the answer, without the thoughts before it.

POLAR compares an answer with a reference answer, so a chain of thought in front of it must not be scored. A
policy in training leaves tags open, repeats them and nests them; the rules here are few, so that a policy
cannot earn a reward for an answer that never came.
"""

from __future__ import annotations

from dataclasses import dataclass

from polar_ft.errors import PolarError


@dataclass(frozen=True, slots=True)
class Thinking:
    """How a policy marks its thoughts.

    Everything up to the last closing tag is thought, however many tags there are, however they are nested
    and wherever they stand, in a code block as well. An opening tag after that begins a thought that was
    never ended: no answer came. Without any tag the whole output is the answer, except where the prompt has
    already opened the tag.

    Channels are tags too, if the decoded output keeps them: gpt-oss writes ``<|channel|>analysis<|message|>``
    before its thoughts and ``<|channel|>final<|message|>`` before its answer.

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
        >>> thinking.answer("<think>Hm.</think>Write `</think>` at the end.")
        '` at the end.'
        >>> thinking.answer("<think>Hm.</think>Write `<think>` first.")
        >>> Thinking(opened_by_prompt=True).answer("It is 4, since")
        """
        _, closed, answer = output.rpartition(self.end)
        if self.start in answer or (self.opened_by_prompt and not closed):
            return None
        return answer.strip() or None

    def reference(self, text: str) -> str:
        """A reference without thoughts: answers are compared without theirs; one without tags as it is.

        Raises:
            PolarError: There are thoughts and no answer.

        >>> [Thinking(opened_by_prompt=True).reference(text) for text in ("<think>4.</think>Four.", "4 ")]
        ['Four.', '4 ']
        """
        if self.start not in text and self.end not in text:
            return text
        answer = Thinking(self.start, self.end).answer(text)
        if answer is None:
            raise PolarError(
                f"a reference has {self.start} and no answer after {self.end}: give the answer alone"
            )
        return answer
