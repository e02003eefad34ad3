"""The scripts of examples/rft, run with stand-ins for srun, ray, polar-ft and others, which record calls."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

import polar_ft.rft.openrlhf
import polar_ft.rft.verl
from polar_ft.errors import PolarError

FOLDER = Path(__file__).parents[2] / "examples" / "rft"
CLUSTER = FOLDER / "cluster"
SCRIPTS = sorted([*FOLDER.glob("*.sh"), *CLUSTER.iterdir()])
POLICIES, DATA = ("llama3.1-8b", "qwen2.5-7b", "qwen3-8b"), ("general", "hh-rlhf", "math")

# What the stand-ins do, after they have recorded their name, arguments and GPUs. The first request is made
# before a server answers; Ray has one more node each time that it is asked.
STAND_INS = {
    "polar-ft": '[ "$1" = parity ] && exit ${PARITY_STATUS:-0}; exec sleep ${SERVER_SECONDS:-60}',
    "curl": '[ -z "${NO_SERVER-}" ] || exit 7; [ -e "$RECORD.up" ] || { touch "$RECORD.up"; exit 7; }',
    "sleep": 'case $1 in 2|10) exec "$REAL_SLEEP" 0.02 ;; *) exec "$REAL_SLEEP" "$@" ;; esac',
    "ray": 'if [ "$1" = health-check ]; then [ "$(grep -c ^ray.health "$RECORD")" -lt ${HEAD_GONE:-99} ]; '
    'elif [ "$1" = stop ]; then exit ${STOP_STATUS:-0}; fi',
    "python3": 'echo "$(grep -c ^python3 "$RECORD")"',
    "train": 'exit ${TRAIN_STATUS:-0}',
    "scontrol": 'printf "%s\\n" node1 node2 node3',
    "srun": 'while [[ $1 == --* ]]; do shift; done; SLURM_NODEID=0 exec "$@"',
}  # fmt: skip


@pytest.fixture
def bash(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a script; the last lines of its stdout are what the stand-ins recorded, by `recorded`."""
    programs = tmp_path / "bin"
    programs.mkdir()
    real_sleep = subprocess.run(["which", "sleep"], capture_output=True, text=True, check=True).stdout.strip()
    for name, does in STAND_INS.items():
        note = "" if name == "sleep" else f'echo "{name} $*|${{CUDA_VISIBLE_DEVICES-}}" >> "$RECORD"\n'
        (programs / name).write_text(f"#!/usr/bin/env bash\n{note}{does}\n")
        (programs / name).chmod(0o755)

    def run(script: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "RECORD": str(tmp_path / "record"),
            "REAL_SLEEP": real_sleep,
            "REWARD_MODEL": "my_rm",
            **variables,
        }
        (tmp_path / "record").write_text("")
        (tmp_path / "record.up").unlink(missing_ok=True)
        return subprocess.run(
            ["bash", str(script), *arguments],
            env={name: value for name, value in environment.items() if value},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=30,
        )

    return run


