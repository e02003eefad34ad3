"""The POLAR input: (prompt, reference, candidate) to token ids. The one implementation of the template.

Training, evaluation, the server and the client all call this module, so that a model is never scored on
other ids than it was trained on. One candidate becomes (arXiv 2507.05197, section 3; spelled as xtuner
0.2.0's ``tokenize_ref`` spells it)::

    BOS prompt ⏎ reference <|reward|> prompt ⏎ candidate [UNUSED_TOKEN_130]
        └────────── the same for every candidate ──┘

With ``wrapper="pretrain"`` both ⏎ are left out; an empty reference or candidate gets no ⏎ before it.

Needs the packages ``tokenizers`` and ``numpy`` alone: a verl or vLLM environment can import it without torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import AddedToken, Tokenizer

from polar_ft.errors import PolarError
from polar_ft.text_splits import TextSplits

Wrapper = Literal["sft", "pretrain"]

SEPARATOR_TOKEN = "<|reward|>"
REWARD_TOKEN = "[UNUSED_TOKEN_130]"

# Key of config.json under which an exported model keeps the settings of its template.
SETTINGS_KEY = "polar_template"

# Two ⏎, the separator and the reward token: what a text holds beside its fields.
TEMPLATE_TOKENS = 4

# Characters that the tokenizer is given at once.
ENCODED_AT_ONCE = 1_000_000

# Added tokens that look like this are instructions to a model even where the tokenizer does not flag them
# special ("[UNUSED_TOKEN_130]" may not be); added runs of spaces or words are ordinary text.
_CONTROL_SHAPE = re.compile(r"<.+>|\[.+\]", re.DOTALL)


_tokenizer_has_threads = False


def _tokenize_without_threads() -> None:
    # A forked process has none of the tokenizer's threads, which would be waited for for ever. The library
    # sees to that itself, but not where TOKENIZERS_PARALLELISM is set.
    if _tokenizer_has_threads:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_tokenize_without_threads)


@dataclass(frozen=True)
class Lengths:
    """Tokens of each field before anything was cut; a field's BOS is counted, as xtuner 0.2.0 counts it."""

    prompt: int
    reference: int
    candidates: tuple[int, ...]


@dataclass(frozen=True)
class Cut:
    """Tokens that were cut off each field; 0 where the field is whole."""

    prompt: int
    reference: int
    candidates: tuple[int, ...]

    def __bool__(self) -> bool:
        return bool(self.prompt or self.reference or any(self.candidates))


@dataclass(frozen=True)
class Encoded:
    """One (prompt, reference) with its candidates, as the model sees them.

    Attributes:
        sequences: For each candidate all input ids, from BOS to the reward token.
        prefix_length: Length in tokens of the longest common prefix of the sequences; always shorter than
            the shortest sequence, so that every candidate keeps at least its reward token.
        cut: Tokens cut off each field.
        lengths: Tokens of each field before cutting; None unless asked for.
    """

    sequences: list[list[int]]
    prefix_length: int
    cut: Cut
    lengths: Lengths | None = None


Fields = tuple[str, str, Sequence[str], Wrapper]


@dataclass(frozen=True)
class EncodedParts:
    """As `Encoded`, with what the candidates share only once.

    Attributes:
        head: BOS, prompt, reference and separator, int32 array.
        tails: For each candidate what comes after the separator, int32 arrays, the reward token last.
        cut: As in `Encoded`.
        lengths: As in `Encoded`.
    """

    head: np.ndarray
    tails: list[np.ndarray]
    cut: Cut
    lengths: Lengths | None = None


def common_prefix_length(sequences: Sequence[np.ndarray]) -> int:
    """Length of the longest common prefix that leaves at least one token of every sequence.

    >>> common_prefix_length([np.array([1, 7, 8, 9]), np.array([1, 7, 5, 9])])
    2
    >>> common_prefix_length([np.array([1, 7, 9]), np.array([1, 7, 9])])
    2
    """
    first = sequences[0]
    length = min(map(len, sequences)) - 1
    for other in sequences[1:]:
        different = np.flatnonzero(first[:length] != other[:length])
        if len(different):
            length = int(different[0])
    return length


