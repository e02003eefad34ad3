"""Looks at a machine and at a run before the run begins: ``polar-ft doctor`` and ``polar-ft plan``."""
