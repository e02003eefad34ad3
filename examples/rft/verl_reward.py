"""What verl 0.5 loads by its path: it knows no `pkg://`, so a file has to name the reward function."""

from polar_ft.rft.verl import compute_score_batch

__all__ = ["compute_score_batch"]
