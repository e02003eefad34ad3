"""Workarounds for upstream reach what they are for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CODE = """
import importlib, torch
from polar_ft.training import upstream
upstream.apply()
assert importlib.import_module("deepspeed.comm.torch").build_shm_op() is None  # else it compiles for a minute
assert not hasattr(torch, "build_shm_op")
"""


def test_deepspeed_compiles_nothing_on_a_cpu(tmp_path: Path) -> None:
    """In a process of its own: what `apply` changes stays changed."""
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "CXX": "false",
        "TORCH_EXTENSIONS_DIR": str(tmp_path),
    }
    ended = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, env=environment)
    assert ended.returncode == 0, ended.stderr
