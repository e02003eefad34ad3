"""Decodes a file that is one JSON list entry by entry, so that it is never completely in memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, TextIO

_WHITE_SPACE = " \t\r\n"
_READ = 2**18


class BrokenListError(ValueError):
    """The rest of the list cannot be read; the message says why."""


def entries(stream: TextIO, max_chars: int) -> Iterator[Any]:
    """Decodes a JSON list entry by entry.

    Args:
        stream: The text of the list.
        max_chars: Longest entry, in characters; at most about twice that is kept in memory.

    Raises:
        BrokenListError: The text is no list, is invalid from some entry on, or has a longer entry.

    >>> import io
    >>> list(entries(io.StringIO('[{"a": 1}, 2, []]'), 1000))
    [{'a': 1}, 2, []]
    """
    text = _Text(stream)
    if text.peek() != "[":
        raise BrokenListError("is not a list")
    text.skip()
    if text.peek() == "]":
        return
    while True:
        yield text.decode(max_chars)
        separator = text.peek()
        text.skip()
        if separator == "]":
            break
        if separator != ",":
            found = repr(separator) if separator else "the end of the file"
            raise BrokenListError(f"has {found} where a comma or the end of the list belongs")
    if text.peek():
        raise BrokenListError("continues after the end of the list")


class _Text:
    """The part of a stream that is not decoded yet; reads more as needed."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._text = ""
        self._decoder = json.JSONDecoder()

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            self._text = self._text.lstrip(_WHITE_SPACE)
            if self._text or not self._read():
                return self._text[:1]

    def skip(self) -> None:
        self._text = self._text[1:]

    def decode(self, max_chars: int) -> Any:
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text)
            except RecursionError:
                raise BrokenListError("is nested too deeply to be a row") from None
            except ValueError as error:  # incomplete, or no JSON: more of the text decides
                if len(self._text) > max_chars:
                    raise _too_long(max_chars) from None
                if not self._read():
                    detail = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
                    raise BrokenListError(f"is not JSON ({detail})") from None
            else:
                if end > max_chars:
                    raise _too_long(max_chars)
                self._text = self._text[end:]
                return value

    def _read(self) -> bool:
        """Doubles the text: as an entry is decoded again after each read, there should be few reads."""
        more = self._stream.read(max(_READ, len(self._text)))
        self._text += more
        return bool(more)


def _too_long(max_chars: int) -> BrokenListError:
    return BrokenListError(
        f"is over the limit of {max_chars:,} characters; raise max_line_mb (--max-line-mb)"
    )
