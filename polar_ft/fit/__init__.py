"""From one file of preferences to a served reward model: ``polar-ft fit``."""
