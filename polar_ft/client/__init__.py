"""Rewards from a server: `RewardModelClient`, its errors, and `polar-ft score`. Needs no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polar_ft.client.errors import RewardServerError

if TYPE_CHECKING:
    from polar_ft.client.client import RewardModelClient

__all__ = ["RewardModelClient", "RewardServerError"]


def __getattr__(name: str) -> Any:
    # Imported when first used: the commands, which are all imported by `polar-ft --help`, need no httpx.
    if name != "RewardModelClient":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from polar_ft.client.client import RewardModelClient

    return RewardModelClient
