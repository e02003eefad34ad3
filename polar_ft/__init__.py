"""polar_ft: fine-tune, check, convert and evaluate POLAR reward models (arXiv 2507.05197)."""

__version__ = "0.1.0"
