"""Converts published preference data to rows of polar_ft: one module for each family of sources.

A converter takes one row (or, if its format gathers rows, all rows of a prompt) and returns the pair rows or
ranked rows that it gives, or raises `RowError` if it cannot be used; its keyword arguments are the options of
its format. To add a format, write such a function, with a `Layout` for the rows that it reads, and add it to
`CONVERTERS`.

Fields that all formats share, for evaluation: ``benchmark`` is the source of a row, ``subset`` its part of
the source; answers that are right or wrong have ``score`` 1 or 0 and ``correct`` true or false; answers in
several styles have ``style``; ``policy`` is the model that wrote an answer.
"""

from polar_ft.data.converters.conversion import CONVERTERS, Conversion, convert_file
from polar_ft.data.converters.format import Converted, Format
from polar_ft.data.converters.mapping import parse_mapping
from polar_ft.data.converters.recognise import Recognised, recognise_file

__all__ = [
    "CONVERTERS",
    "Conversion",
    "Converted",
    "Format",
    "Recognised",
    "convert_file",
    "parse_mapping",
    "recognise_file",
]