@pytest.fixture
def recorded(tmp_path: Path) -> Callable[[], list[str]]:
    """What the stand-ins were called with: name, arguments, and the GPUs that they saw."""
    return lambda: (tmp_path / "record").read_text().splitlines()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_is_valid_and_explains_itself(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert os.access(script, os.X_OK)
    text = script.read_text(encoding="utf-8")
    assert text.startswith("#!/usr/bin/env bash\n")
    assert script.name in text.partition("set -euo pipefail")[0]


@pytest.mark.parametrize("version", ["0.5", "0.9"])
def test_verl_launchers_name_what_is_missing(bash, tmp_path: Path, version: str) -> None:
    launcher = FOLDER / f"verl_{version}.sh"
    given = {"REWARD_SERVERS": "gpu-1:30000", "TRAIN_FILE": str(tmp_path / "train.parquet")}

    def error(*arguments: str, **variables: str) -> str:
        done = bash(launcher, *arguments, **{**given, **variables})
        assert done.returncode == 2
        assert not done.stdout
        return done.stderr

    assert "name a policy" in error("qwen3-8b")
    assert "gpt-2: the policy must be" in error("gpt-2", "math")
    assert "poems: the data must be" in error("qwen3-8b", "poems")
    assert "--grop: unknown option" in error("--grop", "qwen3-8b", "math")
    for variable in ("REWARD_MODEL", "REWARD_SERVERS", "TRAIN_FILE"):
        assert f"set {variable}" in error("qwen2.5-7b", "general", **{variable: ""})
    assert "set VAL_FILE: math" in error("qwen2.5-7b", "math")
    assert "train.parquet: no such file" in error("qwen2.5-7b", "general")
    (tmp_path / "train.parquet").touch()
    assert "run polar-ft calibrate" in error("qwen2.5-7b", "general")
    (tmp_path / "my_rm").mkdir()
    (tmp_path / "my_rm/reward_scale.json").touch()
    assert "4 nodes need a Ray cluster" in error("qwen3-8b", "general")


@pytest.mark.parametrize("version", ["0.5", "0.9"])
def test_verl_launchers_run_what_they_print(bash, recorded, tmp_path: Path, version: str) -> None:
    launcher = FOLDER / f"verl_{version}.sh"
    (tmp_path / "train.parquet").touch()
    key = "+reward.custom_reward_function" if version == "0.9" else "+custom_reward_function"
    arguments = ["--grpo", "llama3.1-8b", "general", "--", f"{key}.reward_kwargs.floor=-20", "a b=c"]
    given = {"REWARD_SERVERS": "gpu-1:30000", "TRAIN_FILE": "train.parquet", "OUT": "out"}
    printed = shlex.split(bash(launcher, "--print", *arguments, **given).stdout.replace("\\\n", " "))
    assert recorded() == []
    assert not (tmp_path / "out").exists()
    assert bash(launcher, *arguments, **given).returncode == 0
    assert recorded() == [f"{' '.join(printed)}|"]
    assert printed[-2:] == arguments[-2:]
    assert f"data.train_files='{tmp_path}/train.parquet'" in printed


def test_openrlhf_launcher(bash, recorded, tmp_path: Path) -> None:
    launcher = FOLDER / "openrlhf.sh"
    given = {"MODEL": "my-policy", "REWARD_SERVERS": "gpu-1:30000", "TRAIN_FILE": "train.jsonl"}
    for variable in given:
        missing = bash(launcher, **{**given, variable: ""})
        assert missing.returncode == 2
        assert f"set {variable}" in missing.stderr
    printed = bash(launcher, "--print", "--", "--train.seed", "7", **given).stdout
    words = shlex.split(printed.replace("\\\n", " "))
    assert words[words.index("--reward.remote_url") + 1] == str(FOLDER / "openrlhf_reward.py")
    assert words[-2:] == ["--train.seed", "7"]
    (tmp_path / "train.jsonl").touch()
    assert "run polar-ft calibrate" in bash(launcher, **given).stderr
    assert recorded() == []


def load(file: Path) -> Any:
    """Loads a file by its path, as frameworks do."""
    spec = importlib.util.spec_from_file_location("custom_module", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_reward_files(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(FOLDER / "verl_reward.py").compute_score_batch is polar_ft.rft.verl.compute_score_batch

    made = Mock()
    monkeypatch.setattr(polar_ft.rft.openrlhf, "make_reward_func", made)
    monkeypatch.setenv("REWARD_MODEL", "my_rm")
    monkeypatch.delenv("REWARD_SERVERS", raising=False)
    with pytest.raises(PolarError, match=r"^REWARD_SERVERS is not set; set it before Ray is started$"):
        load(FOLDER / "openrlhf_reward.py")
    monkeypatch.setenv("REWARD_SERVERS", "gpu-1:30000,gpu-2:30000")
    monkeypatch.setenv("WATCH", "watch")
    assert load(FOLDER / "openrlhf_reward.py").reward_func is made.return_value
    made.assert_called_once_with("my_rm", server_address=["gpu-1:30000", "gpu-2:30000"], watch="watch")


def test_reward_servers_of_a_machine(bash, recorded) -> None:
    started = bash(CLUSTER / "serve_rewards.sh", REWARD_GPUS="2", REWARD_PORT="31000", SERVER_SECONDS="0")
    assert started.returncode == 1
    assert "a reward server has ended" in started.stderr
    assert recorded() == ["polar-ft serve my_rm --host 127.0.0.1 --port 31000|2"]
    # The other servers may have ended as well: that they cannot be ended again is not the status.
    several = bash(CLUSTER / "serve_rewards.sh", REWARD_GPUS="0,1,2,3,4,5", SERVER_SECONDS="0.3")
    assert several.returncode == 1
    assert "ENGINE=llama: must be" in bash(CLUSTER / "serve_rewards.sh", ENGINE="llama").stderr


def test_waits_for_servers_and_parity(bash, recorded) -> None:
    script, servers = CLUSTER / "wait_for_rewards.sh", "gpu-1:30000,gpu-2:30000"
    assert bash(script, "--tolerance", "0.1", REWARD_SERVERS=servers).returncode == 0
    asked = [line.split("http://")[1] for line in recorded() if line.startswith("curl")]
    assert asked == ["gpu-1:30000/health|", "gpu-1:30000/health|", "gpu-2:30000/health|"]
    parity = "polar-ft parity my_rm --server gpu-1:30000 --server gpu-2:30000 --tolerance 0.1|"
    assert recorded()[-1] == parity
    # Spaces as the adapters take them; a proxy is for other machines than this one.
    spaced = bash(script, "--no-parity", REWARD_SERVERS="gpu-1:30000, 127.0.0.1:30000", no_proxy="gpu-1")
    assert spaced.returncode == 0
    assert "--noproxy 127.0.0.1,localhost,gpu-1 http://127.0.0.1:30000/health" in recorded()[-1]
    assert bash(script, REWARD_SERVERS=servers, PARITY_STATUS="1").returncode == 1
    assert bash(script, "--no-parity", REWARD_SERVERS=servers).returncode == 0
    assert not any("parity" in line for line in recorded())
    away = bash(script, REWARD_SERVERS=servers, WAIT_SECONDS="0")
    assert away.returncode == 1
    assert "gpu-1:30000 did not answer within 0 s" in away.stderr


def test_reward_model_next_to_the_policy(bash, recorded) -> None:
    script, gpus = CLUSTER / "beside.sh", {"POLICY_GPUS": "0,1,2", "REWARD_GPUS": "6,7"}
    before = time.monotonic()
    show = 'train "$REWARD_SERVERS" "$GPUS_PER_NODE"'
    assert bash(script, "bash", "-c", show, **gpus).returncode == 0
    assert time.monotonic() - before < 15  # the servers were ended
    calls = recorded()
    assert {line for line in calls if line.startswith("polar-ft serve")} == {
        "polar-ft serve my_rm --host 127.0.0.1 --port 30000|6",
        "polar-ft serve my_rm --host 127.0.0.1 --port 30001|7",
    }
    parity = "polar-ft parity my_rm --server 127.0.0.1:30000 --server 127.0.0.1:30001|0,1,2"
    assert calls.index(parity) < calls.index("train 127.0.0.1:30000,127.0.0.1:30001 3|0,1,2")

    assert bash(script, "train", TRAIN_STATUS="3", **gpus).returncode == 3
    # Training does not begin where a reward is wrong, or a server ends.
    for problem in ({"PARITY_STATUS": "1"}, {"SERVER_SECONDS": "0", "NO_SERVER": "1"}):
        assert bash(script, "train", **gpus, **problem).returncode == 1
        assert not any(line.startswith("train") for line in recorded())
    # It ends when a server does.
    assert bash(script, "sleep", "20", SERVER_SECONDS="1.5", **gpus).returncode == 1
    both = bash(script, "train", POLICY_GPUS="0,1", REWARD_GPUS="1")
    assert both.returncode == 2
    assert "GPU 1 is in both lists" in both.stderr


def test_ray_cluster(bash, recorded) -> None:
    script, given = CLUSTER / "ray_node.sh", {"HEAD": "node1", "NNODES": "3"}
    head = bash(script, "train", "it", NODE_RANK="0", TRAIN_STATUS="5", **given)
    assert head.returncode == 5
    calls = [line.split("|")[0] for line in recorded()]
    assert calls[0] == "ray start --num-gpus 8 --disable-usage-stats --head --port 6379"
    assert [call.split()[0] for call in calls[1:]] == ["python3", "python3", "python3", "train", "ray"]
    assert calls[-1] == "ray stop"
    assert bash(script, "train", NODE_RANK="0", STOP_STATUS="1", **given).returncode == 0

    worker = bash(script, "train", NODE_RANK="1", HEAD_GONE="4", GPUS_PER_NODE="4", **given)
    assert worker.returncode == 0
    calls = [line.split("|")[0] for line in recorded()]
    assert calls[:2] == [
        "ray health-check --address node1:6379",
        "ray start --num-gpus 4 --disable-usage-stats --address node1:6379",
    ]
    assert calls[-4:] == ["ray health-check --address node1:6379"] * 3 + ["ray stop"]
    assert not any(call.startswith("train") for call in calls)

    late = bash(script, "train", NODE_RANK="1", HEAD_GONE="0", WAIT_SECONDS="0", **given)
    assert late.returncode == 1
    assert "node 1 gave up after 0 s: head_is_up" in late.stderr
    assert "set NODE_RANK" in bash(script, "train", **given).stderr


def test_slurm_job(bash, recorded, tmp_path: Path) -> None:
    given = {
        "SLURM_JOB_NODELIST": "node[1-3]",
        "SLURM_SUBMIT_DIR": str(FOLDER.parents[1]),
        "SLURM_GPUS_ON_NODE": "2",
    }
    show = 'train "$REWARD_SERVERS" "$NNODES" "$HEAD" "${#POLAR_API_KEY}"'
    done = bash(CLUSTER / "rft.sbatch", "bash", "-c", show, **given)
    assert done.returncode == 0, done.stderr
    calls = [line.split("|")[0] for line in recorded()]
    assert "train node1:30000,node1:30001 2 node2 32" in calls
    # Serving and waiting begin together.
    steps = sorted(line.removeprefix("srun ") for line in calls if line.startswith("srun"))
    assert [step.split(" --nodelist=")[1].split()[0] for step in steps] == ["node1", "node2", "node2,node3"]
    assert steps[0].startswith("--nodes=1 --ntasks=1 --ntasks-per-node=1 --nodelist=node1 ")
    assert [Path(step.split()[4]).name for step in steps] == [
        "serve_rewards.sh",
        "wait_for_rewards.sh",
        "ray_node.sh",
    ]
    assert "polar-ft serve my_rm --host 0.0.0.0 --port 30001" in calls

    assert bash(CLUSTER / "rft.sbatch", "train", TRAIN_STATUS="4", **given).returncode == 4
    assert bash(CLUSTER / "rft.sbatch", "train", PARITY_STATUS="1", **given).returncode == 1
    assert not any(line.startswith("train") for line in recorded())
    none_left = bash(CLUSTER / "rft.sbatch", "train", REWARD_NODES="3", **given)
    assert none_left.returncode == 2
    assert "leave none to train" in none_left.stderr


def test_the_table_of_the_readme_is_what_the_launchers_do(bash) -> None:
    """Nodes, batch, prompt, response, micro batch, GPU memory, max_num_batched_tokens, epochs, test_freq."""
    keys = [
        "trainer.nnodes",
        "data.train_batch_size",
        "data.max_prompt_length",
        "data.max_response_length",
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu",
        "actor_rollout_ref.rollout.gpu_memory_utilization",
        "actor_rollout_ref.rollout.max_num_batched_tokens",
        "trainer.total_epochs",
        "trainer.test_freq",
    ]
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    rows = {}
    for line in readme.splitlines():
        if found := re.match(r"\| (\S+b), (\S+) \| (.+) \|$", line):
            rows[found[1], found[2]] = found[3].replace("none", "-1").split(" | ")
    assert sorted(rows) == sorted((policy, data) for policy in POLICIES for data in DATA)
    given = {"REWARD_SERVERS": "a:1", "TRAIN_FILE": "t", "VAL_FILE": "v"}
    for version in ("0.5", "0.9"):
        for (policy, data), row in rows.items():
            printed = bash(FOLDER / f"verl_{version}.sh", "--print", policy, data, **given).stdout
            settings = dict(word.split("=", 1) for word in shlex.split(printed.replace("\\\n", " "))[3:])
            assert [settings[key] for key in keys] == row, (version, policy, data)
