"""Tokenizing texts: control tokens are hidden, and long texts are cut or split at safe places.

*Control tokens*: texts are tokenized by a copy of the tokenizer in which every control token has an
unguessable name, so that a text that spells a control token is read as ordinary characters
(`hide_control_tokens`).

*Safe places*: all candidates of a prompt begin with it, and the prompt need not be tokenized once for each of
them. `TextSplits` finds places where a text can be split in two whose token ids, concatenated, are those of
the complete text. That a place is safe is derived from how the tokenizer works, never from trying examples.
The places used here are spaces between two ASCII letters, such as the first one in "sky is blue?": the left
part ends with the letter before the space. Why the two parts are independent, for each step of a
`tokenizers.Tokenizer`:

- *Added tokens* are found first. None that text can spell contains a space or absorbs one next to it.
- *Normalizer*: none; or NFC, which composes no ASCII letter with a space; or the replacement of each space by
  "▁", with or without a "▁" put before every text (which then stands for the space of the right part, so the
  right part omits its space).
- *Pre-tokenizer*: a pattern known to scan from left to right, to end a run of letters before a space and to
  begin a new match at a space before a letter; or Metaspace, which replaces spaces and puts nothing before a
  text that begins with one; or none.
- *BPE* merges neighbours whose merged form is in the vocabulary. If no piece has a space after a letter,
  nothing is merged across the place, and merges on one side do not depend on the other. If the pre-tokenizer
  splits at the place, this always holds.

Needs only ``tokenizers`` and ``numpy``.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from polar_ft.errors import PolarError
from polar_ft.files import read_json, resolve_folder

# Characters that are tokenized in one batch.
ENCODED_AT_ONCE = 1_000_000

# Added tokens of this form are control tokens even if the tokenizer does not flag them as special, as may be
# the case for "[UNUSED_TOKEN_130]"; added runs of spaces and words are ordinary text.
_CONTROL_SHAPE = re.compile(r"<.+>|\[.+\]", re.DOTALL)

_tokenizer_has_threads = False


def _tokenize_without_threads() -> None:
    # A forked process does not have the tokenizer's threads and would wait for them forever. The library
    # handles that, except where TOKENIZERS_PARALLELISM is set.
    if _tokenizer_has_threads:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_tokenize_without_threads)


class TextTokenizer:
    """Tokenizes, counts and cuts texts; no text becomes a control token.

    Args:
        tokenizer_json: The text of a ``tokenizer.json``.
        separator: The control token that is joined with texts, under its hidden name.
        bos_tokens: Number of BOS tokens before a text; lengths include them, as in xtuner 0.2.0.

    Attributes:
        separator: The hidden name of the separator.
        splits: The safe places of texts.

    Raises:
        PolarError: The separator is an ordinary word of the vocabulary.
    """

    def __init__(self, tokenizer_json: str, separator: str, bos_tokens: int) -> None:
        self._tokenizer, self.separator, unspellable = hide_control_tokens(tokenizer_json, separator)
        self._bos_tokens = bos_tokens
        spec = json.loads(self._tokenizer.to_str())
        self._max_tokens_per_byte = _max_tokens_per_byte(spec)
        self.splits = TextSplits(spec, unspellable)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Tokenizes texts on all cores: the ids of each, without BOS, int32 arrays."""
        global _tokenizer_has_threads
        _tokenizer_has_threads = True
        ids = []
        start = 0
        while start < len(texts):
            # An encoding takes a hundred times the memory of its ids, so few are held at a time.
            end, characters = start, 0
            while end < len(texts) and characters < ENCODED_AT_ONCE:
                characters += len(texts[end])
                end += 1
            encodings = self._tokenizer.encode_batch_fast(texts[start:end], add_special_tokens=False)
            ids += [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]
            start = end
        return ids

    def count(self, texts: Iterable[str]) -> dict[str, int]:
        """Number of tokens of each distinct text, BOS included."""
        different = list(dict.fromkeys(texts))
        encoded = self.encode(different)
        return {text: self._bos_tokens + len(ids) for text, ids in zip(different, encoded, strict=True)}

    def at_most(self, text: str, joined: int) -> int:
        """Upper bound for the tokens of a text, BOS included, that is part of a text of ``joined`` tokens.

        From its first safe place on, the text has the same tokens as in the joined text.
        """
        if self._max_tokens_per_byte is None:
            return sys.maxsize
        start = self.splits.first(text)
        by_bytes = self._max_tokens_per_byte * len(text.encode())
        if start is not None:
            by_bytes = min(by_bytes, self._max_tokens_per_byte * len(text[:start].encode()) + joined)
        return self._bos_tokens + 1 + by_bytes

    def cut_right(self, text: str, limit: int) -> tuple[str, int]:
        """Cuts a text to its first ``limit`` tokens, BOS included; also returns how many were cut off.

        A character of several tokens is kept or dropped as one, as a part of it is not text.
        """
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        keep, total, offsets = limit - self._bos_tokens, len(encoding.ids), encoding.offsets
        while keep > 0 and offsets[keep - 1][1] > offsets[keep][0]:
            keep -= 1
        return text[: offsets[keep - 1][1]] if keep > 0 else "", total - keep

    def cut_left(self, text: str, limit: int) -> tuple[str, int]:
        """As `cut_right`, but keeps the last tokens."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        total, offsets = len(encoding.ids), encoding.offsets
        start = total - (limit - self._bos_tokens)
        while start < total and offsets[start][0] < offsets[start - 1][1]:
            start += 1
        return text[offsets[start][0] :] if start < total else "", start


def tokenizer_digest(folder: Path) -> str:
    """A digest of the files of a model folder that decide its token ids; a copy has the same."""
    digest = hashlib.sha256()
    for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "added_tokens.json"):
        if (folder / name).is_file():
            digest.update(name.encode() + b"\0" + (folder / name).read_bytes())
    return digest.hexdigest()[:16]


def read_tokenizer_json(folder: str | os.PathLike[str], allow_tokenizer_code: Iterable[str] = ()) -> str:
    """Reads a folder's ``tokenizer.json``.

    Where a folder, as the published POLAR folders, only has a tokenizer with its own Python code, that code
    is run (by transformers) only if ``allow_tokenizer_code`` names the class.

    Raises:
        PolarError: The folder does not exist or has no tokenizer, or its code was not allowed.
    """
    path = resolve_folder(folder)
    file = path / "tokenizer.json"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise PolarError(f"{file}: is not valid UTF-8 ({error}); the file is damaged") from error

    config_file = path / "tokenizer_config.json"
    config = read_json(config_file) if config_file.is_file() else {}
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
            "running a tokenizer's own code needs transformers: pip install '.[train]'"
        ) from error
    tokenizer = get_class_from_dynamic_module(fast[-1], str(path)).from_pretrained(str(path))
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise PolarError(f"{path}: {fast[-1]} is not a fast tokenizer; allow the fast class of {names}")
    return tokenizer.backend_tokenizer.to_str()


def hide_control_tokens(tokenizer_json: str, separator: str) -> tuple[Tokenizer, str, set[str]]:
    """Copies a tokenizer with its control tokens under unguessable names.

    They are renamed rather than removed, so that all ids stay the same.

    Args:
        tokenizer_json: The text of a ``tokenizer.json``.
        separator: A token that is hidden in any case.

    Returns:
        The copy, the separator's hidden name, and all hidden names.

    Raises:
        PolarError: The separator is not an added token.
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
    """Most tokens that a UTF-8 byte of text can become, apart from one dummy prefix; None if unknown.

    One for every model whose smallest unit is a byte or a character; three where NFC may first decompose a
    character (Unicode Standard Annex 15, maximum expansion); other normalizers are not bounded here.
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


_PLACE = re.compile(r"(?<=[A-Za-z]) (?=[A-Za-z])")

# The patterns of Llama 3 and Qwen2; GPT-2's is built into ByteLevel. Letters are only in runs of letters and
# in contractions, and a run begins with the space before it.
_KNOWN_PATTERNS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    for digits in ("", "{1,3}")
}


class TextSplits:
    """Finds the safe places in texts for one tokenizer.

    Args:
        spec: The content of its ``tokenizer.json``.
        unspellable: Contents of added tokens that no text contains.

    Attributes:
        known: Whether safe places are known for this tokenizer. If not, `last` and `first` find none.
        same_anywhere: Whether a text has the same ids after an added token as at the very start.

    >>> gpt2 = {
    ...     "added_tokens": [],
    ...     "normalizer": None,
    ...     "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
    ...     "model": {"type": "BPE"},
    ... }
    >>> splits = TextSplits(gpt2, unspellable=set())
    >>> splits.last("Is the sky blue?"), splits.first("Is the sky blue?")
    (('Is the sky', ' blue?'), 2)
    >>> splits.last("2 + 2 = ?"), splits.first("2 + 2 = ?")
    (('', '2 + 2 = ?'), None)
    """

    def __init__(self, spec: dict[str, Any], unspellable: set[str]) -> None:
        self.known = (
            _added_tokens_allow(spec["added_tokens"], unspellable)
            and _normalizer_allows(spec["normalizer"])
            and _model_allows(spec["model"], splits=_pattern_splits(spec["pre_tokenizer"]))
        )
        # With "first" Metaspace puts a "▁" only at the very beginning.
        self.same_anywhere = (
            self.known
            and not any(token["rstrip"] for token in spec["added_tokens"])
            and all(
                s.get("prepend_scheme") != "first" for s in _steps(spec["pre_tokenizer"], "pretokenizers")
            )
        )
        # The right part omits its space where a normalizer puts "▁" before every text.
        self._skip = int(any(node["type"] == "Prepend" for node in _steps(spec["normalizer"], "normalizers")))

    def last(self, text: str) -> tuple[str, str]:
        """Splits a text at its last safe place; ``("", text)`` where there is none.

        The ids of the left part do not depend on what follows the text.
        """
        # The last place of a long text is near its end, except in languages without spaces.
        for start in (max(0, len(text) - 200), 0) if self.known else ():
            places = [match.start() for match in _PLACE.finditer(text, start)]
            if places:
                return text[: places[-1]], text[places[-1] + self._skip :]
        return "", text

    def first(self, text: str) -> int | None:
        """Index of the first safe place; what precedes the text changes no id from there on."""
        match = _PLACE.search(text) if self.known else None
        return match.start() if match else None


def _steps(node: dict[str, Any] | None, children: str) -> list[dict[str, Any]]:
    if node is None:
        return []
    return (
        [step for child in node[children] for step in _steps(child, children)] if children in node else [node]
    )


def _added_tokens_allow(tokens: list[dict[str, Any]], unspellable: set[str]) -> bool:
    return not any(
        " " in token["content"] or token["lstrip"] or token["rstrip"] or token["single_word"]
        for token in tokens
        if token["content"] not in unspellable
    )


def _normalizer_allows(normalizer: dict[str, Any] | None) -> bool:
    steps = _steps(normalizer, "normalizers")
    replaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepends = {"type": "Prepend", "prepend": "▁"}
    return all(step in ({"type": "NFC"}, replaces, prepends) for step in steps) and (
        prepends not in steps or replaces in steps
    )


def _pattern_splits(pre_tokenizer: dict[str, Any] | None) -> bool | None:
    """Whether a known pattern splits at the safe places; None for an unknown pre-tokenizer."""
    steps = _steps(pre_tokenizer, "pretokenizers")
    if not steps or (steps[0]["type"] == "Metaspace" and steps[0]["replacement"] == "▁" and len(steps) == 1):
        return False
    *before, last = steps
    if last["type"] != "ByteLevel":
        return None
    if not before:
        return True if last.get("use_regex", True) else None
    split = before[0]
    known = (
        len(before) == 1
        and split["type"] == "Split"
        and split["pattern"].get("Regex") in _KNOWN_PATTERNS
        and split["behavior"] == "Isolated"
        and not split["invert"]
        and not last.get("use_regex", True)
    )
    return True if known else None


def _model_allows(model: dict[str, Any], splits: bool | None) -> bool:
    if splits is None or model["type"] != "BPE" or model.get("dropout"):
        return False
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return False
    # "▁" has to be in the vocabulary, else it may be fused with unknown characters next to it.
    return splits or (
        "▁" in model["vocab"]
        and not model.get("ignore_merges")
        and not any(re.search("[A-Za-z]▁", piece) for piece in model["vocab"])
    )
