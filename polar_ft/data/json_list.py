"""Decodes JSON without repeated keys; a list entry by entry, so that it is never completely in memory."""

from __future__ import annotations

import codecs
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedIOBase
from typing import Any

from polar_ft.data.problems import not_utf8

_WHITE_SPACE = " \t\r\n"
_READ = 2**18
_WRONG_BYTES = re.compile("[\udc80-\udcff]")


class RepeatedKeyError(Exception):
    """An object has a key twice, so that it does not say which value is meant."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise RepeatedKeyError(f"has the key {twice!r} twice — keep one of them")
    return made


DECODER = json.JSONDecoder(object_pairs_hook=_object)


class BrokenListError(ValueError):
    """The rest of the list cannot be read; the message says why.

    Attributes:
        unread: Number of bytes (after decompression) from the beginning of the entry to the end of the file.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.unread = 0


@dataclass(frozen=True)
class BadEntry:
    """An entry that cannot be used; those after it can be read."""

    reason: str


def entries(stream: BufferedIOBase, max_chars: int) -> Iterator[Any]:
    """Decodes a JSON list, or the list "data" of an object, entry by entry.

    Args:
        stream: The text of the list, in UTF-8.
        max_chars: Longest entry, in characters; at most about twice that is kept in memory.

    Yields:
        The entries; a `BadEntry` for one that is not UTF-8, or has a key twice.

    Raises:
        BrokenListError: The text is no list, is invalid from some entry on, or has a longer entry.

    >>> import io
    >>> list(entries(io.BytesIO(b'[{"a": 1}, 2, []]'), 1000))
    [{'a': 1}, 2, []]
    >>> list(entries(io.BytesIO(b'{"version": 2, "data": [{"a": 1}]}'), 1000))
    [{'a': 1}]
    """
    text = _Text(stream)
    try:
        inside = text.peek() == "{"
        if inside:
            text.skip()
            _enter_data(text, max_chars)
        yield from _entries(text, max_chars)
        if inside:
            while text.peek() == ",":
                text.skip()
                _decode_key(text, max_chars)
                text.decode(max_chars)
            if text.peek() != "}":
                raise BrokenListError("is followed by something else than the end of the object")
            text.skip()
        if text.peek():
            raise BrokenListError("continues after the end of the list")
    except BrokenListError as error:
        error.unread = text.count_rest()
        raise


def _enter_data(text: _Text, max_chars: int) -> None:
    while _decode_key(text, max_chars) != "data":
        text.decode(max_chars)
        if text.peek() != ",":
            raise BrokenListError('is not a list, and has no list "data"')
        text.skip()


def _decode_key(text: _Text, max_chars: int) -> Any:
    key = text.decode(max_chars)
    if text.peek() != ":":
        raise BrokenListError("is not JSON (Expecting ':' delimiter)")
    text.skip()
    return key


def _entries(text: _Text, max_chars: int) -> Iterator[Any]:
    if text.peek() != "[":
        raise BrokenListError("is not a list")
    text.skip()
    if text.peek() == "]":
        text.skip()
        return
    while True:
        yield text.decode(max_chars)
        separator = text.peek()
        if separator not in (",", "]"):
            found = repr(separator) if separator else "the end of the file"
            raise BrokenListError(f"has {found} where a comma or the end of the list belongs")
        text.skip()
        if separator == "]":
            return


class _Text:
    """The part of a stream that is not decoded yet; reads more as needed."""

    def __init__(self, stream: BufferedIOBase) -> None:
        self._stream = stream
        # Bytes that are no UTF-8 become halves of surrogate pairs, so that only their entry is lost.
        self._utf8 = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._text = ""
        self._has_wrong_bytes = False
        self._error: Exception | None = None
        if self.peek() == "\ufeff":
            self.skip()

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            self._text = self._text.lstrip(_WHITE_SPACE)
            if self._text or not self._read():
                return self._text[:1]

    def skip(self) -> None:
        self._text = self._text[1:]

    def count_rest(self) -> int:
        """Number of bytes that are not decoded yet; reads to the end."""
        count = len(self._text.encode(errors="surrogateescape"))
        while more := self._stream.read(2**20):
            count += len(more)
        return count

    def decode(self, max_chars: int) -> Any:
        self.peek()
        while True:
            try:
                value, end = self._decode_once()
            except RecursionError:
                raise BrokenListError("is nested too deeply to be a row") from None
            except ValueError as error:  # incomplete, or no JSON: more of the text decides
                if len(self._text) > max_chars:
                    raise _too_long(max_chars) from None
                if not self._read():
                    detail = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
                    raise BrokenListError(f"is not JSON ({detail})") from None
                continue
            if end == len(self._text) and isinstance(value, (int, float)) and self._read():
                continue  # the number may have more digits
            if end > max_chars:
                raise _too_long(max_chars)
            if self._has_wrong_bytes and (wrong := _WRONG_BYTES.search(self._text, 0, end)):
                at = len(self._text[: wrong.start()].encode(errors="surrogateescape"))
                value = BadEntry(not_utf8(self._text[:end].encode(errors="surrogateescape"), at, "entry"))
            self._text = self._text[end:]
            return value

    def _decode_once(self) -> tuple[Any, int]:
        try:
            return DECODER.raw_decode(self._text)
        except RepeatedKeyError as error:
            _, end = json.JSONDecoder().raw_decode(self._text)
            return BadEntry(str(error)), end

    def _read(self) -> bool:
        """Doubles the text: as an entry is decoded again after each read, there should be few reads."""
        wanted, parts = max(_READ, len(self._text)), []
        if self._error is not None:
            raise self._error
        try:
            while wanted > 0 and (part := self._stream.read1(wanted)):
                parts.append(part)
                wanted -= len(part)
        except (OSError, EOFError, zlib.error) as error:
            if not parts:
                raise
            self._error = error  # what was read before the damage is used first
        text = self._utf8.decode(b"".join(parts), final=not parts)
        self._has_wrong_bytes |= not text.isascii() and _WRONG_BYTES.search(text) is not None
        self._text += text
        return bool(parts)


def _too_long(max_chars: int) -> BrokenListError:
    return BrokenListError(
        f"is over the limit of {max_chars:,} characters; raise max_line_mb (--max-line-mb)"
    )
