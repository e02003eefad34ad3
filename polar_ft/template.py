"""The POLAR template: encodes a (prompt, reference) and its candidates as token ids; the only implementation.

Training, evaluation, the server and the client all call `PolarTemplate.encode`, so that a model is always
scored with the ids that it was trained on. A candidate becomes (arXiv 2507.05197, section 3; as in xtuner
0.2.0's ``tokenize_ref``)::

    BOS prompt ⏎ reference <|reward|> prompt ⏎ candidate [UNUSED_TOKEN_130]
        └────────── the same for every candidate ──┘

With ``wrapper="pretrain"`` both ⏎ are omitted; there is also no ⏎ before an empty reference or candidate.

Needs only ``tokenizers`` and ``numpy``, so that a verl or vLLM environment can import it without torch.
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer

from polar_ft.errors import PolarError
from polar_ft.files import read_json, resolve_folder
from polar_ft.groups import FieldLengths, TextGroup, TokenGroup, Wrapper, grow_prefix
from polar_ft.tokenizer import TextTokenizer, read_tokenizer_json

SEPARATOR_TOKEN = "<|reward|>"
REWARD_TOKEN = "[UNUSED_TOKEN_130]"

# Key of config.json under which an exported model stores the settings of its template.
SETTINGS_KEY = "polar_template"

# Tokens of a sequence besides its fields: two ⏎, the separator and the reward token.
TEMPLATE_TOKENS = 4


class EncodeError(PolarError):
    """A group that cannot be encoded.

    Attributes:
        index: Index of the group among those to encode.
    """

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(reason)
        self.index = index


@dataclass(frozen=True, slots=True)
class _Joined:
    """Ids of the joined fields of a group.

    Attributes:
        head: BOS, prompt, reference and separator.
        tails: For each candidate the ids after the separator, the reward token last.
        start: Number of tokens of the start of the prompt, which is at the beginning of head and tails.
    """

    head: np.ndarray
    tails: list[np.ndarray]
    start: int


@dataclass(frozen=True, slots=True)
class _Fitted:
    """A group after cutting, what was cut, and the lengths before."""

    group: TextGroup
    cut: FieldLengths
    lengths: FieldLengths


class PolarTemplate:
    """Encodes texts as the token ids of a POLAR reward model.

    Text never becomes a control token (`polar_ft.tokenizer`); control tokens are inserted by id.

    Truncation: a reference or candidate is cut on the right to ``max_response_length`` tokens, then the
    prompt on the left to ``(max_length - 4 - reference - max_response_length) // 2`` tokens. The budget of
    the prompt does not depend on the candidate, so that all candidates of a (prompt, reference) share one
    prefix, in training as in serving. Fields are cut as text, at the edge of a token, before they are joined.
    The length of a field includes a BOS, as in xtuner 0.2.0.

    Args:
        tokenizer_json: The text of a ``tokenizer.json``.
        separator: Token between reference and candidate.
        reward_token: Token at the end, whose hidden state is scored.
        reward_token_id: Expected id of ``reward_token``; None takes the tokenizer's.
        max_length: Upper limit of a sequence in tokens.
        max_response_length: Upper limit of the reference and of each candidate in tokens.
        add_missing_tokens: Add the two tokens if the tokenizer lacks them (Llama and Qwen bases).
        name: Name used in error messages.

    Raises:
        PolarError: A token is missing, has another id than expected, or the limits leave no room.
    """

    def __init__(
        self,
        tokenizer_json: str,
        *,
        separator: str = SEPARATOR_TOKEN,
        reward_token: str = REWARD_TOKEN,
        reward_token_id: int | None = None,
        max_length: int = 16384,
        max_response_length: int = 4096,
        add_missing_tokens: bool = False,
        name: str = "the tokenizer",
    ) -> None:
        if max_response_length < 1 or max_length <= TEMPLATE_TOKENS + max_response_length:
            raise PolarError(
                f"max_length={max_length} leaves no room next to max_response_length={max_response_length}: "
                f"raise max_length or lower max_response_length"
            )
        self.separator = separator
        self.reward_token = reward_token
        self.max_length = max_length
        self.max_response_length = max_response_length
        self.name = name

        self.tokenizer = Tokenizer.from_str(tokenizer_json)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        if add_missing_tokens:
            self.tokenizer.add_special_tokens(
                [AddedToken(token, special=True, normalized=False) for token in (separator, reward_token)]
            )
        self.separator_id = self._token_id(separator, "separator")
        self.reward_token_id = self._token_id(reward_token, "reward")
        if reward_token_id is not None and reward_token_id != self.reward_token_id:
            raise PolarError(
                f"{name}: the config says reward_token_id={reward_token_id}, but {reward_token!r} has id "
                f"{self.reward_token_id} and id {reward_token_id} is "
                f"{self.tokenizer.id_to_token(reward_token_id)!r}; set "
                f"reward_token_id={self.reward_token_id} or name the right token in reward_tokens"
            )
        self.bos_ids = self._find_bos()
        self._tokenizer_json = self.tokenizer.to_str()
        self._texts = TextTokenizer(self._tokenizer_json, separator, len(self.bos_ids))

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        allow_tokenizer_code: Iterable[str] = (),
        **settings: Any,
    ) -> PolarTemplate:
        """Reads the tokenizer of a model folder or a HuggingFace hub id.

        Args:
            pretrained_model_name_or_path: A folder with ``tokenizer.json``, or a hub id.
            allow_tokenizer_code: Tokenizer classes of the folder that may be run, by the name that its
                ``tokenizer_config.json`` gives them (``"tokenization_x.XTokenizerFast"``).
            **settings: Keyword arguments of `PolarTemplate`. What is missing or None is taken from the
                folder, where an exported model stores the settings of its training, else the default is used.

        Raises:
            PolarError: There is no such folder, or its tokenizer needs code that was not allowed.
        """
        folder = resolve_folder(pretrained_model_name_or_path)
        text = read_tokenizer_json(folder, allow_tokenizer_code)
        config = folder / "config.json"
        exported = read_json(config).get(SETTINGS_KEY, {}) if config.is_file() else {}
        settings = {**exported, **{k: v for k, v in settings.items() if v is not None}}
        return cls(text, name=f"the tokenizer of {os.fspath(pretrained_model_name_or_path)}", **settings)

    def with_limits(self, max_length: int, max_response_length: int) -> PolarTemplate:
        """The same template, with the same tokenizer, and other limits in tokens."""
        other = copy.copy(self)
        other.max_length, other.max_response_length = max_length, max_response_length
        return other

    @property
    def settings(self) -> dict[str, Any]:
        """The settings with which a model must be scored; stored in an exported folder's ``config.json``."""
        return {
            "separator": self.separator,
            "reward_token": self.reward_token,
            "max_length": self.max_length,
            "max_response_length": self.max_response_length,
        }

    def __len__(self) -> int:
        """Size of the vocabulary, added tokens included."""
        return self.tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def tokenizer_json(self) -> str:
        """The tokenizer as the text of a ``tokenizer.json``, tokens that were added included."""
        return self._tokenizer_json

    @property
    def fingerprint(self) -> str:
        """A hash of everything that determines the ids: tokenizer, control tokens and limits."""
        settings = (self.separator, self.reward_token, self.max_length, self.max_response_length)
        text = f"1|{settings}|{self._tokenizer_json}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def encode(self, groups: Sequence[TextGroup], *, measure: bool = False) -> list[TokenGroup]:
        """Encodes groups, on all cores; text that candidates and groups share is tokenized once.

        Args:
            groups: Groups of at least one candidate; of several references the first is read.
            measure: Also count the tokens of every field before cutting.

        Returns:
            For each group its token group: a branch for each candidate, the same pairs, and what was cut.

        Raises:
            EncodeError: A reference leaves no room for the prompt; ``index`` is that of the first such group.
        """
        encoded = []
        for result in self.encode_each(groups, measure=measure):
            if isinstance(result, EncodeError):
                raise result
            encoded.append(result)
        return encoded

    def encode_each(
        self, groups: Sequence[TextGroup], *, measure: bool = False
    ) -> list[TokenGroup | EncodeError]:
        """As `encode`, but returns the error of a group that cannot be encoded in its place."""
        # Few fields are too long, and for most the ids of the joined texts prove that they are not. So
        # everything is joined and tokenized first, and a second time only where something had to be cut.
        joined = self._join(groups)
        fitted = self._fit(groups, joined, measure)
        cut = {i: fit for i, fit in fitted.items() if isinstance(fit, _Fitted) and fit.cut}
        for i, again in zip(cut, self._join([fit.group for fit in cut.values()]), strict=True):
            joined[i] = again
        encoded: list[TokenGroup | EncodeError] = []
        for i, (group, row) in enumerate(zip(groups, joined, strict=True)):
            fit = fitted.get(i)
            if isinstance(fit, EncodeError):
                encoded.append(fit)
            else:
                encoded.append(self._token_group(i, group, row, fit, measure))
        return encoded

    def kept(self, group: TextGroup) -> TextGroup:
        """Cuts the texts to the limits: the prompt keeps its end, the other fields keep their beginnings.

        Raises:
            EncodeError: As `encode`.
        """
        fit = self._fit([group], self._join([group]), measure=True)[0]
        if isinstance(fit, EncodeError):
            raise fit
        return fit.group

    def spell(self, group: TextGroup, encoded: TokenGroup, candidate: int) -> str:
        """Spells a candidate's sequence as text, as the published client does; for people to read.

        Models must get the ids: tokenizing the text would make a control token of a text that spells one.

        Args:
            group: The texts.
            encoded: The same group as `encode` returned it.
            candidate: Index of the candidate.
        """
        left = _join(group.prompt, group.reference, group.wrapper)
        right = _join(group.prompt, group.candidates[candidate], group.wrapper)
        if encoded.cut:
            ids = encoded.sequences[candidate]
            head = self.head_length(ids)
            left = self.decode(ids[len(self.bos_ids) : head - 1].tolist())
            right = self.decode(ids[head:-1].tolist())
        return f"{left}{self.separator}{right}{self.reward_token}"

    def head_length(self, ids: np.ndarray) -> int:
        """Number of tokens up to and including the separator; 0 where there is no separator.

        Args:
            ids: Ids of a sequence, [tokens].
        """
        (separators,) = np.nonzero(ids[:-1] == self.separator_id)
        return int(separators[0]) + 1 if len(separators) else 0

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, with control tokens spelled out."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """The vocabulary's name of each id; for display."""
        return [self.tokenizer.id_to_token(i) or f"<id {i}>" for i in ids]

    def _token_id(self, token: str, key: str) -> int:
        token_id = self.tokenizer.token_to_id(token)
        if token_id is None:
            raise PolarError(
                f"{self.name} has no token {token!r}, so this is not a POLAR tokenizer; name tokens that it "
                f"has in reward_tokens=dict({key}=...), or add them with reward_tokens=dict(add=True)"
            )
        return token_id

    def _find_bos(self) -> list[int]:
        plain = self.tokenizer.encode("a", add_special_tokens=False).ids
        full = self.tokenizer.encode("a", add_special_tokens=True).ids
        start = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0)
        if start > 1:
            names = self.tokens(full[:start])
            raise PolarError(f"{self.name} puts {names} before a text; a POLAR input has at most one BOS")
        return full[:start]

    def _join(self, groups: Sequence[TextGroup]) -> list[_Joined]:
        """Joins and tokenizes the fields without regard to the limits."""
        # The separator is an added token, so the ids of its two sides do not depend on each other. Each side
        # is tokenized together with the separator, in two pieces if the prompt has a safe place to be split
        # at, and each distinct piece once, however many candidates and groups share it.
        pieces: dict[str, int] = {}

        def number(piece: str) -> int:
            return pieces.setdefault(piece, len(pieces))

        separator, splits = self._texts.separator, self._texts.splits
        before_start = "" if splits.same_anywhere else separator
        numbers = []
        for group in groups:
            prompt, wrapper = group.prompt, group.wrapper
            start, end = splits.last(prompt)
            if start:
                left = [number(start), number(f"{_join(end, group.reference, wrapper)}{separator}")]
                shared = number(f"{before_start}{start}")
                rights = [[shared, number(_join(end, text, wrapper))] for text in group.candidates]
            else:
                left = [number(f"{_join(prompt, group.reference, wrapper)}{separator}")]
                rights = [[number(f"{separator}{_join(prompt, text, wrapper)}")] for text in group.candidates]
            # The left side ends with the separator, so the separators of the right sides are skipped.
            numbers.append((left, rights, int(not start or bool(before_start))))
        ids_of = self._texts.encode(list(pieces))

        bos, reward = (np.array(ids, dtype=np.int32) for ids in (self.bos_ids, [self.reward_token_id]))
        return [
            _Joined(
                head=np.concatenate([bos, *(ids_of[n] for n in left)]),
                tails=[np.concatenate([*(ids_of[n] for n in right), reward])[skip:] for right in rights],
                start=min(len(ids_of[left[0]]), len(ids_of[rights[0][0]]) - skip) if len(left) > 1 else 0,
            )
            for left, rights, skip in numbers
        ]

    def _fit(
        self, groups: Sequence[TextGroup], joined: Sequence[_Joined], measure: bool
    ) -> dict[int, _Fitted | EncodeError]:
        """Measures and cuts the groups that may be too long, or all groups with ``measure``.

        Only those fields are tokenized alone whose length the joined ids leave open.

        Returns:
            Index of each of these groups to the result.
        """
        bounds = [self._upper_bounds(group, row) for group, row in zip(groups, joined, strict=True)]
        doubtful = [i for i, bound in enumerate(bounds) if measure or not self._fits(bound)]
        tokens = self._texts.count(
            text for i in doubtful for text in self._open_texts(groups[i], bounds[i], measure)
        )
        fitted: dict[int, _Fitted | EncodeError] = {}
        for i in doubtful:
            group, bound = groups[i], bounds[i]
            lengths = FieldLengths(
                prompt=tokens.get(group.prompt, bound.prompt),
                reference=tokens.get(group.reference, bound.reference),
                candidates=tuple(
                    tokens.get(text, at_most)
                    for text, at_most in zip(group.candidates, bound.candidates, strict=True)
                ),
            )
            try:
                fitted[i] = self._cut(group, lengths)
            except PolarError as error:
                fitted[i] = EncodeError(i, str(error))
        return fitted

    def _upper_bounds(self, group: TextGroup, row: _Joined) -> FieldLengths:
        """An upper bound for the tokens of each field, derived from the ids of the joined texts."""
        return FieldLengths(
            prompt=self._texts.at_most(group.prompt, len(row.head)),
            reference=self._texts.at_most(group.reference, len(row.head) - row.start),
            candidates=tuple(
                self._texts.at_most(text, len(tail) - row.start)
                for text, tail in zip(group.candidates, row.tails, strict=True)
            ),
        )

    def _fits(self, lengths: FieldLengths) -> bool:
        return self._prompt_fits(lengths) and max(lengths.candidates) <= self.max_response_length

    def _prompt_fits(self, lengths: FieldLengths) -> bool:
        """Whether prompt and reference need no cutting."""
        return (
            lengths.reference <= self.max_response_length
            and lengths.prompt <= (self._room - lengths.reference) // 2
        )

    def _open_texts(self, group: TextGroup, bound: FieldLengths, measure: bool) -> list[str]:
        """The texts that have to be counted: those that may be too long, or all with ``measure``."""
        if measure:
            return [group.prompt, group.reference, *group.candidates]
        heads = [] if self._prompt_fits(bound) else [group.prompt, group.reference]
        return heads + [
            text
            for text, at_most in zip(group.candidates, bound.candidates, strict=True)
            if at_most > self.max_response_length
        ]

    @property
    def _room(self) -> int:
        """Tokens that are left for twice the prompt and the reference."""
        return self.max_length - TEMPLATE_TOKENS - self.max_response_length

    def _cut(self, group: TextGroup, lengths: FieldLengths) -> _Fitted:
        reference, reference_cut = self._cut_response(group.reference, lengths.reference)
        candidates = [
            self._cut_response(text, n) for text, n in zip(group.candidates, lengths.candidates, strict=True)
        ]
        prompt, prompt_cut = self._cut_prompt(group.prompt, lengths.prompt, reference, lengths.reference)
        kept = replace(
            group, prompt=prompt, references=(reference,), candidates=tuple(text for text, _ in candidates)
        )
        return _Fitted(
            kept, FieldLengths(prompt_cut, reference_cut, tuple(n for _, n in candidates)), lengths
        )

    def _cut_response(self, text: str, tokens: int) -> tuple[str, int]:
        if tokens <= self.max_response_length:
            return text, 0
        return self._texts.cut_right(text, self.max_response_length)

    def _cut_prompt(self, prompt: str, tokens: int, reference: str, reference_tokens: int) -> tuple[str, int]:
        if reference_tokens > self.max_response_length:  # it was cut
            reference_tokens = self._texts.count([reference])[reference]
        budget = (self._room - reference_tokens) // 2
        if budget <= len(self.bos_ids):
            raise PolarError(
                f"a reference of {reference_tokens} tokens leaves the prompt a budget of {budget} tokens: "
                f"(max_length {self.max_length} - {TEMPLATE_TOKENS} - reference {reference_tokens} - "
                f"max_response_length {self.max_response_length}) // 2; raise max_length to at least "
                f"{2 * self.max_response_length + TEMPLATE_TOKENS + 2 * (len(self.bos_ids) + 1)} "
                f"or lower max_response_length"
            )
        return (prompt, 0) if tokens <= budget else self._texts.cut_left(prompt, budget)

    def _token_group(
        self, index: int, group: TextGroup, row: _Joined, fit: _Fitted | None, measure: bool
    ) -> TokenGroup | EncodeError:
        tails, cut = row.tails, fit.cut if fit else FieldLengths(0, 0, (0,) * len(row.tails))
        room = self.max_length - len(row.head)
        if max(map(len, tails)) > room:  # rarely, a cut text takes more tokens than were counted
            if room < 1:
                return EncodeError(
                    index,
                    f"prompt and reference alone take {len(row.head) - 1} tokens, more than max_length="
                    f"{self.max_length} leaves for them; the prompt begins with {group.prompt[:40]!r}",
                )
            excess = (max(0, len(tail) - room) for tail in tails)
            cut = replace(cut, candidates=tuple(a + b for a, b in zip(cut.candidates, excess, strict=True)))
            tails = [np.concatenate([tail[:-1][: room - 1], tail[-1:]]) for tail in tails]
        return grow_prefix(
            TokenGroup(
                prefix=row.head,
                branches=tails,
                pairs=np.array(group.pairs, dtype=np.int64).reshape(-1, 2),
                margins=np.array([margin or 0.0 for margin in group.margins], dtype=np.float32),
                weights=np.array(group.weights, dtype=np.float32),
                cut=cut,
                lengths=fit.lengths if fit and measure else None,
            )
        )


def _join(prompt: str, response: str, wrapper: Wrapper) -> str:
    return f"{prompt}{response}" if wrapper == "pretrain" or not response else f"{prompt}\n{response}"
