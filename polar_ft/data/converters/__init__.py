"""Other people's preference data as rows of ours: one module for each family of sources.

A converter takes one row (or, of a format that gathers them, all rows of a prompt) and returns the pair or
ranked rows that it gives, or raises `RowError` where it gives none; its keyword arguments are the options of
its format. To add a format, write such a function, with a `Layout` for the rows that it reads, and put it
into `CONVERTERS`.

What all formats agree on, so that the evaluator finds it: ``benchmark`` names where a row is from, ``subset``
the part of it; answers that are right or wrong have ``score`` 1 or 0 and ``correct`` true or false; answers
in several styles have ``style``; the model that wrote an answer is its ``policy``.
"""

from polar_ft.data.converters.conversion import CONVERTERS, Conversion, convert_file
from polar_ft.data.converters.format import Converted, Format

__all__ = ["CONVERTERS", "Conversion", "Converted", "Format", "convert_file"]
