"""Hooks of mmengine's runner."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook, Hook

from polar_ft.errors import PolarError


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


class SafeCheckpointHook(CheckpointHook):
    """mmengine's CheckpointHook, for the day on which the disk is full.

    An old checkpoint is removed after the new one is whole, not before; a checkpoint that could not be
    written is removed, so that ``last_checkpoint`` always names a whole one.
    """

    def _save_checkpoint_with_step(self, runner: Any, step: int, meta: dict[str, Any]) -> None:
        outdated = None
        if 0 < self.max_keep_ckpts == len(self.keep_ckpt_ids) and self.keep_ckpt_ids[-1] != step:
            outdated = self.keep_ckpt_ids.popleft()
        pointer = Path(runner.work_dir, "last_checkpoint")
        previous = pointer.read_text(encoding="utf-8") if pointer.is_file() else ""
        try:
            super()._save_checkpoint_with_step(runner, step, meta)
        except (OSError, RuntimeError) as error:
            # torch.save turns a failed write into a RuntimeError of its zip writer.
            if isinstance(error, RuntimeError) and "inline_container" not in str(error):
                raise
            target = self._path(step)
            _remove(target)
            kept = "no earlier checkpoint is there"
            if previous:
                pointer.write_text(previous, encoding="utf-8")
                kept = f"the last whole checkpoint is {previous}"
            raise PolarError(
                f"{target}: could not be saved, is the disk full? ({_reason(error)}); {kept}; make room or "
                f"choose another --work-dir, then go on with --resume"
            ) from error
        if outdated is not None and is_main_process():
            _remove(self._path(outdated))

    def _path(self, step: int) -> Path:
        return Path(self.out_dir, self.filename_tmpl.format(step))


def _reason(error: BaseException) -> str:
    """What went wrong in the first place; torch reports a failed write as an error of its own."""
    while error.__context__ is not None:
        error = error.__context__
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _remove(checkpoint: Path) -> None:
    """A checkpoint is a file, or a directory where DeepSpeed wrote it."""
    if checkpoint.is_dir():
        shutil.rmtree(checkpoint, ignore_errors=True)
    else:
        checkpoint.unlink(missing_ok=True)
