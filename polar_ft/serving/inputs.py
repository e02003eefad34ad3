"""From the body of a request to candidates: texts for the template, spelled texts, or token ids."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from polar_ft.errors import PolarError
from polar_ft.groups import FieldLengths, TextGroup, windows
from polar_ft.serving.batching import Candidate
from polar_ft.serving.limits import BYTES_PER_TOKEN, TEXT_BYTES_PER_TOKEN
from polar_ft.template import PolarTemplate

# Characters of texts that are tokenized together; an encoding takes a hundred times their memory.
ENCODED_AT_ONCE = 200_000


class InputError(PolarError):
    """A request that cannot be scored; the message is for the client."""


class TooLargeError(PolarError):
    """A request with longer texts, or more of them, than the server reads."""


class InputReader:
    """Makes candidates from what clients send.

    Texts are bounded by their bytes before they are tokenized, which takes about a second and 200 MB for each
    megabyte.

    Args:
        template: The model's template.
        vocab_size: Size of the model's embeddings; ids are smaller.
        max_tokens: Most tokens of all sequences of a request.

    Attributes:
        max_text: Most bytes of a text.
    """

    def __init__(self, template: PolarTemplate, vocab_size: int, max_tokens: int = 2**20) -> None:
        self.template = template
        self.vocab_size = vocab_size
        self.max_tokens = max_tokens
        self.max_text = TEXT_BYTES_PER_TOKEN * template.max_length
        # Encodes the two sides of a spelled text as they are: as reference and candidate of an empty prompt,
        # with the wrapper that adds nothing. A text that it would have to cut is refused.
        self._sides = template.with_limits(3 * template.max_length, template.max_length)

    def from_groups(self, groups: Sequence[TextGroup]) -> tuple[list[list[Candidate]], list[FieldLengths]]:
        """Encodes groups of texts: the candidates of each (prompt, reference), and what was cut off.

        Raises:
            EncodeError: A reference leaves no room for the prompt.
            TooLargeError: A text is too long, or they have too many tokens together.
        """
        total = 0
        for group in groups:
            named = [("prompt", group.prompt), ("reference", group.reference)]
            named += [(f"candidates[{i}]", text) for i, text in enumerate(group.candidates)]
            prompt, reference, *candidates = (self._bytes(text, name) for name, text in named)
            total += len(candidates) * (2 * prompt + reference) + sum(candidates)
            self._check_total(total)  # at once, as many groups may have the same long prompt
        encoded = [
            group for window in windows(groups, ENCODED_AT_ONCE) for group in self.template.encode(window)
        ]
        tokens = sum(
            len(group.branches) * len(group.prefix) + sum(map(len, group.branches)) for group in encoded
        )
        self._check_tokens(tokens)
        return [list(map(self._candidate, group.sequences)) for group in encoded], [g.cut for g in encoded]

    def from_texts(self, texts: Sequence[str]) -> list[Candidate]:
        """Encodes texts with spelled control tokens, as the published client sends them; see `split`.

        Raises:
            InputError: A text has another form, or is longer than the model's limit.
            TooLargeError: A text is too long, or they have too many tokens together.
        """
        self._check_total(sum(self._bytes(text, f"text {index}") for index, text in enumerate(texts)))
        sides = [self.split(text, index) for index, text in enumerate(texts)]
        groups = [TextGroup("", (left,), (right,), "pretrain") for left, right in sides]
        encoded = (
            group for window in windows(groups, ENCODED_AT_ONCE) for group in self._sides.encode(window)
        )
        candidates = []
        for index, group in enumerate(encoded):
            [ids] = group.sequences
            self._check_length(len(ids) + group.cut.reference + sum(group.cut.candidates), f"text {index}")
            candidates.append(self._candidate(ids))
        self._check_tokens(sum(len(candidate.ids) for candidate in candidates))
        return candidates

    def from_ids(self, sequences: Sequence[Sequence[int]]) -> list[Candidate]:
        """Checks token ids that a client has encoded.

        Raises:
            InputError: A sequence is empty or too long, has ids outside of the vocabulary, or does not end
                with the reward token.
            TooLargeError: They have too many tokens together.
        """
        self._check_tokens(sum(map(len, sequences)))
        return [self._from_ids(ids, f"input {index}") for index, ids in enumerate(sequences)]

    def from_items(self, query: str | Sequence[int], items: Sequence[Any]) -> list[Candidate]:
        """Makes candidates of items after a query that they share: spelled texts, or ids.

        The size of all sequences is checked before they are made, since the query is in each of them.

        Raises:
            PolarError: As in `from_texts` and `from_ids`.
        """
        if isinstance(query, str):
            sizes = [self._bytes(text, f"items[{index}]") for index, text in enumerate(items)]
            self._check_total(len(items) * self._bytes(query, "query") + sum(sizes))
            return self.from_texts([query + item for item in items])
        self._check_tokens(len(items) * len(query) + sum(map(len, items)))
        return self.from_ids([[*query, *item] for item in items])

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

    def _bytes(self, text: str, name: str) -> int:
        """Bytes of a text, which are checked."""
        size = len(text) if text.isascii() else len(text.encode())
        if size > self.max_text:
            raise TooLargeError(
                f"{name} has {size} bytes, more than the {self.max_text} that are read: the model reads "
                f"at most {self.template.max_length} tokens of it"
            )
        return size

    def _check_total(self, size: int) -> None:
        most = BYTES_PER_TOKEN * self.max_tokens
        if size > most:
            raise TooLargeError(
                f"the texts of all sequences have {size} bytes, more than {most}: send fewer inputs at once"
            )

    def _check_tokens(self, tokens: int) -> None:
        if tokens > self.max_tokens:
            raise TooLargeError(
                f"the sequences have {tokens} tokens, more than the {self.max_tokens} of one request: send "
                f"fewer inputs at once"
            )

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
