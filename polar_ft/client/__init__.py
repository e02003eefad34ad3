"""Rewards from a server: `RewardModelClient`, its errors, and `polar-ft score`; without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from polar_ft.client.errors import RewardServerError

if TYPE_CHECKING:
    from polar_ft.client.client import RewardModelClient

__all__ = ["RewardModelClient", "RewardServerError"]


def __getattr__(name: str) -> Any:
    # Imported on first use: `polar-ft --help` imports all commands, and httpx would slow it down.
    if name != "RewardModelClient":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from polar_ft.client.client import RewardModelClient

    return RewardModelClient
