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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tokenizers import AddedToken, Tokenizer

from polar_ft.errors import PolarError

Wrapper = Literal["sft", "pretrain"]

SEPARATOR_TOKEN = "<|reward|>"
REWARD_TOKEN = "[UNUSED_TOKEN_130]"

# Key of config.json under which an exported model keeps the settings of its template.
SETTINGS_KEY = "polar_template"

# Two ⏎, the separator and the reward token: what a text holds beside its fields.
TEMPLATE_TOKENS = 4

# Added tokens that look like this are instructions to a model even where the tokenizer does not flag them
# special ("[UNUSED_TOKEN_130]" may not be); added runs of spaces or words are ordinary text.
_CONTROL_SHAPE = re.compile(r"<.+>|\[.+\]", re.DOTALL)


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
_FittedFields = tuple[str, str, Sequence[str], Wrapper, Cut, Lengths | None]


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
        self._text_tokenizer, self._separator_text = _without_control_tokens(self._tokenizer_json, separator)
        self._max_tokens_per_byte = _max_tokens_per_byte(json.loads(self._tokenizer_json))

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
        fitted = self._fit(batch, measure)
        # The separator is a token of its own and parts what stands on its two sides, so each side is
        # tokenized with the separator beside it, and once however many candidates and rows share it.
        texts: dict[str, int] = {}
        left_of, rights_of = [], []
        for prompt, reference, candidates, wrapper, _, _ in fitted:
            left_text = f"{_join(prompt, reference, wrapper)}{self._separator_text}"
            left_of.append(texts.setdefault(left_text, len(texts)))
            right_texts = [f"{self._separator_text}{_join(prompt, text, wrapper)}" for text in candidates]
            rights_of.append([texts.setdefault(text, len(texts)) for text in right_texts])
        encodings = self._text_tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        ids_of = [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

        bos, reward = (np.array(ids, dtype=np.int32) for ids in (self.bos_ids, [self.reward_token_id]))
        results = []
        for (prompt, _, _, _, cut, lengths), left, rights in zip(fitted, left_of, rights_of, strict=True):
            head = np.concatenate([bos, ids_of[left]])
            room = self.max_length - len(head) - 1
            if room < 0:
                raise PolarError(
                    f"prompt and reference alone take {len(head) - 1} tokens, more than max_length="
                    f"{self.max_length} leaves them; the prompt begins {prompt[:40]!r}"
                )
            # Cutting as text can, rarely, re-tokenize to a few tokens more than were counted.
            excess = [max(0, len(ids_of[right]) - 1 - room) for right in rights]
            if any(excess):
                both = zip(cut.candidates, excess, strict=True)
                cut = replace(cut, candidates=tuple(a + b for a, b in both))
            tails = [np.concatenate([ids_of[right][1 : 1 + room], reward]) for right in rights]
            results.append(EncodedParts(head, tails, cut, lengths))
        return results

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

    def _fit(self, batch: Sequence[Fields], measure: bool) -> list[_FittedFields]:
        """Cuts what is too long. Fields that are certainly short enough are not tokenized for it."""
        fitted: list[_FittedFields] = []
        for prompt, reference, candidates, wrapper in batch:
            lengths = None
            if measure:
                lengths = Lengths(
                    self._count(prompt), self._count(reference), tuple(map(self._count, candidates))
                )
            reference, reference_cut = self._cut_right(reference)
            cut_candidates = [self._cut_right(candidate) for candidate in candidates]
            prompt, prompt_cut = self._cut_left(prompt, reference)
            fitted.append(
                (
                    prompt,
                    reference,
                    [text for text, _ in cut_candidates],
                    wrapper,
                    Cut(prompt_cut, reference_cut, tuple(n for _, n in cut_candidates)),
                    lengths,
                )
            )
        return fitted

    def _encode_text(self, text: str) -> Any:
        return self._text_tokenizer.encode(text, add_special_tokens=False)

    def _count(self, text: str) -> int:
        return len(self.bos_ids) + len(self._encode_text(text).ids)

    def _upper_bound(self, text: str) -> int:
        """Tokens, BOS counted, that the text cannot exceed; found without tokenizing where possible."""
        if self._max_tokens_per_byte is None:
            return self._count(text)
        return len(self.bos_ids) + 1 + self._max_tokens_per_byte * len(text.encode())

    def _cut_right(self, text: str) -> tuple[str, int]:
        if self._upper_bound(text) <= self.max_response_length:
            return text, 0
        encoding = self._encode_text(text)
        keep = self.max_response_length - len(self.bos_ids)
        total = len(encoding.ids)
        if total <= keep:
            return text, 0
        offsets = encoding.offsets
        # A character of several tokens is dropped whole: half of it is not text.
        while keep > 0 and offsets[keep - 1][1] > offsets[keep][0]:
            keep -= 1
        return text[: offsets[keep - 1][1]] if keep > 0 else "", total - keep

    def _cut_left(self, prompt: str, reference: str) -> tuple[str, int]:
        room = self.max_length - TEMPLATE_TOKENS - self.max_response_length
        if self._upper_bound(prompt) <= (room - self._upper_bound(reference)) // 2:
            return prompt, 0
        reference_tokens = self._count(reference)
        budget = (room - reference_tokens) // 2
        if budget <= len(self.bos_ids):
            raise PolarError(
                f"a reference of {reference_tokens} tokens leaves the prompt a budget of {budget} tokens: "
                f"(max_length {self.max_length} - {TEMPLATE_TOKENS} - reference {reference_tokens} - "
                f"max_response_length {self.max_response_length}) // 2; raise max_length to at least "
                f"{2 * self.max_response_length + TEMPLATE_TOKENS + 2 * (len(self.bos_ids) + 1)} "
                f"or lower max_response_length"
            )
        encoding = self._encode_text(prompt)
        total = len(encoding.ids)
        start = total - (budget - len(self.bos_ids))
        if start <= 0:
            return prompt, 0
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


def _without_control_tokens(tokenizer_json: str, separator: str) -> tuple[Tokenizer, str]:
    """A copy of the tokenizer that knows no control token by its name, and the separator's secret name.

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
    return Tokenizer.from_str(json.dumps(spec, ensure_ascii=False)), names[separator]


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
