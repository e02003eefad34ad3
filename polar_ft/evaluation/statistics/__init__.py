"""Figures over scored pairs and ranked rows, in numpy and scipy: no model, no texts."""
