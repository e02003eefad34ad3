"""Hooks of mmengine's runner."""

from __future__ import annotations

from typing import Any

from mmengine.hooks import Hook


class ThroughputHook(Hook):
    """Adds pairs/s and tokens/s of every step to log and TensorBoard.

    ``tokens_per_s`` counts the tokens that were computed, ``flat_tokens_per_s`` those that the same pairs
    have as separate sequences; both over all ranks.
    """

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict[str, float] | None = None
    ) -> None:
        """Called by mmengine after each step."""
        hub = runner.message_hub
        seconds = hub.get_scalar("train/time").current()
        for name in ("pairs", "tokens", "flat_tokens"):
            hub.update_scalar(f"train/{name}_per_s", (outputs or {})[name] / seconds)
