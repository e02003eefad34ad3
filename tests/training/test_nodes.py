"""Two commands with NNODES=2 on one machine: they meet, train as one run, and fail as one."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.training.conftest import STEPS, TOP_LINES
from tests.training.runs import REPOSITORY, Run, edit_config, run, use_model
from tests.training.test_interruptions import nothing_is_left


def on_two_nodes(config: Path, work_dir: Path, *arguments: str) -> list[Run]:
    """What the command of each node did."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])

    def node(rank: int) -> Run:
        variables = dict(NNODES="2", NODE_RANK=str(rank), ADDR="127.0.0.1", PORT=port)
        command = ["polar-ft", "train", str(config), *arguments]
        return run(command, work_dir, config.parent, **variables, PYTHONPATH=str(REPOSITORY))

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(node, range(2)))


def test_two_nodes_train_as_one_process_does(project: Path, plain_run: Run, tmp_path: Path):
    first, second = on_two_nodes(project / "tiny.py", tmp_path / "work")
    assert first.status == second.status == 0, first.tail + second.tail
    losses = first.scalars("loss")
    assert list(losses) == list(range(1, STEPS + 1))
    for step, loss in plain_run.scalars("loss").items():
        assert losses[step] == pytest.approx(loss, rel=1e-5)
    assert first.checkpoint.name == f"iter_{STEPS}.pth"


def test_a_failure_on_one_node_ends_both(project: Path, tmp_path: Path):
    paths = dict(pretrained_model_name_or_path=str(project / "base"), data=str(project / "rows.jsonl"))
    config = edit_config("polar_tiny_cpu.py", tmp_path / "failing.py", **(TOP_LINES | paths))
    use_model(config, "tests.training.variants", "FailingModel")
    first, second = on_two_nodes(config, tmp_path / "work")
    assert first.status == second.status == 1
    for rank, node, error in ((0, first, "RuntimeError: "), (1, second, "ArithmeticError: on purpose\n")):
        assert f"error: rank {rank} on " in node.tail
        assert f"failed first of this node (the other nodes' commands name theirs): {error}" in node.tail
    assert nothing_is_left(tmp_path / "work")
