"""Starting a training run as ``xtuner train`` does, with the exit status that the run really had."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from polar_ft.errors import PolarError


def launch(config: str, arguments: Sequence[str]) -> int:
    """Runs xtuner's training script on a config.

    As with ``xtuner train``, the environment variables ``NPROC_PER_NODE``, ``NNODES``, ``NODE_RANK``,
    ``ADDR`` and ``PORT`` say how many processes there are; more than one is started through torchrun.

    Args:
        config: Path of a config, or the name of one that xtuner ships.
        arguments: Further arguments of ``xtuner train``.

    Returns:
        The exit status; xtuner 0.2.0's own command always exits 0 (``xtuner/entry_point.py``).

    Raises:
        PolarError: There is no such config.
    """
    import xtuner
    from xtuner.configs import cfgs_name_path

    if not Path(config).is_file() and config not in cfgs_name_path:
        raise PolarError(f"{config}: no such config file; `ls configs` shows those that are shipped")
    nodes = int(os.environ.get("NNODES", "1"))
    processes = int(os.environ.get("NPROC_PER_NODE", "1"))
    # By its path, as importing the script takes as long as the start of a run.
    command = [str(Path(xtuner.__file__).parent / "tools" / "train.py"), config, *arguments]
    if nodes == 1 and processes == 1:
        return subprocess.run([sys.executable, *command], check=False).returncode
    address = os.environ.get("ADDR", "127.0.0.1")
    port = os.environ.get("PORT") or str(_free_port())
    torchrun = [
        *(sys.executable, "-m", "torch.distributed.run"),
        f"--nnodes={nodes}",
        f"--node_rank={os.environ.get('NODE_RANK', '0')}",
        f"--nproc_per_node={processes}",
        f"--master_addr={address}",
        f"--master_port={port}",
    ]
    return subprocess.run([*torchrun, *command, "--launcher", "pytorch"], check=False).returncode


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
