"""polar_ft: fine-tune, check, convert, evaluate and serve POLAR reward models (arXiv 2507.05197)."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polar_ft.client import RewardModelClient, RewardServerError
    from polar_ft.scoring.scorer import RewardScorer

__all__ = ["RewardModelClient", "RewardScorer", "RewardServerError", "__version__"]

__version__ = "0.1.0"

# Imported when first used: `import polar_ft` needs no torch, and takes no time.
_HOMES = {
    "RewardModelClient": "polar_ft.client",
    "RewardServerError": "polar_ft.client",
    "RewardScorer": "polar_ft.scoring.scorer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
