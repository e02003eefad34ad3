"""Where a text can be cut in two whose token ids, one after the other, are those of the whole text.

All candidates of a prompt begin with it, so the prompt need not be tokenized once for each of them. Which
places are safe follows from how the tokenizer works, never from a look at some examples. The places meant
here are the spaces between two ASCII letters, such as the first one in "sky is blue?": the left part ends
with the letter before it.

Why the two parts do not depend on each other, step by step of a `tokenizers.Tokenizer`:

- *Added tokens* are looked for first. None that text can spell holds a space or swallows one beside it.
- *Normalizer*: none; NFC, under which neither ASCII letter nor space composes with the other; or the
  replacement of each space by "▁", with or without a "▁" put before every text (then the right part leaves
  its space out, for which that "▁" stands).
- *Pre-tokenizer*: a pattern known to scan from left to right, to end a run of letters before a space and to
  begin a new match at a space before a letter; or Metaspace, which replaces spaces and puts nothing before a
  text that begins with one; or none.
- *BPE* merges neighbours whose merged form is in the vocabulary. Where no piece has a space after a letter,
  nothing is merged across the place, and what is merged on one side does not depend on the other. After a
  pattern that splits at the place, it holds in any case.
"""

from __future__ import annotations

import re
from typing import Any

_PLACE = re.compile(r"(?<=[A-Za-z]) (?=[A-Za-z])")

# `Split` of Llama 3 and of Qwen2; GPT-2's is built into ByteLevel. Runs of letters and contractions are all
# that takes letters in them, and " x" begins a run.
_KNOWN_PATTERNS = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    for digits in ("", "{1,3}")
}


class TextSplits:
    """The safe places in texts, for one tokenizer.

    Args:
        spec: The content of its ``tokenizer.json``.
        unspellable: Contents of added tokens that no text holds.

    Attributes:
        known: Whether any place is safe with this tokenizer. If not, `last` and `first` find none.
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
        # Metaspace's "first" puts "▁" before the very first text alone.
        self.same_anywhere = (
            self.known
            and not any(token["rstrip"] for token in spec["added_tokens"])
            and all(
                s.get("prepend_scheme") != "first" for s in _steps(spec["pre_tokenizer"], "pretokenizers")
            )
        )
        # A normalizer that puts "▁" before every text.
        self._skip = int(any(node["type"] == "Prepend" for node in _steps(spec["normalizer"], "normalizers")))

    def last(self, text: str) -> tuple[str, str]:
        """The text cut at its last safe place; whatever follows it, the ids of the left part stay.

        ``("", text)`` where there is none.
        """
        # The last place of a long text is near its end, but for languages that write no spaces.
        for start in (max(0, len(text) - 200), 0) if self.known else ():
            places = [match.start() for match in _PLACE.finditer(text, start)]
            if places:
                return text[: places[-1]], text[places[-1] + self._skip :]
        return "", text

    def first(self, text: str) -> int | None:
        """Index of the first safe place: from there on, what comes before the text changes no id."""
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
    """Whether a known pattern splits at the places; None for a pre-tokenizer that is not known."""
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
    # "▁" has to be in the vocabulary, else it may be fused with unknown characters beside it.
    return splits or (
        "▁" in model["vocab"]
        and not model.get("ignore_merges")
        and not any(re.search("[A-Za-z]▁", piece) for piece in model["vocab"])
    )
