"""Whether the same input gets the same reward everywhere: training code, scorer, transformers, engines."""
