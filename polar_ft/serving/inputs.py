"""From the body of a request to candidates: texts for the template, spelled texts, or token ids."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from polar_ft.errors import PolarError
from polar_ft.groups import FieldLengths, TextGroup
from polar_ft.serving.batching import Candidate
from polar_ft.template import PolarTemplate


class InputError(PolarError):
    """A request that cannot be scored; the message is for the client."""


class InputReader:
    """Makes candidates from what clients send.

    Args:
        template: The model's template.
        vocab_size: Size of the model's embeddings; ids are smaller.
    """

    def __init__(self, template: PolarTemplate, vocab_size: int) -> None:
        self.template = template
        self.vocab_size = vocab_size
        # Encodes the two sides of a spelled text as they are: as reference and candidate of an empty prompt,
        # with the wrapper that adds nothing. A text that it would have to cut is refused.
        self._sides = template.with_limits(3 * template.max_length, template.max_length)

    def from_groups(self, groups: Sequence[TextGroup]) -> tuple[list[list[Candidate]], list[FieldLengths]]:
        """Encodes groups of texts: the candidates of each (prompt, reference), and what was cut off.

        Raises:
            EncodeError: A reference leaves no room for the prompt.
        """
        encoded = self.template.encode(groups)
        return [list(map(self._candidate, group.sequences)) for group in encoded], [g.cut for g in encoded]

    def from_texts(self, texts: Sequence[str]) -> list[Candidate]:
        """Encodes texts with spelled control tokens, as the published client sends them; see `split`.

        Raises:
            InputError: A text has another form, or is longer than the model's limit.
        """
        sides = [self.split(text, index) for index, text in enumerate(texts)]
        encoded = self._sides.encode([TextGroup("", (left,), (right,), "pretrain") for left, right in sides])
        candidates = []
        for index, group in enumerate(encoded):
            [ids] = group.sequences
            self._check_length(len(ids) + group.cut.reference + sum(group.cut.candidates), f"text {index}")
            candidates.append(self._candidate(ids))
        return candidates

    def from_ids(self, sequences: Sequence[Sequence[int]]) -> list[Candidate]:
        """Checks token ids that a client has encoded.

        Raises:
            InputError: A sequence is empty or too long, has ids outside of the vocabulary, or does not end
                with the reward token.
        """
        return [self._from_ids(ids, f"input {index}") for index, ids in enumerate(sequences)]

    def split(self, text: str, index: int = 0) -> tuple[str, str]:
        """Splits a spelled text at its separator.

        Control tokens are read only in the two places where the published client puts them: the reward token
        at the very end, and the first separator. Anything else that spells one is text. So a candidate, which
        comes from a policy, cannot move the separator. Where the prompt or the reference spells one, the
        first separator is not the real one; then the two sides do not begin with the same prompt, and the
        text is refused.

        Raises:
            InputError: The reward token or the separator is missing, or it is ambiguous which separator is
                meant.
        """
        separator, reward = self.template.separator, self.template.reward_token
        if not text.endswith(reward):
            raise InputError(
                f"text {index} does not end with {reward!r}, whose reward is asked for: send what "
                f"RewardModelClient.encode gives, or texts to /v1/rewards"
            )
        left, found, right = text[: -len(reward)].partition(separator)
        if not found:
            raise InputError(
                f"text {index} has no {separator!r} between reference and candidate: send what "
                f"RewardModelClient.encode gives, or texts to /v1/rewards"
            )
        if separator in right and not _begin_with_the_same_line(left, right):
            raise InputError(
                f"text {index} spells {separator!r} more than once, and which one is meant is ambiguous: "
                f"send token ids, or texts to /v1/rewards"
            )
        return left, right

    def _from_ids(self, ids: Sequence[int], name: str) -> Candidate:
        self._check_length(len(ids), name)
        if not ids:
            raise InputError(f"{name} has no token ids")
        if min(ids) < 0 or max(ids) >= self.vocab_size:
            wrong = next(i for i in ids if not 0 <= i < self.vocab_size)
            raise InputError(f"{name} holds the id {wrong}; the vocabulary has 0 to {self.vocab_size - 1}")
        if ids[-1] != self.template.reward_token_id:
            raise InputError(
                f"{name} ends with id {ids[-1]}, not with {self.template.reward_token_id} "
                f"({self.template.reward_token!r}), whose reward is asked for"
            )
        return self._candidate(np.array(ids, dtype=np.int32))

    def _candidate(self, ids: np.ndarray) -> Candidate:
        return Candidate(ids, self.template.head_length(ids))

    def _check_length(self, tokens: int, name: str) -> None:
        if tokens > self.template.max_length:
            raise InputError(
                f"{name} has {tokens} tokens, more than the model's limit of {self.template.max_length}: cut "
                f"it with RewardModelClient or send texts to /v1/rewards, which cut as training does"
            )


def _begin_with_the_same_line(left: str, right: str) -> bool:
    """Whether both sides begin with a prompt and the ⏎ after it.

    >>> _begin_with_the_same_line("2 + 2?\\n4", "2 + 2?\\nfour <|reward|>")
    True
    >>> _begin_with_the_same_line("Is ", " a token?\\nYes<|reward|>Is <|reward|> a token?\\nNo")
    False
    """
    line, end, _ = left.partition("\n")
    return bool(end) and right.startswith(f"{line}\n")
