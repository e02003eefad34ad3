"""What a run shows on the terminal: events of the first rank, drawn by the command that started it."""