class PolarTemplate:
    """Turns texts into the token ids of a POLAR reward model.

    Text never becomes a control token: the tokenizer at work is a copy in which every control token has an
    unguessable name, so a candidate that spells ``<|reward|>`` or ``[UNUSED_TOKEN_130]`` is read as those
    characters. Control tokens are put in by id.

    Truncation: a response is cut on the right to ``max_response_length`` tokens, then the prompt on the
    left to ``(max_length - 4 - reference - max_response_length) // 2`` tokens. The prompt's budget does not
    depend on the candidate, so all candidates of a (prompt, reference) share one prefix, in training and
    in serving alike. Fields are cut as text, at the edge of a token, before they are joined. A field's
    length counts its BOS, as in xtuner 0.2.0.

    Args:
        tokenizer_json: The text of a ``tokenizer.json``.
        separator: Token between reference and candidate.
        reward_token: Token at the end, whose hidden state is scored.
        reward_token_id: Expected id of ``reward_token``; None takes the tokenizer's.
        max_length: Upper limit of a whole sequence in tokens.
        max_response_length: Upper limit of the reference and of each candidate in tokens.
        add_missing_tokens: Add the two tokens to a tokenizer that lacks them (Llama, Qwen2 bases).
        name: How errors call the tokenizer.

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
                f"max_length={max_length} leaves no room beside max_response_length={max_response_length}: "
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
        self._text_tokenizer, self._separator_text, unspellable = _without_control_tokens(
            self._tokenizer_json, separator
        )
        spec = json.loads(self._text_tokenizer.to_str())
        self._max_tokens_per_byte = _max_tokens_per_byte(spec)
        self._splits = TextSplits(spec, unspellable)

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
            **settings: Keyword arguments of `PolarTemplate`; what is not given, or None, is as the folder
                says (an exported model keeps what it was trained with), else the default.

        Raises:
            PolarError: There is no such folder, or its tokenizer needs code that was not allowed.
        """
        folder = resolve_folder(pretrained_model_name_or_path)
        text = read_tokenizer_json(folder, allow_tokenizer_code)
        settings = {**_settings_of(folder), **{k: v for k, v in settings.items() if v is not None}}
        return cls(text, name=f"the tokenizer of {os.fspath(pretrained_model_name_or_path)}", **settings)

    @property
    def settings(self) -> dict[str, Any]:
        """What a model must be scored with; an exported folder's ``config.json`` keeps it."""
        return {
            "separator": self.separator,
            "reward_token": self.reward_token,
            "max_length": self.max_length,
            "max_response_length": self.max_response_length,
        }

    def __len__(self) -> int:
        """Size of the vocabulary with added tokens."""
        return self.tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def tokenizer_json(self) -> str:
        """The tokenizer as ``tokenizer.json`` text, with the tokens that were added."""
        return self._tokenizer_json

    @property
    def fingerprint(self) -> str:
        """A hash of all that decides the ids: tokenizer, control tokens and limits."""
        settings = (self.separator, self.reward_token, self.max_length, self.max_response_length)
        text = f"1|{settings}|{self._tokenizer_json}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def encode(
        self,
        prompt: str,
        reference: str,
        candidates: Sequence[str],
        *,
        wrapper: Wrapper = "sft",
        measure: bool = False,
    ) -> Encoded:
        """Encodes the candidates of one (prompt, reference).

        Args:
            prompt: Text of the prompt; the contents of several messages are joined with ⏎ beforehand.
            reference: Text of the reference, may be empty.
            candidates: Texts to be scored, at least one.
            wrapper: "sft" joins prompt and response with ⏎, "pretrain" without.
            measure: Also count the tokens of every field before cutting.

        Raises:
            PolarError: The reference leaves no room for the prompt.
        """
        return self.encode_batch([(prompt, reference, candidates, wrapper)], measure=measure)[0]

    def encode_batch(self, batch: Sequence[Fields], *, measure: bool = False) -> list[Encoded]:
        """Encodes many (prompt, reference, candidates, wrapper) at once, in parallel; see `encode`."""
        results = []
        for parts in self.encode_parts(batch, measure=measure):
            head = parts.head.tolist()
            sequences = [head + tail.tolist() for tail in parts.tails]
            prefix_length = len(head) + common_prefix_length(parts.tails)
            results.append(Encoded(sequences, prefix_length, parts.cut, parts.lengths))
        return results

    def encode_parts(self, batch: Sequence[Fields], *, measure: bool = False) -> list[EncodedParts]:
        """As `encode_batch`, with what all candidates of a row share only once, as arrays."""
        # Few fields are ever too long, and the ids of the whole texts show for most that they are not; so
        # everything is joined and tokenized first, and again where something had to be cut.
        parts, starts = self._join_and_encode(batch)
        bounds = [
            None if measure else self._upper_bounds(fields, row, start)
            for fields, row, start in zip(batch, parts, starts, strict=True)
        ]
        doubtful = [i for i, bound in enumerate(bounds) if bound is None or not self._fits(bound)]
        if doubtful:
            fitted = self._fit([batch[i] for i in doubtful], [bounds[i] for i in doubtful])
            cut = [i for i, (_, cut, _) in zip(doubtful, fitted, strict=True) if cut]
            joined, _ = self._join_and_encode([fields for fields, cut, _ in fitted if cut])
            again = dict(zip(cut, joined, strict=True))
            for i, (_, row_cut, lengths) in zip(doubtful, fitted, strict=True):
                parts[i] = replace(again.get(i, parts[i]), cut=row_cut, lengths=lengths)
        return [self._within_max_length(fields, row) for fields, row in zip(batch, parts, strict=True)]

    def kept_texts(
        self, prompt: str, reference: str, candidates: Sequence[str]
    ) -> tuple[str, str, Sequence[str]]:
        """What is left of prompt, reference and candidates after cutting: a suffix and prefixes of them."""
        [(kept, _, _)] = self._fit([(prompt, reference, candidates, "sft")], [None])
        return kept[:3]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids, with control tokens spelled out."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False)

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """The vocabulary's name of each id; for people, not for joining."""
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

    def _join_and_encode(self, batch: Sequence[Fields]) -> tuple[list[EncodedParts], list[int]]:
        """Ids of the joined fields as they are, whatever their length.

        Beside them, for each row, tokens that its head and every tail are known to begin with: the start of
        its prompt.
        """
        # The separator is a token of its own and parts what stands on its two sides. Each side is tokenized
        # with the separator beside it, in two pieces if the prompt has a safe place to be cut at, and every
        # piece once however many candidates and rows share it.
        pieces: dict[str, int] = {}

        def number(piece: str) -> int:
            return pieces.setdefault(piece, len(pieces))

        separator = self._separator_text
        before_start = "" if self._splits.same_anywhere else separator
        numbers = []
        for prompt, reference, candidates, wrapper in batch:
            start, end = self._splits.last(prompt)
            if start:
                left = [number(start), number(f"{_join(end, reference, wrapper)}{separator}")]
                shared = number(f"{before_start}{start}")
                rights = [[shared, number(_join(end, text, wrapper))] for text in candidates]
            else:
                left = [number(f"{_join(prompt, reference, wrapper)}{separator}")]
                rights = [[number(f"{separator}{_join(prompt, text, wrapper)}")] for text in candidates]
            # The separator ends the left side, so the right sides do not keep theirs.
            numbers.append((left, rights, int(not start or bool(before_start))))
        ids_of = self._encode_texts(list(pieces))

        bos, reward = (np.array(ids, dtype=np.int32) for ids in (self.bos_ids, [self.reward_token_id]))
        parts = [
            EncodedParts(
                head=np.concatenate([bos, *(ids_of[n] for n in left)]),
                tails=[np.concatenate([*(ids_of[n] for n in right), reward])[skip:] for right in rights],
                cut=Cut(0, 0, (0,) * len(rights)),
            )
            for left, rights, skip in numbers
        ]
        starts = [
            min(len(ids_of[left[0]]), len(ids_of[rights[0][0]]) - skip) if len(left) > 1 else 0
            for left, rights, skip in numbers
        ]
        return parts, starts

    def _within_max_length(self, fields: Fields, row: EncodedParts) -> EncodedParts:
        """Cuts what is still too long: a cut text can, rarely, take more tokens than were counted."""
        room = self.max_length - len(row.head)
        if max(map(len, row.tails)) <= room:
            return row
        if room < 1:
            raise PolarError(
                f"prompt and reference alone take {len(row.head) - 1} tokens, more than max_length="
                f"{self.max_length} leaves them; the prompt begins {fields[0][:40]!r}"
            )
        excess = (max(0, len(tail) - room) for tail in row.tails)
        candidates = tuple(a + b for a, b in zip(row.cut.candidates, excess, strict=True))
        tails = [np.concatenate([tail[:-1][: room - 1], tail[-1:]]) for tail in row.tails]
        return replace(row, tails=tails, cut=replace(row.cut, candidates=candidates))

    def _upper_bounds(self, fields: Fields, row: EncodedParts, start: int) -> Lengths:
        """Tokens that no field can have more of, as far as the ids of the joined texts tell."""
        prompt, reference, candidates, _ = fields
        return Lengths(
            prompt=self._at_most(prompt, len(row.head)),
            reference=self._at_most(reference, len(row.head) - start),
            candidates=tuple(
                self._at_most(text, len(tail) - start)
                for text, tail in zip(candidates, row.tails, strict=True)
            ),
        )

    def _fits(self, lengths: Lengths) -> bool:
        return self._prompt_fits(lengths) and max(lengths.candidates) <= self.max_response_length

    def _prompt_fits(self, lengths: Lengths) -> bool:
        """Whether prompt and reference need no cut."""
        return (
            lengths.reference <= self.max_response_length
            and lengths.prompt <= (self._room - lengths.reference) // 2
        )

    def _at_most(self, text: str, joined: int) -> int:
        """Tokens, BOS counted, that a text cannot exceed which is part of one of that many tokens.

        From its first safe place on it has the tokens that it has in the joined text.
        """
        if self._max_tokens_per_byte is None:
            return sys.maxsize
        start = self._splits.first(text)
        by_bytes = self._max_tokens_per_byte * len(text.encode())
        if start is not None:
            by_bytes = min(by_bytes, self._max_tokens_per_byte * len(text[:start].encode()) + joined)
        return len(self.bos_ids) + 1 + by_bytes

    def _fit(
        self, batch: Sequence[Fields], bounds: Sequence[Lengths | None]
    ) -> list[tuple[Fields, Cut, Lengths | None]]:
        """Cuts what is too long.

        Args:
            batch: The fields of each row.
            bounds: What is known of their tokens: only what these leave open is counted. None counts every
                field of the row, and returns the counts with it.
        """
        texts = list(
            dict.fromkeys(
                text
                for fields, bound in zip(batch, bounds, strict=True)
                for text in self._open_texts(fields, bound)
            )
        )
        encoded = self._encode_texts(texts)
        tokens = {text: len(self.bos_ids) + len(ids) for text, ids in zip(texts, encoded, strict=True)}
        fitted: list[tuple[Fields, Cut, Lengths | None]] = []
        for (prompt, reference, candidates, wrapper), bound in zip(batch, bounds, strict=True):
            known = bound or Lengths(0, 0, (0,) * len(candidates))  # without bounds all texts were counted
            lengths = Lengths(
                prompt=tokens.get(prompt, known.prompt),
                reference=tokens.get(reference, known.reference),
                candidates=tuple(
                    tokens.get(text, at_most)
                    for text, at_most in zip(candidates, known.candidates, strict=True)
                ),
            )
            reference, reference_cut = self._cut_right(reference, lengths.reference)
            cut_candidates = [
                self._cut_right(text, n) for text, n in zip(candidates, lengths.candidates, strict=True)
            ]
            prompt, prompt_cut = self._cut_left(prompt, lengths.prompt, reference, lengths.reference)
            cut = Cut(prompt_cut, reference_cut, tuple(n for _, n in cut_candidates))
            fields = (prompt, reference, [text for text, _ in cut_candidates], wrapper)
            fitted.append((fields, cut, lengths if bound is None else None))
        return fitted

    def _open_texts(self, fields: Fields, bound: Lengths | None) -> list[str]:
        """The texts that may be too long as far as is known."""
        prompt, reference, candidates, _ = fields
        if bound is None:
            return [prompt, reference, *candidates]
        heads = [] if self._prompt_fits(bound) else [prompt, reference]
        return heads + [
            text
            for text, at_most in zip(candidates, bound.candidates, strict=True)
            if at_most > self.max_response_length
        ]

    def _encode_texts(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of each text, all cores at work."""
        global _tokenizer_has_threads
        _tokenizer_has_threads = True
        ids = []
        start = 0
        while start < len(texts):
            # An encoding takes a hundred times the memory of its ids, so not all are held at once.
            end, characters = start, 0
            while end < len(texts) and characters < ENCODED_AT_ONCE:
                characters += len(texts[end])
                end += 1
            encodings = self._text_tokenizer.encode_batch_fast(texts[start:end], add_special_tokens=False)
            ids += [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]
            start = end
        return ids

    def _encode_text(self, text: str) -> Any:
        return self._text_tokenizer.encode(text, add_special_tokens=False)

    def _cut_right(self, text: str, tokens: int) -> tuple[str, int]:
        if tokens <= self.max_response_length:
            return text, 0
        encoding = self._encode_text(text)
        keep = self.max_response_length - len(self.bos_ids)
        total = len(encoding.ids)
        offsets = encoding.offsets
        # A character of several tokens is dropped whole: half of it is not text.
        while keep > 0 and offsets[keep - 1][1] > offsets[keep][0]:
            keep -= 1
        return text[: offsets[keep - 1][1]] if keep > 0 else "", total - keep

    @property
    def _room(self) -> int:
        """Tokens for the prompt, twice, and the reference."""
        return self.max_length - TEMPLATE_TOKENS - self.max_response_length

    def _cut_left(self, prompt: str, tokens: int, reference: str, reference_tokens: int) -> tuple[str, int]:
        if reference_tokens > self.max_response_length:  # it was cut
            reference_tokens = len(self.bos_ids) + len(self._encode_text(reference).ids)
        budget = (self._room - reference_tokens) // 2
        if budget <= len(self.bos_ids):
            raise PolarError(
                f"a reference of {reference_tokens} tokens leaves the prompt a budget of {budget} tokens: "
                f"(max_length {self.max_length} - {TEMPLATE_TOKENS} - reference {reference_tokens} - "
                f"max_response_length {self.max_response_length}) // 2; raise max_length to at least "
                f"{2 * self.max_response_length + TEMPLATE_TOKENS + 2 * (len(self.bos_ids) + 1)} "
                f"or lower max_response_length"
            )
        if tokens <= budget:
            return prompt, 0
        encoding = self._encode_text(prompt)
        total = len(encoding.ids)
        start = total - (budget - len(self.bos_ids))
        offsets = encoding.offsets
        while start < total and offsets[start][0] < offsets[start - 1][1]:
            start += 1
        return prompt[offsets[start][0] :] if start < total else "", start


def _settings_of(folder: Path) -> dict[str, Any]:
    config = folder / "config.json"
    if not config.is_file():
        return {}
    return json.loads(config.read_text(encoding="utf-8")).get(SETTINGS_KEY, {})


def _join(prompt: str, response: str, wrapper: Wrapper) -> str:
    return f"{prompt}{response}" if wrapper == "pretrain" or not response else f"{prompt}\n{response}"


def read_tokenizer_json(folder: str | os.PathLike[str], allow_tokenizer_code: Iterable[str] = ()) -> str:
    """Text of a folder's ``tokenizer.json``.

    A folder that has only a tokenizer with code of its own (the published POLAR folders do) is refused,
    unless ``allow_tokenizer_code`` names the class: then, and only then, that code is run, by transformers.

    Raises:
        PolarError: No such folder, no tokenizer in it, or code that was not allowed.
    """
    path = resolve_folder(folder)
    file = path / "tokenizer.json"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise PolarError(f"{file}: is not valid UTF-8 ({error}); the file is damaged") from error

    config_file = path / "tokenizer_config.json"
    config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
    names = [name for name in (config.get("auto_map", {}).get("AutoTokenizer") or []) if name]
    if not names:
        raise PolarError(
            f"{path}: has no tokenizer.json; save it once with "
            f"AutoTokenizer.from_pretrained(...).save_pretrained(...) of a fast tokenizer"
        )
    allowed = set(allow_tokenizer_code)
    fast = [name for name in names if name in allowed]
    if not fast:
        raise PolarError(
            f"{path}: its tokenizer needs Python code from the folder ({', '.join(names)}), which is not run "
            f"unless it is named: read that file, then put allow_tokenizer_code=({names[-1]!r},) into the "
            f"config (--allow-tokenizer-code on the command line), or add a tokenizer.json to the folder"
        )
    try:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module
    except ImportError as error:
        raise PolarError(
            "running a tokenizer's own code needs transformers: pip install polar-ft[train]"
        ) from error
    tokenizer = get_class_from_dynamic_module(fast[-1], str(path)).from_pretrained(str(path))
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise PolarError(f"{path}: {fast[-1]} is not a fast tokenizer; allow the fast class of {names}")
    return tokenizer.backend_tokenizer.to_str()


def resolve_folder(folder: str | os.PathLike[str]) -> Path:
    """The local folder of a model: the path itself, or the downloaded snapshot of a hub id.

    Raises:
        PolarError: Neither a folder nor something that the hub has.
    """
    path = Path(folder)
    if path.is_dir():
        return path
    name = os.fspath(folder)
    if path.exists():
        raise PolarError(f"{name}: is a file; name the folder that holds the model")
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not name.startswith("."):
        try:
            from huggingface_hub import snapshot_download

            return Path(snapshot_download(name))
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise PolarError(
                f"{name}: is no folder here, and the HuggingFace hub did not give it either "
                f"({type(error).__name__}: {reason[:160]}); check the spelling of "
                f"pretrained_model_name_or_path"
            ) from error
    raise PolarError(f"{name}: no such folder; check the spelling of the path")


def _without_control_tokens(tokenizer_json: str, separator: str) -> tuple[Tokenizer, str, set[str]]:
    """A copy of the tokenizer that knows no control token by its name, the separator's secret name, and all.

    Control tokens are renamed rather than removed, so that every id stays what it is.
    """
    spec = json.loads(tokenizer_json)
    nonce = "".join(chr(0xE000 + secrets.randbelow(0x1900)) for _ in range(12))
    names = {
        token["content"]: f"{nonce}{index:x}\uf8ff"
        for index, token in enumerate(spec["added_tokens"])
        if token["special"] or token["content"] == separator or _CONTROL_SHAPE.fullmatch(token["content"])
    }
    names.setdefault(separator, f"{nonce}s\uf8ff")

    for token in spec["added_tokens"]:
        if token["content"] == separator:
            token["normalized"] = False
        token["content"] = names.get(token["content"], token["content"])
    if not any(token["content"] == names[separator] for token in spec["added_tokens"]):
        raise PolarError(
            f"{separator!r} is an ordinary word of this tokenizer, which text could write as well; "
            f"name an added token in reward_tokens=dict(separator=...)"
        )

    model = spec["model"]
    if isinstance(model.get("vocab"), dict):
        model["vocab"] = {names.get(piece, piece): index for piece, index in model["vocab"].items()}
    elif isinstance(model.get("vocab"), list):  # Unigram: [piece, log-probability]
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    if model.get("merges"):
        pairs = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
        model["merges"] = [pair for pair in pairs if "".join(pair) not in names]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    spec["post_processor"] = None
    return Tokenizer.from_str(json.dumps(spec, ensure_ascii=False)), names[separator], set(names.values())


def _max_tokens_per_byte(spec: dict[str, Any]) -> int | None:
    """How many tokens a UTF-8 byte of text can become at most, one dummy prefix aside; None if unknown.

    One, for every model whose smallest unit is a byte or a character; three where NFC may decompose a
    character first (Unicode Standard Annex 15, maximum expansion); other normalizers are not bounded here.
    """

    def kinds(node: dict[str, Any] | None) -> set[str]:
        if node is None:
            return set()
        if node["type"] == "Sequence":
            return set().union(*(kinds(child) for child in node["normalizers"]))
        return {node["type"]}

    found = kinds(spec.get("normalizer"))
    if found <= {"Prepend", "Replace", "Strip"}:
        return 1
    return 3 if found <= {"Prepend", "Replace", "Strip", "NFC"} else None
