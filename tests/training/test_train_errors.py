"""What a user can get wrong: a message that says what and where, no traceback, and a status that is not 0."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from polar_ft.conversion.checkpoint_files import verify
from polar_ft.errors import PolarError
from polar_ft.training.engines import PlainEngine
from polar_ft.training.prepare import prepare_tiny_training
from tests.training.conftest import TOP_LINES, RunOnce
from tests.training.runs import Run, edit_config, make_rows, write_rows

# Case → what the message must hold; {project} is the folder of the runs.
MESSAGES = {
    "model_path": ["{project}/no_such_model", "no such folder", "check the spelling"],
    "held_out": ["val_data: 1 of its 1 prompts are also in data ({project}/leak.jsonl:1 and {project}/rows"],
    "data_path": ["{project}/no_such_rows.jsonl", "no such file", "check the spelling"],
    "config_path": ["{project}/no_such_config.py", "no such config file"],
    "bad_rows": ["{project}/bad_rows.jsonl:2", "chosen", "{project}/bad_rows.jsonl:4", "JSON"],
    "reward_token_id": ["reward_token_id=5", "set reward_token_id="],
    "no_separator": ["{project}/no_separator", "'<|reward|>'", "reward_tokens"],
    "no_weights": ["{project}/no_weights", "has no weights", "model*.safetensors"],
    "long_pair": ["{project}/rows.jsonl:", "raise max_packed_length from 16 to at least"],
    "no_room": ["{project}/rows.jsonl:", "leaves the prompt a budget of 1 tokens", "raise max_length to"],
    "tokenizer_code": ["tokenization_internlm2_fast.InternLM2TokenizerFast", "allow_tokenizer_code"],
}


@pytest.fixture(scope="session")
def failures(project: Path, run_once: RunOnce) -> Callable[[str], Run]:
    """The run of a case, by ``polar-ft train``."""

    def command(case: str) -> list[str]:
        return ["polar-ft", "train", str(_config(case, project))]

    if "PYTEST_XDIST_WORKER" not in os.environ:  # else its processes take turns
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda case: run_once(case, *command(case)), MESSAGES))
    return lambda case: run_once(case, *command(case))


def _config(case: str, project: Path) -> Path:
    paths = {"pretrained_model_name_or_path": str(project / "base"), "data": str(project / "rows.jsonl")}
    out = project / f"{case}.py"
    match case:
        case "config_path":
            return project / "no_such_config.py"
        case "model_path":  # the tiny config makes the model that it does not find
            paths["pretrained_model_name_or_path"] = str(project / "no_such_model")
            return edit_config("polar_7b_custom.py", out, **paths)
        case "tokenizer_code":
            paths["pretrained_model_name_or_path"] = str(project / "with_code")
            return edit_config("polar_7b_custom.py", out, **paths, allow_tokenizer_code=())
        case "data_path":
            lines = {"data": str(project / "no_such_rows.jsonl")}
        case "held_out":
            lines = {"val_data": str(write_rows(project / "leak.jsonl", make_rows(1)))}
        case "bad_rows":
            lines = {"data": str(_bad_rows(project / "bad_rows.jsonl"))}
        case "reward_token_id":
            lines = {"reward_token_id": 5}
        case "no_separator" | "no_weights":
            lines = {"pretrained_model_name_or_path": str(_broken_base(project, case))}
        case "long_pair":
            lines = {"max_packed_length": 16}
        case "no_room":
            lines = {"max_length": 21, "max_response_length": 8}
    return edit_config("polar_tiny_cpu.py", out, **(TOP_LINES | paths | lines))


def _bad_rows(file: Path) -> Path:
    rows = make_rows(4)
    del rows[1]["chosen"]
    lines = write_rows(file, rows).read_text().splitlines()
    file.write_text("\n".join([*lines[:3], lines[3][:-5]]))
    return file


def _broken_base(project: Path, name: str) -> Path:
    folder = project / name
    if not folder.exists():
        shutil.copytree(project / "base", folder)
        if name == "no_weights":
            (folder / "model.safetensors").unlink()
        else:
            tokenizer = folder / "tokenizer.json"
            tokenizer.write_text(tokenizer.read_text().replace("<|reward|>", "<|other|>"))
    return folder


@pytest.mark.parametrize("case", MESSAGES)
def test_message_and_status(failures, project, case):
    ended = failures(case)
    assert ended.status == 1, ended.tail
    for part in MESSAGES[case]:
        assert part.format(project=project) in ended.tail
    assert "Traceback" not in ended.output


def test_xtuner_itself_exits_zero_after_a_failure(failures, project, run_once):
    """Why `polar-ft train` is there; the message is the same."""
    failures("model_path")  # writes the config; without it the test depended on the order of the workers
    ended = run_once("xtuner_status", "xtuner", "train", str(project / "model_path.py"))
    assert ended.status == 0
    assert "no such folder" in ended.output


def test_half_precision_needs_deepspeed():
    model = torch.nn.Linear(2, 1).bfloat16()
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(
        PolarError, match=r"bfloat16, and without DeepSpeed .* add --deepspeed deepspeed_zero2"
    ):
        PlainEngine(model, optimizer)


def test_data_of_the_tiny_config_is_checked_before_a_model_is_made_of_it(tmp_path):
    with pytest.raises(PolarError, match=r"rows\.jsonl: no such file"):
        prepare_tiny_training(str(tmp_path / "base"), str(tmp_path / "rows.jsonl"))
    assert not (tmp_path / "base" / "config.json").exists()


# Runs a command on a file system of its own that holds one checkpoint and a half, and copies what it left.
SMALL_DISK = """
mkdir -p "$1" && mount -t tmpfs -o size=700k small "$1" || exit 77
folder=$1; shift
"$@"; status=$?
cp -r "$folder" "$folder.left"
exit $status
"""


@pytest.mark.parametrize("arguments", [(), ("--deepspeed", "deepspeed_zero2")], ids=["plain", "zero2"])
def test_full_disk_while_saving(project, run_once, arguments):
    name = f"full_disk_{len(arguments)}"
    work_dir = project / "runs" / name / "work"
    train = ("polar-ft", "train", str(project / "tiny.py"), *arguments)
    small_disk = ("unshare", "--mount", "sh", "-c", SMALL_DISK, "sh", str(work_dir))
    ended = run_once(name, *small_disk, *train)
    if ended.status == 77 or "unshare:" in ended.output:
        pytest.skip("mounting a small file system needs root")
    left = work_dir.with_name("work.left")
    assert ended.status == 1, ended.tail
    assert f"{work_dir}/iter_3.pth: could not be saved, is the disk full?" in ended.output
    assert f"the last complete checkpoint is {work_dir}/iter_2.pth" in ended.output
    assert "Traceback" not in ended.output
    # The earlier checkpoint is whole and the one that `--resume` finds; nothing of the other is left.
    assert (left / "last_checkpoint").read_text() == f"{work_dir}/iter_2.pth"
    assert not (left / "iter_3.pth").exists()
    assert verify(left / "iter_2.pth").step == 2
