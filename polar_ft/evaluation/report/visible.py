"""Texts of users, made safe to look at: nothing in them acts on the page, and nothing is invisible."""

from __future__ import annotations

import re

# What would change how the text around it is shown or break the page: control characters (line feed and tab
# are meant), what turns the writing direction (real Arabic or Hebrew needs none of it), half surrogate pairs.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


def visible(text: str) -> str:
    r"""The text with characters that would act instead of being shown spelled out.

    Escaping for HTML or Markdown is another matter, and comes after it.

    >>> visible("a\r\nb\x00\x1b[31m \u202Egnp.exe")
    'a\nb⟦U+0000⟧⟦U+001B⟧[31m ⟦U+202E⟧gnp.exe'
    """
    return _UNSAFE.sub(lambda match: f"⟦U+{ord(match[0]):04X}⟧", text.replace("\r\n", "\n"))


def one_line(text: str, limit: int = 60) -> str:
    r"""A name for a table or a plot: visible, on one line, cut in the middle to `limit` characters.

    Cut in the middle since long names of subsets are often paths, which differ at their end.

    >>> one_line("data/a folder/held_out.jsonl", limit=15)
    'data/a …t.jsonl'
    >>> one_line("two\nlines")
    'two lines'
    """
    name = " ".join(visible(text).split())
    if len(name) <= limit:
        return name
    tail = (limit - 1) // 2
    return f"{name[: limit - 1 - tail]}…{name[-tail:]}"
