"""One group encoded by a template, as plain lists."""

from __future__ import annotations

from collections.abc import Sequence

from polar_ft.groups import TextGroup, TokenGroup, Wrapper
from polar_ft.template import PolarTemplate


def encode(
    template: PolarTemplate,
    prompt: str,
    reference: str,
    candidates: Sequence[str],
    *,
    wrapper: Wrapper = "sft",
    measure: bool = False,
) -> TokenGroup:
    """The candidates of one (prompt, reference)."""
    [encoded] = template.encode(
        [TextGroup(prompt, (reference,), tuple(candidates), wrapper)], measure=measure
    )
    return encoded


def ids_of(group: TokenGroup) -> list[list[int]]:
    """All ids of each candidate."""
    return [ids.tolist() for ids in group.sequences]
